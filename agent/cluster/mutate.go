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

// set puts v at k and reports whether that changed anything.
func set[K comparable, V any](m map[K]V, k K, v V) bool {
	if old, ok := m[k]; ok && same(old, v) {
		return false
	}
	m[k] = v
	return true
}

// drop removes k and reports whether it was there.
func drop[K comparable, V any](m map[K]V, k K) bool {
	_, ok := m[k]
	delete(m, k)
	return ok
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
	if !set(s.view.pods, k, p) {
		return
	}
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
	if drop(s.view.pods, k) {
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

func (s *Store) setNamespace(n model.Namespace) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if set(s.view.namespaces, n.Name, n) {
		s.wake()
		s.signalPods()
	}
}

func (s *Store) dropNamespace(k key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if drop(s.view.namespaces, k.name) {
		s.signalPods()
	}
}

func (s *Store) replaceNamespaces(namespaces map[string]model.Namespace) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listed[kindNamespaces] = true
	if !same(s.view.namespaces, namespaces) {
		s.view.namespaces = namespaces
		s.wake()
		s.signalPods()
	}
}

func (s *Store) setService(svc model.Service) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := key{svc.Namespace, svc.Name}
	if same(s.view.services[k], svc) {
		return
	}
	s.unindexService(k)
	s.view.services[k] = svc
	s.indexService(k)
	s.touchService(k)
	s.signal()
}

func (s *Store) dropService(k key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unindexService(k)
	if drop(s.view.services, k) {
		s.touchAll() // it may have been the backend of any
		s.signal()
	}
}

func (s *Store) replaceServices(services map[key]model.Service) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listed[kindServices] = true
	if same(s.view.services, services) {
		return
	}
	s.view.services = services
	s.reindexServices()
	s.touchAll()
	s.signal()
}

func (s *Store) reindexServices() {
	s.byClusterIP = map[netip.Addr]key{}
	for k := range s.view.services {
		s.indexService(k)
	}
}

func (s *Store) indexService(k key) {
	for _, ip := range s.view.services[k].ClusterIPs {
		s.byClusterIP[ip] = k
	}
}

// unindexService leaves alone an address that is another Service's by now.
func (s *Store) unindexService(k key) {
	for _, ip := range s.view.services[k].ClusterIPs {
		if s.byClusterIP[ip] == k {
			delete(s.byClusterIP, ip)
		}
	}
}

func (s *Store) setSlice(slice model.EndpointSlice) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := key{slice.Namespace, slice.Name}
	if same(s.view.slices[k], slice) {
		return
	}
	s.unindexSlice(k) // its label may name another Service now
	s.view.slices[k] = slice
	s.indexSlice(k)
	s.signal()
}

func (s *Store) dropSlice(k key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unindexSlice(k)
	if drop(s.view.slices, k) {
		s.signal()
	}
}

func (s *Store) replaceSlices(slices map[key]model.EndpointSlice) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listed[kindSlices] = true
	if same(s.view.slices, slices) {
		return
	}
	s.view.slices = slices
	s.reindexSlices()
	s.touchAll()
	s.signal()
}

func (s *Store) reindexSlices() {
	s.byService, s.byEndpoint = map[key]map[key]struct{}{}, map[string][]string{}
	for k := range s.view.slices {
		s.indexSlice(k)
	}
}

func (s *Store) indexSlice(k key) {
	svc := key{k.namespace, s.view.slices[k].Service}
	if s.byService[svc] == nil {
		s.byService[svc] = map[key]struct{}{}
	}
	s.byService[svc][k] = struct{}{}
	s.indexEndpoints(k)
	s.touch(svc)
}

func (s *Store) unindexSlice(k key) {
	svc := key{k.namespace, s.view.slices[k].Service}
	delete(s.byService[svc], k)
	s.unindexEndpoints(k)
	s.touch(svc)
	if len(s.byService[svc]) == 0 {
		delete(s.byService, svc)
	}
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

func (s *Store) setRoute(r model.Route) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := keyOfRoute(r)
	if same(s.view.routes[k], r) {
		return
	}
	s.unindexRoute(k) // it may have other parents now
	s.view.routes[k] = r
	s.indexRoute(k)
	s.signal()
}

