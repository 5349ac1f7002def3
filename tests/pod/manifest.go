package pod

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
)

// Service is a Kubernetes Service with one port.
type Service struct {
	Namespace, Name string
	ClusterIPs      []netip.Addr // at most one of each family
	Port            uint16
	AppProtocol     string // what the port is declared to carry; empty: nobody says
}

// object is a Kubernetes object, as JSON has it.
type object map[string]any

// Write puts a file of manifests in place for the node's agent: all of it at
// once, or replaced. Objects are made by CapturedNamespace, Manifest, …
func (n *Node) Write(name string, objects ...any) error {
	list := []byte{}
	for _, o := range objects {
		b, err := json.MarshalIndent(o, "", "  ") // JSON is YAML
		if err != nil {
			return fmt.Errorf("manifest %s: %w", name, err)
		}
		list = append(append(list, "---\n"...), append(b, '\n')...)
	}
	for _, dir := range []string{manifestsDir, manifestsDir + ".new"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("manifest %s: %w", name, err)
		}
	}
	written := filepath.Join(manifestsDir+".new", name)
	if err := os.WriteFile(written, list, 0o644); err != nil {
		return fmt.Errorf("manifest %s: %w", name, err)
	}
	if err := os.Rename(written, filepath.Join(manifestsDir, name)); err != nil {
		return fmt.Errorf("manifest %s: %w", name, err)
	}
	return nil
}

// CapturedNamespace is a namespace whose pods are captured.
func CapturedNamespace(name string) any {
	return object{
		"apiVersion": "v1", "kind": "Namespace",
		"metadata": object{"name": name, "labels": object{"weirmesh.io/capture": "enabled"}},
	}
}

// Plaintext has the pods of a namespace called in plaintext.
func Plaintext(namespace string) any {
	return object{
		"apiVersion": "policy.weirmesh.io/v1alpha1", "kind": "PeerAuthentication",
		"metadata": object{"namespace": namespace, "name": "plaintext"},
		"spec":     object{"mode": "Disable"},
	}
}

// PlaintextPorts has some ports of an app's pods called in plaintext.
func PlaintextPorts(namespace, app string, ports ...int) any {
	var modes []object
	for _, port := range ports {
		modes = append(modes, object{"port": port, "mode": "Disable"})
	}
	return object{
		"apiVersion": "policy.weirmesh.io/v1alpha1", "kind": "PeerAuthentication",
		"metadata": object{"namespace": namespace, "name": "plaintext-ports"},
		"spec":     object{"podSelector": object{"matchLabels": object{"app": app}}, "ports": modes},
	}
}

// Manifest is the pod as its owner wrote it, before it has addresses.
func (p *Pod) Manifest() any {
	return object{
		"apiVersion": "v1", "kind": "Pod",
		"metadata": p.metadata(nil),
		"spec":     p.spec(),
	}
}

// Running is the pod as the cluster has it once it runs.
func (p *Pod) Running(annotations map[string]string) any {
	var ips []object
	for _, a := range p.Addresses {
		ips = append(ips, object{"ip": a})
	}
	return object{
		"apiVersion": "v1", "kind": "Pod",
		"metadata": p.metadata(annotations),
		"spec":     p.spec(),
		"status":   object{"phase": "Running", "podIP": p.Addresses[0], "podIPs": ips},
	}
}

func (p *Pod) metadata(annotations map[string]string) object {
	meta := object{"namespace": p.Namespace, "name": p.Name, "annotations": annotations}
	if p.App != "" {
		meta["labels"] = object{"app": p.App}
	}
	return meta
}

func (p *Pod) spec() object {
	spec := object{"containers": []object{{"name": "app", "image": "app"}}}
	if p.Account != "" {
		spec["serviceAccountName"] = p.Account
	}
	return spec
}

// Manifest is the Service.
func (s Service) Manifest() any {
	port := object{"port": s.Port}
	if s.AppProtocol != "" {
		port["appProtocol"] = s.AppProtocol
	}
	return object{
		"apiVersion": "v1", "kind": "Service",
		"metadata": object{"namespace": s.Namespace, "name": s.Name},
		"spec":     object{"clusterIPs": s.ClusterIPs, "ports": []object{port}},
	}
}

// Slices are the EndpointSlices of pods that serve s on a port of theirs, one
// slice for each family that the pods have addresses of. A pod without a name is
// an endpoint that is none.
func (s Service) Slices(port uint16, pods ...*Pod) []any {
	var out []any
	for _, v6 := range []bool{false, true} {
		family := "IPv4"
		if v6 {
			family = "IPv6"
		}
		var endpoints []object
		for _, p := range pods {
			if a := p.Address(v6); a.IsValid() {
				e := object{"addresses": []string{a.String()}, "conditions": object{"ready": true}}
				if p.Name != "" {
					e["targetRef"] = object{"kind": "Pod", "namespace": p.Namespace, "name": p.Name}
				}
				endpoints = append(endpoints, e)
			}
		}
		if len(endpoints) == 0 {
			continue
		}
		out = append(out, object{
			"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
			"metadata": object{
				"namespace": s.Namespace, "name": s.Name + "-" + map[bool]string{false: "v4", true: "v6"}[v6],
				"labels": object{"kubernetes.io/service-name": s.Name},
			},
			"ports":     []object{{"port": port}},
			"endpoints": endpoints,
		})
	}
	return out
}
