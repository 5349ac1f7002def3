// Package cluster is the agent's view of the cluster: one Store in memory, filled
// by one source, read by everything that decides.
//
// A source is an API server (RunAPI: one watch per kind; pods of this node as they are,
// those of all nodes with the few fields that their peers go by) or a directory of the same YAML (RunDir). Either cuts objects down to model
// values on their way in; Kubernetes' own types do not leave this package, which
// also writes events back (Recorder). The Store answers what a pod is (WaitPod)
// and what a destination is (Destination, by way of decide), and says that
// something changed (Changed), not what: readers look again.
//
// The Store holds the last good view for as long as its source is away, and LastGood
// keeps it in a file for an agent that starts meanwhile. It makes no decisions of
// its own and writes nothing but events to the cluster.
package cluster

import (
	"cmp"
	"context"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/weirmesh/weir/agent/decide"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/route"
)

// key names a namespaced object.
type key struct{ namespace, name string }

// routeKey names a route: kinds have names of their own.
type routeKey struct {
	kind route.Kind
	key
}

// view is everything a source knows at one time.
type view struct {
	pods       map[key]compactPod  // of this node
	peers      map[key]*model.Peer // of all nodes
	namespaces map[string]model.Namespace
	services   map[key]model.Service
	slices     map[key]model.EndpointSlice
	routes     map[routeKey]model.Route
	policies   map[key]model.TrafficPolicy
	authz      map[key]model.AuthorizationPolicy
	peerAuth   map[key]model.PeerAuthentication
	zone       string // of this node
}

func newView() view {
	return view{
		pods:       map[key]compactPod{},
		peers:      map[key]*model.Peer{},
		namespaces: map[string]model.Namespace{},
		services:   map[key]model.Service{},
		slices:     map[key]model.EndpointSlice{},
		routes:     map[routeKey]model.Route{},
		policies:   map[key]model.TrafficPolicy{},
		authz:      map[key]model.AuthorizationPolicy{},
		peerAuth:   map[key]model.PeerAuthentication{},
	}
}

// lookupFunc asks past the cache for one pod and its namespace.
type lookupFunc func(ctx context.Context, namespace, name string) (model.Pod, model.Namespace, error)

// Store is the view of the cluster in memory. Its methods are safe for use by
// many goroutines; it has one source. Use NewStore.
type Store struct {
	// Root is Weir's own namespace, whose PeerAuthentications without selector are the
	// whole mesh's. Set it before there is a source.
	Root string

	changed   chan struct{} // see Changed
	podsOther chan struct{} // see PodsChanged
	published chan struct{} // receives after changes of pods, those of Captured too; for the Publisher
	guards    chan struct{} // receives after changes of who may call; for LastGood
	synced    chan struct{} // closed by markSynced
	once      sync.Once
	usable    chan struct{} // closed by markSynced or fallBack
	useOnce   sync.Once
	changes   atomic.Uint64 // how often signal was called

	// Reach is how pods are to be reached; it is set before there is a source.
	Reach decide.Reach

	mu     sync.RWMutex
	view   view
	tables tables // of it
	// listed are the kinds that the source has listed; fellBack: the others are from
	// a file.
	listed   map[string]bool
	fellBack bool
	// Indexes of view, kept with it.
	byClusterIP map[netip.Addr]key  // → service
	byService   index[key]          // service → its slices
	byEndpoint  map[string][]string // pod, "namespace/name" → slices that it is in, see inSlice
	byAddress   map[netip.Addr]*model.Peer
	byParent    index[routeKey] // service → routes that name it
	byTarget    index[key]      // service → policies about it
	revisions   revisions
	waiters     chan struct{} // closed when pods or namespaces change; nil if nobody waits

	lookup   lookupFunc              // nil if there is no API server to ask
	node     string                  // this node's name; empty: there is only one
	addrs    []netip.Addr            // see SetNodeAddresses
	captured map[string][]netip.Addr // pods that the agent itself says are, see SetCaptured
	// impliedNamespaces: a namespace without an object exists and has no labels.
	impliedNamespaces bool
}

// NewStore makes an empty Store for RunAPI or RunDir to fill.
func NewStore() *Store {
	s := &Store{
		changed:     make(chan struct{}, 1),
		podsOther:   make(chan struct{}, 1),
		published:   make(chan struct{}, 1),
		guards:      make(chan struct{}, 1),
		synced:      make(chan struct{}),
		usable:      make(chan struct{}),
		listed:      map[string]bool{},
		view:        newView(),
		byClusterIP: map[netip.Addr]key{},
		byService:   index[key]{},
		byEndpoint:  map[string][]string{},
		byAddress:   map[netip.Addr]*model.Peer{},
		captured:    map[string][]netip.Addr{},
		byParent:    index[routeKey]{},
		byTarget:    index[key]{},
		revisions:   newRevisions(),
	}
	s.tables = newTables(s)
	return s
}