func (s *Store) dropRoute(k routeKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unindexRoute(k)
	if drop(s.view.routes, k) {
		s.signal()
	}
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
	s.reindexRoutes()
	s.touchAll()
	s.signal()
}

func (s *Store) reindexRoutes() {
	s.byParent = map[key]map[routeKey]struct{}{}
	for k := range s.view.routes {
		s.indexRoute(k)
	}
}

func (s *Store) indexRoute(k routeKey) {
	for _, p := range s.view.routes[k].Parents {
		svc := key{p.Namespace, p.Name}
		if s.byParent[svc] == nil {
			s.byParent[svc] = map[routeKey]struct{}{}
		}
		s.byParent[svc][k] = struct{}{}
		s.touch(svc)
	}
}

func (s *Store) unindexRoute(k routeKey) {
	for _, p := range s.view.routes[k].Parents {
		svc := key{p.Namespace, p.Name}
		delete(s.byParent[svc], k)
		s.touch(svc)
		if len(s.byParent[svc]) == 0 {
			delete(s.byParent, svc)
		}
	}
}

func (s *Store) setPolicy(p model.TrafficPolicy) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := policyKey(p)
	if same(s.view.policies[k], p) {
		return
	}
	s.unindexPolicy(k) // it may be about another Service now
	s.view.policies[k] = p
	s.indexPolicy(k)
	s.signal()
}

func (s *Store) dropPolicy(k key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unindexPolicy(k)
	if drop(s.view.policies, k) {
		s.signal()
	}
}

func (s *Store) replacePolicies(policies map[key]model.TrafficPolicy) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listed[kindPolicies] = true
	if same(s.view.policies, policies) {
		return
	}
	s.view.policies = policies
	s.reindexPolicies()
	s.touchAll()
	s.signal()
}

func (s *Store) reindexPolicies() {
	s.byTarget = map[key]map[key]struct{}{}
	for k := range s.view.policies {
		s.indexPolicy(k)
	}
}

func (s *Store) indexPolicy(k key) {
	svc := key{k.namespace, s.view.policies[k].Service}
	if s.byTarget[svc] == nil {
		s.byTarget[svc] = map[key]struct{}{}
	}
	s.byTarget[svc][k] = struct{}{}
	s.touch(svc)
}

func (s *Store) unindexPolicy(k key) {
	svc := key{k.namespace, s.view.policies[k].Service}
	delete(s.byTarget[svc], k)
	s.touch(svc)
	if len(s.byTarget[svc]) == 0 {
		delete(s.byTarget, svc)
	}
}

func (s *Store) setAuthz(p model.AuthorizationPolicy) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if set(s.view.authz, authzKey(p), p) {
		s.signalGuards()
	}
}

func (s *Store) dropAuthz(k key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if drop(s.view.authz, k) {
		s.signalGuards()
	}
}

func (s *Store) replaceAuthz(policies map[key]model.AuthorizationPolicy) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listed[kindAuthz] = true
	if !same(s.view.authz, policies) {
		s.view.authz = policies
		s.signalGuards()
	}
}

func (s *Store) setPeerAuth(p model.PeerAuthentication) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if set(s.view.peerAuth, peerAuthKey(p), p) {
		s.touchAll() // it may be about the pods behind any
		s.signalGuards()
	}
}

func (s *Store) dropPeerAuth(k key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if drop(s.view.peerAuth, k) {
		s.touchAll()
		s.signalGuards()
	}
}

func (s *Store) replacePeerAuth(policies map[key]model.PeerAuthentication) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listed[kindPeerAuth] = true
	if !same(s.view.peerAuth, policies) {
		s.view.peerAuth = policies
		s.touchAll()
		s.signalGuards()
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
	s.reindexServices()
	s.reindexSlices()
	s.reindexPeers()
	s.reindexRoutes()
	s.reindexPolicies()
	s.wake()
	s.touchAll()
	s.signalPods()
}
