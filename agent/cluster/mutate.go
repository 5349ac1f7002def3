package cluster

import (
	"maps"
	"net/netip"

	"github.com/weirmesh/weir/agent/api/v1alpha1"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// The kinds that a source lists one by one.
const (
	kindPods       = "pods"
	kindPeers      = "pods of all nodes"
	kindNamespaces = "namespaces"
	kindServices   = "services"
	kindSlices     = "endpointslices"
	kindNodes      = "nodes"
	kindHTTPRoutes = "httproutes"
	kindGRPCRoutes = "grpcroutes"
	kindTCPRoutes  = "tcproutes"
	kindPolicies   = v1alpha1.TrafficPolicyResource
	kindAuthz      = v1alpha1.AuthorizationPolicyResource
	kindPeerAuth   = v1alpha1.PeerAuthenticationResource

	kinds = 12
)

// routeKinds are the kinds of routes, each a list of its own.
var routeKinds = map[route.Kind]string{
	route.HTTPRoute: kindHTTPRoutes, route.GRPCRoute: kindGRPCRoutes, route.TCPRoute: kindTCPRoutes,
}

// wake ends the wait of those in WaitPod. The lock must be held.
func (s *Store) wake() {
	if s.waiters != nil {
		close(s.waiters)
		s.waiters = nil
	}
}

func (s *Store) setPod(p compactPod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := podKey(p)
	old, known := s.view.pods[k]
	if known && same(old, p) {
		return
	}
	s.view.pods[k] = p
	s.wake()
	if old.pod.Captured = p.pod.Captured; known && same(old, p) {
		notify(s.published) // nothing is to be captured or told otherwise: it is said that it was
		return
	}
	s.podsOtherwise()
}

// podsOtherwise is signalPods for a change of pods, of whose labels it may be said that
// they expect plaintext. The lock must be held.
func (s *Store) podsOtherwise() {
	if s.plainDemands() != nil {
		s.touchAll()
	}
	s.signalPods()
}

func (s *Store) dropPod(k key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, known := s.view.pods[k]; known {
		delete(s.view.pods, k)
		s.podsOtherwise()
	}
}

func (s *Store) replacePods(pods map[key]compactPod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listed[kindPods] = true
	if !same(s.view.pods, pods) {
		s.view.pods = pods
		s.wake()
		s.podsOtherwise()
	}
}

func (s *Store) resetServices() { s.byClusterIP = map[netip.Addr]key{} }

func (s *Store) indexService(k key) {
	for _, ip := range s.view.services[k].ClusterIPs {
		s.byClusterIP[ip] = k
	}
	s.touchService(k)
}

// unindexService leaves alone an address that is another Service's by now.
func (s *Store) unindexService(k key) {
	for _, ip := range s.view.services[k].ClusterIPs {
		if s.byClusterIP[ip] == k {
			delete(s.byClusterIP, ip)
		}
	}
}

func (s *Store) resetSlices() { s.byService, s.byEndpoint = index[key]{}, map[string][]string{} }

func (s *Store) indexSlice(k key) {
	svc := key{k.namespace, s.view.slices[k].Service}
	s.byService.add(svc, k)
	s.indexEndpoints(k)
	s.touch(svc)
}

func (s *Store) unindexSlice(k key) {
	svc := key{k.namespace, s.view.slices[k].Service}
	s.byService.remove(svc, k)
	s.unindexEndpoints(k)
	s.touch(svc)
}

func (s *Store) resetPolicies() { s.byTarget = index[key]{} }

func (s *Store) indexPolicy(k key) {
	svc := key{k.namespace, s.view.policies[k].Service}
	s.byTarget.add(svc, k)
	s.touch(svc)
}

func (s *Store) unindexPolicy(k key) {
	svc := key{k.namespace, s.view.policies[k].Service}
	s.byTarget.remove(svc, k)
	s.touch(svc)
}

// setZone says where this node is.
func (s *Store) setZone(zone string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.view.zone != zone {
		s.view.zone = zone
		s.touchAll()
		s.signal()
	}
}

// replaceZone takes the list of nodes, which has this one or none.
func (s *Store) replaceZone(zones map[struct{}]string) {
	s.mu.Lock()
	s.listed[kindNodes] = true
	s.mu.Unlock()
	s.setZone(zones[struct{}{}])
}

// replaceRoutes takes the list of one kind.
func (s *Store) replaceRoutes(kind route.Kind, routes map[routeKey]model.Route) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listed[routeKinds[kind]] = true
	all := maps.Clone(s.view.routes)
	maps.DeleteFunc(all, func(k routeKey, _ model.Route) bool { return k.kind == kind })
	maps.Copy(all, routes)
	if same(s.view.routes, all) {
		return
	}
	s.view.routes = all
	s.tables.routes.reindex()
	s.signal()
}

func (s *Store) resetRoutes() { s.byParent = index[routeKey]{} }

func (s *Store) indexRoute(k routeKey) {
	for _, p := range s.view.routes[k].Parents {
		svc := key{p.Namespace, p.Name}
		s.byParent.add(svc, k)
		s.touch(svc)
	}
}

func (s *Store) unindexRoute(k routeKey) {
	for _, p := range s.view.routes[k].Parents {
		svc := key{p.Namespace, p.Name}
		s.byParent.remove(svc, k)
		s.touch(svc)
	}
}

// replace swaps the whole view at once, that of a directory: all its pods are this
// node's.
func (s *Store) replace(v view) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, p := range v.pods {
		v.peers[k] = s.withCaptured(peerOf(p.expand()))
	}
	if same(s.view, v) {
		return
	}
	s.view = v
	s.tables.services.reindex()
	s.tables.slices.reindex()
	s.reindexPeers()
	s.tables.routes.reindex()
	s.tables.policies.reindex()
	s.wake()
	s.touchAll()
	s.signalPods()
}
