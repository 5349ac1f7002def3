package cluster

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"
	"time"
	"unique"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weirmesh/weir/agent/decide"
	"github.com/weirmesh/weir/agent/model"
)

// Errors of the conversions name the field. An API server has validated what it
// sends; a directory's files have been read by nobody.

// shared returns one copy for all equal strings: thousands of pods have the same
// namespace, node and service account.
func shared(s string) string { return unique.Make(s).Value() }

// ours keeps the labels or annotations that are Weir's.
func ours(m map[string]string) map[string]string {
	return keep(m, func(k string) bool { return strings.HasPrefix(k, model.Prefix) })
}

// labels keeps all of them.
func labels(m map[string]string) map[string]string { return keep(m, func(string) bool { return true }) }

func keep(m map[string]string, wanted func(key string) bool) map[string]string {
	var out map[string]string
	for k, v := range m {
		if wanted(k) {
			if out == nil {
				out = map[string]string{}
			}
			out[shared(k)] = shared(v)
		}
	}
	return out
}

func toNamespace(n *corev1.Namespace) (model.Namespace, error) {
	return model.Namespace{Name: shared(n.Name), Labels: ours(n.Labels)}, nil
}

func toPod(p *corev1.Pod) (model.Pod, error) {
	out := model.Pod{
		UID:            string(p.UID),
		Namespace:      shared(p.Namespace),
		Name:           p.Name,
		ServiceAccount: shared(p.Spec.ServiceAccountName),
		Workload:       shared(workload(p)),
		Node:           shared(p.Spec.NodeName),
		MirrorHash:     p.Annotations[corev1.MirrorPodAnnotationKey],
		HostNetwork:    p.Spec.HostNetwork,
		Phase:          model.Phase(shared(string(p.Status.Phase))),
		Leaving:        p.DeletionTimestamp != nil,
		Captured:       Captured(p),
		Labels:         labels(p.Labels),
		Annotations:    ours(p.Annotations),
		Probes:         toProbes(&p.Spec),
	}
	if p.Spec.RuntimeClassName != nil {
		out.RuntimeClass = shared(*p.Spec.RuntimeClassName)
	}
	if n := len(p.Status.PodIPs); n > 0 {
		out.Addresses = make([]netip.Addr, 0, n)
	}
	for i, ip := range p.Status.PodIPs {
		addr, err := netip.ParseAddr(ip.IP)
		if err != nil {
			return model.Pod{}, fmt.Errorf("status.podIPs[%d].ip: %w", i, err)
		}
		out.Addresses = append(out.Addresses, addr.Unmap())
	}
	return out, nil
}

func toPeer(p *corev1.Pod) (*model.Peer, error) {
	pod, err := toPod(p)
	if err != nil {
		return nil, err
	}
	return peerOf(pod), nil
}

func peerOf(p model.Pod) *model.Peer {
	out := &model.Peer{
		Namespace: p.Namespace, Name: p.Name, ServiceAccount: p.ServiceAccount, Workload: p.Workload,
	}
	ports := model.InboundPorts{Exclude: p.Annotations[decide.ExcludeInboundAnnotation], Include: p.Annotations[decide.IncludeInboundAnnotation]}
	if ports != (model.InboundPorts{}) {
		out.Ports = &ports
	}
	if !p.HostNetwork && !p.Phase.Finished() {
		out.Captured, out.Addresses = p.Captured, p.Addresses
	}
	return out
}

// workload is what a pod is one of: its controller, or where that has one of its own,
// that: a Deployment, by the hash that its ReplicaSet's name ends in, or a CronJob, by
// the minute (since 1970) that its Job's name ends in. The name of a static pod ends
// in its node's.
func workload(p *corev1.Pod) string {
	owner := metav1.GetControllerOf(p)
	if owner == nil {
		return cmp.Or(strings.TrimSuffix(p.GenerateName, "-"), p.Name)
	}
	switch owner.Kind {
	case "ReplicaSet":
		if hash := p.Labels[appsv1.DefaultDeploymentUniqueLabelKey]; hash != "" {
			return strings.TrimSuffix(owner.Name, "-"+hash)
		}
	case "Job":
		if i := strings.LastIndexByte(owner.Name, '-'); i > 0 {
			if minute := owner.Name[i+1:]; len(minute) == 8 && strings.Trim(minute, "0123456789") == "" {
				return owner.Name[:i]
			}
		}
	case "Node":
		return strings.TrimSuffix(p.Name, "-"+owner.Name)
	}
	return owner.Name
}

func toCompactPod(p *corev1.Pod) (compactPod, error) {
	pod, err := toPod(p)
	return compact(pod), err
}

