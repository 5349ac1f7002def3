package cluster

import (
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/weirmesh/weir/agent/decide"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// Peers are the pods of all nodes. A destination has of them what its endpoints' pods
// are one of.

func (s *Store) setPeer(p *model.Peer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k := peerKey(p); !same(s.view.peers[k], p) {
		s.changePeer(k, p)
	}
}

func (s *Store) dropPeer(k key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.view.peers[k] != nil {
		s.changePeer(k, nil)
	}
}

// changePeer puts next in the place of the pod of that name, which may have other
// addresses now; nil is none. The lock must be held.
func (s *Store) changePeer(k key, next *model.Peer) {
	old := s.view.peers[k]
	shown := shows(old) || shows(next)
	if old != nil {
		s.unindexPeer(old)
		delete(s.view.peers, k)
	}
	if next != nil {
		for _, addr := range next.Addresses { // that one had which has ended, mostly
			shown = shown || shows(s.byAddress[addr])
		}
		s.view.peers[k] = next
		s.indexPeer(next)
	}
	s.touchPeer(k.namespace + "/" + k.name)
	if shown {
		s.touchAddresses()
	}
}

func (s *Store) replacePeers(peers map[key]*model.Peer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listed[kindPeers] = true
	if same(s.view.peers, peers) {
		return
	}
	s.view.peers = peers
	s.reindexPeers()
	s.touchAll()
	s.signal()
}

func (s *Store) reindexPeers() {
	s.byAddress = map[netip.Addr]*model.Peer{}
	for _, p := range s.view.peers {
		s.indexPeer(p)
	}
}

func (s *Store) indexPeer(p *model.Peer) {
	for _, addr := range p.Addresses {
		s.byAddress[addr] = p
	}
}

// unindexPeer leaves alone an address that is another's by now.
func (s *Store) unindexPeer(p *model.Peer) {
	for _, addr := range p.Addresses {
		if s.byAddress[addr] == p {
			delete(s.byAddress, addr)
		}
	}
}

// SetCaptured says which pods ("namespace/name") are captured, and their addresses, where
// no API server does: of a directory.
func (s *Store) SetCaptured(pods map[string][]netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.captured = pods
	for k, p := range s.view.peers {
		if other := s.withCaptured(p); !same(p, other) {
			s.changePeer(k, other)
		}
	}
}

// withCaptured is a pod of a directory as SetCaptured has it. The lock must be held.
func (s *Store) withCaptured(p *model.Peer) *model.Peer {
	out := *p
	addresses, captured := s.captured[p.ID()]
	if out.Captured = captured; captured {
		out.Addresses = addresses
	}
	return &out
}

// touchPeer notes a change of a pod. It matters to destinations where the pod is an
// endpoint. The lock must be held.
func (s *Store) touchPeer(id string) {
	namespace, _, _ := strings.Cut(id, "/")
	for _, slice := range s.byEndpoint[id] {
		k := key{namespace, slice}
		if other, name, ok := strings.Cut(slice, "/"); ok {
			k = key{other, name}
		}
		s.touch(key{k.namespace, s.view.slices[k].Service})
	}
	if len(s.byEndpoint[id]) > 0 {
		s.signal()
	} else {
		s.changes.Add(1)
	}
}

// touchAddresses notes that pods' own addresses may stand for something else than they
// did. The lock must be held.
func (s *Store) touchAddresses() {
	s.revisions.last++
	s.revisions.addresses = s.revisions.last
	s.signal()
}

// shows reports whether a pod has to show who it is, somewhere.
func shows(p *model.Peer) bool { return p != nil && p.Captured && len(p.Addresses) > 0 }

// inSlice is how a slice is noted of a pod: by its name, or of another namespace by that
// and its name.
func inSlice(pod string, slice key) string {
	if namespace, _, _ := strings.Cut(pod, "/"); namespace != slice.namespace {
		return slice.namespace + "/" + slice.name
	}
	return slice.name
}

// indexEndpoints notes whose pods are in a slice.
func (s *Store) indexEndpoints(slice key) {
	for _, e := range s.view.slices[slice].Endpoints {
		if name := inSlice(e.Pod, slice); e.Pod != "" && !slices.Contains(s.byEndpoint[e.Pod], name) {
			s.byEndpoint[e.Pod] = append(s.byEndpoint[e.Pod], name)
		}
	}
}

func (s *Store) unindexEndpoints(slice key) {
	for _, e := range s.view.slices[slice].Endpoints {
		name := inSlice(e.Pod, slice)
		rest := slices.DeleteFunc(s.byEndpoint[e.Pod], func(s string) bool { return s == name })
		if s.byEndpoint[e.Pod] = rest; len(rest) == 0 {
			delete(s.byEndpoint, e.Pod)
		}
	}
}

// Workload is "namespace/name" of what a pod is one of; empty: unknown.
func (s *Store) Workload(namespace, name string) string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.workload(key{namespace, name})
}

// workload is Workload; the caller holds mu.
func (s *Store) workload(k key) string {
	p, ok := s.view.peers[k]
	if !ok {
		return ""
	}
	return k.namespace + "/" + p.Workload
}

// Callers is "namespace/name" of what the pods at those addresses are one of, where
// that is known. A pod in its node's network has no address of its own.
func (s *Store) Callers(addrs map[netip.Addr]string) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for addr := range addrs {
		if p := s.byAddress[addr]; p != nil {
			addrs[addr] = p.Namespace + "/" + p.Workload
		}
	}
}

// nameEndpoints fills in what endpoints' pods are one of, and whom they have to show to
// be; the caller holds mu.
func (s *Store) nameEndpoints(endpoints []route.Endpoint) {
	demands := s.plainDemands()
	for i := range endpoints {
		e := &endpoints[i]
		namespace, name, _ := strings.Cut(e.Pod, "/")
		if p := s.view.peers[key{namespace, name}]; p != nil {
			e.Workload = shared(p.Namespace + "/" + p.Workload)
			e.Identity = s.identity(p, e.Addr.Port(), demands)
		}
	}
}

// identity is whom a pod has to show to be on a port, nobody where plaintext is expected
// by demands, which are plainDemands. Of a pod of another node the labels are not known:
// there those policies count that select none. The caller holds mu.
func (s *Store) identity(p *model.Peer, port uint16, demands []model.PeerAuthentication) string {
	if len(demands) > 0 {
		mode, byPort, _ := decide.Peers(s.Root, p.Namespace, s.labels(p.Namespace, p.Name, "", nil), demands)
		if other, ok := byPort[port]; ok {
			mode = other
		}
		if mode == route.Disable {
			return ""
		}
	}
	return shared(s.Reach.Identity(*p, port))
}

// plainDemands are all PeerAuthentications, if one of them expects plaintext: else it need
// not be asked which of them is about a pod. The caller holds mu.
func (s *Store) plainDemands() []model.PeerAuthentication {
	all := slices.Collect(maps.Values(s.view.peerAuth))
	if !slices.ContainsFunc(all, model.PeerAuthentication.ExpectsPlaintext) {
		return nil
	}
	return all
}

// pod is what an address stands for that is no Service's; the caller holds mu.
func (s *Store) pod(addr netip.AddrPort) route.Destination {
	if p := s.byAddress[addr.Addr().Unmap()]; p != nil {
		return route.Destination{Identity: s.identity(p, addr.Port(), s.plainDemands())}
	}
	return route.Destination{}
}
