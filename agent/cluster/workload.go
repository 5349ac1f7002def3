package cluster

import (
	"net/netip"
	"strings"

	"github.com/weirmesh/weir/proxy/route"
)

// What a pod is one of is known of the pods in the Store, those of this node.

// Workload is "namespace/name" of what a pod is one of; empty: unknown.
func (s *Store) Workload(namespace, name string) string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.workload(key{namespace, name})
}

// workload is Workload; the caller holds mu.
func (s *Store) workload(k key) string {
	p, ok := s.view.pods[k]
	if !ok {
		return ""
	}
	return k.namespace + "/" + p.pod.Workload
}

// Callers is "namespace/name" of what the pods at those addresses are one of, where
// that is known. A pod in its node's network has no address of its own.
func (s *Store) Callers(addrs map[netip.Addr]string) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for k, p := range s.view.pods {
		if p.pod.HostNetwork || p.pod.Phase.Finished() {
			continue
		}
		for _, addr := range p.pod.Addresses {
			if _, asked := addrs[addr]; asked {
				addrs[addr] = s.workload(k)
			}
		}
	}
}

// nameWorkloads fills in what endpoints' pods are one of; the caller holds mu.
func (s *Store) nameWorkloads(endpoints []route.Endpoint) {
	for i := range endpoints {
		namespace, name, _ := strings.Cut(endpoints[i].Pod, "/")
		if w := s.workload(key{namespace, name}); w != "" {
			endpoints[i].Workload = shared(w)
		}
	}
}
