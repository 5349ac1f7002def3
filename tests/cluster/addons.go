package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"time"
)

const corednsImage = "weir.test/coredns:" + corednsVersion

// corefile answers for the cluster and says of every other name that it does
// not exist: a pod's search domains must come to an end. That takes a block of
// its own, as the template plugin is asked before the kubernetes plugin.
const corefile = `cluster.local:53 in-addr.arpa:53 ip6.arpa:53 {
    errors
    health
    ready
    kubernetes cluster.local in-addr.arpa ip6.arpa {
        pods insecure
        ttl 5
    }
    cache 5
    loadbalance
    reload 5s
}
.:53 {
    errors
    template ANY ANY {
        rcode NXDOMAIN
    }
}
`

// buildImages writes the images every node needs, and returns their paths.
func (c *Cluster) buildImages() ([]string, error) {
	images := []Image{
		{
			Ref: pauseImage, Entrypoint: []string{"/pause"}, User: "65535:65535",
			Files: map[string]string{"/pause": filepath.Join(c.binaries.Pause, "pause")},
		},
		{
			Ref: corednsImage, Entrypoint: []string{"/coredns"}, User: "65532:65532",
			Files: map[string]string{"/coredns": filepath.Join(c.binaries.CoreDNS, "coredns")},
		},
	}
	var paths []string
	for _, img := range images {
		name, _, _ := strings.Cut(filepath.Base(img.Ref), ":")
		path := c.path("images", name+".tar")
		if err := BuildImage(path, img); err != nil {
			return nil, err
		}
		paths = append(paths, path)
	}
	return paths, nil
}

// createDNS creates CoreDNS in kube-system, as clusters have it.
func (c *Cluster) createDNS(ctx context.Context) error {
	type object = map[string]any
	labels := object{"k8s-app": "kube-dns"}
	meta := func(name string) object { return object{"name": name, "namespace": "kube-system", "labels": labels} }
	probe := func(path string, port int) object {
		return object{"httpGet": object{"path": path, "port": port}, "periodSeconds": 1, "timeoutSeconds": 5, "failureThreshold": 30}
	}
	var addrs []string
	for _, addr := range c.net.dns() {
		addrs = append(addrs, addr.String())
	}
	pod := object{
		"serviceAccountName": "coredns", "priorityClassName": "system-cluster-critical",
		"tolerations": []object{{"key": "CriticalAddonsOnly", "operator": "Exists"}},
		"dnsPolicy":   "Default",
		"containers": []object{{
			"name": "coredns", "image": corednsImage, "imagePullPolicy": "IfNotPresent",
			"args":           []string{"-conf", "/etc/coredns/Corefile"},
			"ports":          []object{{"name": "dns", "containerPort": 53, "protocol": "UDP"}, {"name": "dns-tcp", "containerPort": 53, "protocol": "TCP"}},
			"readinessProbe": probe("/ready", 8181), "livenessProbe": probe("/health", 8080),
			"securityContext": object{"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": object{"drop": []string{"ALL"}, "add": []string{"NET_BIND_SERVICE"}}},
			"volumeMounts":    []object{{"name": "config", "mountPath": "/etc/coredns", "readOnly": true}},
		}},
		"volumes": []object{{"name": "config", "configMap": object{"name": "coredns"}}},
	}
	const rbac, role = "/apis/rbac.authorization.k8s.io/v1/", "system:coredns"
	for _, o := range []struct {
		path   string
		object object
	}{
		{"/api/v1/namespaces/kube-system/serviceaccounts", object{"metadata": meta("coredns")}},
		{rbac + "clusterroles", object{"metadata": object{"name": role}, "rules": []object{
			{"apiGroups": []string{""}, "resources": []string{"services", "pods", "namespaces"}, "verbs": []string{"list", "watch"}},
			{"apiGroups": []string{"discovery.k8s.io"}, "resources": []string{"endpointslices"}, "verbs": []string{"list", "watch"}},
		}}},
		{rbac + "clusterrolebindings", object{
			"metadata": object{"name": role},
			"roleRef":  object{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
			"subjects": []object{{"kind": "ServiceAccount", "name": "coredns", "namespace": "kube-system"}},
		}},
		{"/api/v1/namespaces/kube-system/configmaps", object{"metadata": meta("coredns"), "data": object{"Corefile": corefile}}},
		{"/api/v1/namespaces/kube-system/services", object{"metadata": meta("kube-dns"), "spec": object{
			"selector": labels, "clusterIP": addrs[0], "clusterIPs": addrs, "ipFamilyPolicy": "PreferDualStack",
			"ports": []object{{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}},
		}}},
		{"/apis/apps/v1/namespaces/kube-system/deployments", object{"metadata": meta("coredns"), "spec": object{
			"replicas": 1, "selector": object{"matchLabels": labels},
			"template": object{"metadata": object{"labels": labels}, "spec": pod},
		}}},
	} {
		if err := c.api.create(ctx, o.path, o.object); err != nil {
			return fmt.Errorf("create CoreDNS: %w", err)
		}
	}
	return nil
}

// waitNodes waits until kubelet says of each node that it is ready.
func (c *Cluster) waitNodes(ctx context.Context) error {
	for _, node := range c.Nodes {
		err := poll(ctx, "node "+node.Name+" to be ready", func(ctx context.Context) error {
			for _, process := range []string{"containerd", "kubelet", "kube-proxy"} {
				if err := node.running(process); err != nil {
					return err
				}
			}
			var object struct {
				Status struct {
					Conditions []struct{ Type, Status, Message string }
				}
			}
			if err := c.api.get(ctx, "/api/v1/nodes/"+node.Name, &object); err != nil {
				return err
			}
			for _, condition := range object.Status.Conditions {
				if condition.Type != "Ready" {
					continue
				}
				if condition.Status == "True" {
					return nil
				}
				return errors.New(condition.Message)
			}
			return errors.New("kubelet has not reported yet")
		})
		if err != nil {
			return fmt.Errorf("%w; %s", err, node.processes["kubelet"].logTail())
		}
	}
	return nil
}

// waitDNS asks CoreDNS from every node by the service's address, which needs
// the whole way to work: pod, routes, kube-proxy.
func (c *Cluster) waitDNS(ctx context.Context) error {
	server := netip.AddrPortFrom(c.net.dns()[0], 53).String()
	for _, node := range c.Nodes {
		resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return node.DialContext(ctx, network, server)
		}}
		err := poll(ctx, "DNS on "+node.Name, func(ctx context.Context) error {
			// A query from before the service was there is lost.
			ctx, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			_, err := resolver.LookupHost(ctx, "kubernetes.default.svc.cluster.local.")
			return err
		})
		if err != nil {
			return fmt.Errorf("%w; pods: %s; %s", err, c.podStates(ctx), node.processes["kubelet"].logTail())
		}
	}
	return nil
}

// podStates says in short what kube-system's pods are waiting for.
func (c *Cluster) podStates(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), pollInterval*20)
	defer cancel()
	out, err := c.Kubectl(ctx, "-n", "kube-system", "get", "pods,events")
	if err != nil {
		return err.Error()
	}
	return string(out)
}