// Changed receives after changes: at least once after the last one, and not once
// for each. It is for a single consumer.
func (s *Store) Changed() <-chan struct{} { return s.changed }

// PodsChanged is Changed for changes that concern what is captured: those of pods
// and namespaces. It too is for a single consumer.
func (s *Store) PodsChanged() <-chan struct{} { return s.podsOther }

// WaitSynced returns once the source has delivered its first full view. Its only
// error is ctx's.
func (s *Store) WaitSynced(ctx context.Context) error {
	select {
	case <-s.synced:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// WaitUsable returns once there is a view to tell proxies of: the source's, or the
// last good one (LastGood). Its only error is ctx's.
func (s *Store) WaitUsable(ctx context.Context) error {
	select {
	case <-s.usable:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Synced reports whether the source has delivered its first full view.
func (s *Store) Synced() bool {
	select {
	case <-s.synced:
		return true
	default:
		return false
	}
}

func (s *Store) markSynced() {
	s.once.Do(func() { close(s.synced) })
	s.markUsable()
}

func (s *Store) markUsable() {
	s.useOnce.Do(func() { close(s.usable) })
	s.signalPods()
}

func (s *Store) signal() {
	s.changes.Add(1)
	notify(s.changed)
}

// signalPods is signal for a change of pods or namespaces.
func (s *Store) signalPods() {
	s.signal()
	notify(s.podsOther)
	notify(s.published)
}

// signalGuards is signal for a change of who may call, and how.
func (s *Store) signalGuards() {
	s.signal()
	notify(s.guards)
}

func notify(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Pods lists the pods of this node (of a directory: all its pods), in no order.
// Until WaitSynced returns the list is not complete, and a pod that WaitPod got
// from the API server itself may be in it only later.
func (s *Store) Pods() []model.Pod {
	s.mu.RLock()
	defer s.mu.RUnlock()
	pods := make([]model.Pod, 0, len(s.view.pods))
	for _, p := range s.view.pods {
		pods = append(pods, p.expand())
	}
	return pods
}

// Pod finds a pod of Pods: the one that the container runtime calls uid, as WaitPod.
func (s *Store) Pod(namespace, name, uid string) (model.Pod, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	known, ok := s.view.pods[key{namespace, name}]
	if !ok || !known.pod.HasUID(uid) {
		return model.Pod{}, false
	}
	return known.expand(), true
}

// Namespace returns a namespace; one that is not known has no labels.
func (s *Store) Namespace(name string) model.Namespace {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if ns, ok := s.view.namespaces[name]; ok {
		return ns
	}
	return model.Namespace{Name: name}
}

// Destination says what a connection to addr stands for, from a pod of this node
// in a namespace: the ready endpoints of a Service, the routes that govern it and the
// policy about it, if addr is a TCP port at one of its ClusterIPs; of a pod, whom it has
// to show to be; else the zero Destination. Beside it is which routes and policies these
// are.
func (s *Store) Destination(addr netip.AddrPort, clientNamespace string) (route.Destination, []model.Governing) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.destination(addr, clientNamespace)
}

// Inbound is what holds for callers of a pod with these addresses, by the port that
// they reach, and which policies that is of (decide.Inbound).
func (s *Store) Inbound(addrs []netip.Addr) (map[uint16]*route.Policy, []model.Governing) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return decide.Inbound(addrs, slices.Collect(maps.Values(s.view.policies)), s.policies, s.service)
}

// Authorization are the policies that govern a pod of this node, and which these are
// (decide.Authorization). Labels are those that it had when it was captured, nil if they
// are not known: they count while the pod of that UID is not in the view.
func (s *Store) Authorization(namespace, name, uid string, labels map[string]string) ([]authz.Policy, []model.Governing) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return decide.Authorization(namespace, s.labels(namespace, name, uid, labels), slices.Collect(maps.Values(s.view.authz)))
}

// Peers is what is demanded of the callers of a pod of this node, on any port and by port
// where that is something else, and which policies say so (decide.Peers). Labels are as for
// Authorization.
func (s *Store) Peers(namespace, name, uid string, labels map[string]string) (route.PeerMode, map[uint16]route.PeerMode, []model.Governing) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return decide.Peers(s.Root, namespace, s.labels(namespace, name, uid, labels), slices.Collect(maps.Values(s.view.peerAuth)))
}

// Probes are those that kubelet asks a pod of this node, none of one that is not in the
// view, and the addresses that it asks from.
func (s *Store) Probes(namespace, name, uid string) ([]route.Probe, []netip.Addr) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if c, ok := s.view.pods[key{namespace, name}]; ok && c.pod.HasUID(uid) {
		return c.pod.Probes, s.addrs
	}
	return nil, s.addrs
}