// Service cuts an object down to the model. The error names the field.
func Service(s *corev1.Service) (model.Service, error) {
	out := model.Service{
		Namespace: shared(s.Namespace), Name: shared(s.Name),
		External: s.Spec.Type == corev1.ServiceTypeExternalName,
		Local:    value(s.Spec.InternalTrafficPolicy, "") == corev1.ServiceInternalTrafficPolicyLocal,
	}
	if s.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		out.Affinity = affinity(s.Spec.SessionAffinityConfig)
	}
	ips := s.Spec.ClusterIPs
	if len(ips) == 0 && s.Spec.ClusterIP != "" {
		ips = []string{s.Spec.ClusterIP}
	}
	for i, ip := range ips {
		if ip == corev1.ClusterIPNone || out.External {
			continue
		}
		addr, err := netip.ParseAddr(ip)
		if err != nil {
			return model.Service{}, fmt.Errorf("spec.clusterIPs[%d]: %w", i, err)
		}
		out.ClusterIPs = append(out.ClusterIPs, addr.Unmap())
	}
	for i, p := range s.Spec.Ports {
		port, err := toPort(p.Port)
		if err != nil {
			return model.Service{}, fmt.Errorf("spec.ports[%d].port: %w", i, err)
		}
		out.Ports = append(out.Ports, model.ServicePort{
			Name: shared(p.Name), Port: port, Protocol: toProtocol(p.Protocol), AppProtocol: shared(value(p.AppProtocol, "")),
		})
	}
	return out, nil
}

// affinity is how long sessionAffinity ClientIP lasts; the API server's default is
// three hours.
func affinity(c *corev1.SessionAffinityConfig) time.Duration {
	seconds := corev1.DefaultClientIPServiceAffinitySeconds
	if c != nil && c.ClientIP != nil {
		seconds = value(c.ClientIP.TimeoutSeconds, seconds)
	}
	return time.Duration(seconds) * time.Second
}

func toSlice(s *discoveryv1.EndpointSlice) (model.EndpointSlice, error) {
	out := model.EndpointSlice{
		Namespace: shared(s.Namespace),
		Name:      s.Name,
		Service:   shared(s.Labels[discoveryv1.LabelServiceName]),
	}
	if s.AddressType == discoveryv1.AddressTypeFQDN {
		return out, nil // names, not addresses; kube-proxy ignores them too
	}
	for i, p := range s.Ports {
		if p.Port == nil {
			continue // "all ports", of no use to a Service
		}
		port, err := toPort(*p.Port)
		if err != nil {
			return model.EndpointSlice{}, fmt.Errorf("ports[%d].port: %w", i, err)
		}
		out.Ports = append(out.Ports, model.EndpointPort{
			Name: shared(value(p.Name, "")), Port: port, Protocol: toProtocol(value(p.Protocol, corev1.ProtocolTCP)),
		})
	}
	out.Endpoints = make([]model.Endpoint, 0, len(s.Endpoints))
	for i, e := range s.Endpoints {
		endpoint, err := toEndpoint(s.Namespace, e)
		if err != nil {
			return model.EndpointSlice{}, fmt.Errorf("endpoints[%d].%w", i, err)
		}
		out.Endpoints = append(out.Endpoints, endpoint)
	}
	return out, nil
}

// toEndpoint reads conditions as discovery.k8s.io/v1 defines them: ready unless
// it says otherwise, serving if it says so or else if ready.
func toEndpoint(namespace string, e discoveryv1.Endpoint) (model.Endpoint, error) {
	if len(e.Addresses) == 0 {
		return model.Endpoint{}, fmt.Errorf("addresses: there is none")
	}
	addr, err := netip.ParseAddr(e.Addresses[0])
	if err != nil {
		return model.Endpoint{}, fmt.Errorf("addresses[0]: %w", err)
	}
	out := model.Endpoint{Address: addr.Unmap(), Ready: value(e.Conditions.Ready, true)}
	out.Draining = value(e.Conditions.Terminating, false) && value(e.Conditions.Serving, out.Ready)
	if ref := e.TargetRef; ref != nil && ref.Kind == "Pod" {
		if ref.Namespace != "" {
			namespace = ref.Namespace
		}
		out.Pod = shared(namespace + "/" + ref.Name) // one for both families
	}
	out.Node = shared(value(e.NodeName, ""))
	out.Hints = toHints(e.Hints)
	return out, nil
}

func toHints(h *discoveryv1.EndpointHints) *model.Hints {
	if h == nil || len(h.ForZones)+len(h.ForNodes) == 0 {
		return nil
	}
	out := &model.Hints{}
	for _, z := range h.ForZones {
		out.Zones = append(out.Zones, shared(z.Name))
	}
	for _, n := range h.ForNodes {
		out.Nodes = append(out.Nodes, shared(n.Name))
	}
	return out
}

// toZone is where a node is; empty if nobody says.
func toZone(n *corev1.Node) (string, error) { return shared(n.Labels[corev1.LabelTopologyZone]), nil }

func toPort(n int32) (uint16, error) {
	if n < 1 || n > 65535 {
		return 0, fmt.Errorf("%d is not between 1 and 65535", n)
	}
	return uint16(n), nil
}

// toProtocol fills in the default that an API server would have set.
func toProtocol(p corev1.Protocol) model.Protocol {
	if p == "" {
		return model.TCP
	}
	return model.Protocol(shared(string(p)))
}

// value is what p points to, or else the default.
func value[T any](p *T, otherwise T) T {
	if p == nil {
		return otherwise
	}
	return *p
}