// SetNodeAddresses says where the node's own connections to its pods come from.
func (s *Store) SetNodeAddresses(addrs []netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.Equal(s.addrs, addrs) {
		s.addrs = addrs
		s.signal()
	}
}

// labels are those of a pod of this node, or else those that are given; the caller holds
// mu.
func (s *Store) labels(namespace, name, uid string, otherwise map[string]string) map[string]string {
	if c, ok := s.view.pods[key{namespace, name}]; ok && c.pod.HasUID(uid) {
		return model.Pod{Labels: fromPairs(c.labels)}.KnownLabels()
	}
	return otherwise
}

// destination is Destination; the caller holds mu.
func (s *Store) destination(addr netip.AddrPort, clientNamespace string) (route.Destination, []model.Governing) {
	svc, ok := s.byClusterIP[addr.Addr().Unmap()]
	if !ok {
		return s.pod(addr), nil
	}
	routes := make([]model.Route, 0, len(s.byParent[svc]))
	for k := range s.byParent[svc] {
		routes = append(routes, s.view.routes[k])
	}
	client := decide.Client{Namespace: clientNamespace, Node: s.node, Zone: s.view.zone}
	d := decide.Destination(s.view.services[svc], routes, s.service, s.policies, client, addr)
	s.nameEndpoints(d.Endpoints)
	if d.Routes != nil {
		for i := range d.Routes.Rules {
			for j := range d.Routes.Rules[i].Backends {
				s.nameEndpoints(d.Routes.Rules[i].Backends[j].Backend.Endpoints)
			}
		}
	}
	return d, decide.Governing(d, s.view.services[svc], addr.Port(), routes, s.policies)
}

// Known are all routes and policies, by their full name, with their generation.
func (s *Store) Known() map[string]int64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := make(map[string]int64, len(s.view.routes)+len(s.view.policies)+len(s.view.authz)+len(s.view.peerAuth))
	for _, r := range s.view.routes {
		out[r.FullName()] = r.Generation
	}
	for _, p := range s.view.policies {
		out[p.FullName()] = p.Generation
	}
	for _, p := range s.view.authz {
		out[p.FullName()] = p.Generation
	}
	for _, p := range s.view.peerAuth {
		out[p.FullName()] = p.Generation
	}
	return out
}

// service is a decide.Lookup; the caller holds mu.
func (s *Store) service(namespace, name string) (model.Service, []model.EndpointSlice, bool) {
	k := key{namespace, name}
	svc, ok := s.view.services[k]
	if !ok {
		return model.Service{}, nil, false
	}
	endpoints := make([]model.EndpointSlice, 0, len(s.byService[k]))
	for slice := range s.byService[k] {
		endpoints = append(endpoints, s.view.slices[slice])
	}
	return svc, endpoints, true
}

// policies is a decide.Policies; the caller holds mu.
func (s *Store) policies(namespace, name string) []model.TrafficPolicy {
	var out []model.TrafficPolicy
	for k := range s.byTarget[key{namespace, name}] {
		out = append(out, s.view.policies[k])
	}
	return out
}

// apiServer is the Service that every cluster has.
var apiServer = key{"default", "kubernetes"}

// Served returns a TCP port at a ClusterIP of a Service that has endpoints, of
// each family that there is one of; the API server's where it is one.
func (s *Store) Served() []netip.AddrPort {
	s.mu.RLock()
	defer s.mu.RUnlock()
	names := slices.SortedFunc(maps.Keys(s.view.services), func(a, b key) int {
		return cmp.Or(strings.Compare(a.namespace, b.namespace), strings.Compare(a.name, b.name))
	})
	if _, ok := s.view.services[apiServer]; ok {
		names = slices.Insert(names, 0, apiServer)
	}
	var out []netip.AddrPort
	for _, name := range names {
		svc := s.view.services[name]
		for _, ip := range svc.ClusterIPs {
			for _, port := range svc.Ports {
				addr := netip.AddrPortFrom(ip, port.Port)
				have := slices.ContainsFunc(out, func(o netip.AddrPort) bool { return o.Addr().Is4() == ip.Is4() })
				if have {
					continue
				}
				if d, _ := s.destination(addr, ""); len(d.Endpoints) > 0 {
					out = append(out, addr)
				}
			}
		}
	}
	return out
}

// same reports whether an update changes nothing: most of those to pods are to
// fields the model leaves out.
func same[T any](a, b T) bool { return reflect.DeepEqual(a, b) }
