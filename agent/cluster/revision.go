package cluster

import "net/netip"

// A destination is looked at again after every change of the cluster, by every proxy
// that uses it, and nearly always it is what it was: of a thousand Services a proxy
// uses ten. So the Store numbers its changes and notes which Services each is about.

// revisions are the numbers of the last changes.
type revisions struct {
	last      uint64
	any       uint64         // that may make any destination another
	services  uint64         // of a Service: an address that was none's may be one's since
	addresses uint64         // of pods that have to show who they are, at their own addresses
	of        map[key]uint64 // of a Service, its slices, the policies about it, or the routes that name it
}

func newRevisions() revisions { return revisions{last: 1, any: 1, of: map[key]uint64{}} }

// touch notes a change about a Service; the lock must be held. One that is not there
// is no destination, and no backend, whatever else there is about it.
func (s *Store) touch(service key) {
	s.revisions.last++
	if _, ok := s.view.services[service]; ok {
		s.revisions.of[service] = s.revisions.last
	}
}

// touchService notes a change of a Service itself, which is there by now.
func (s *Store) touchService(service key) {
	s.touch(service)
	s.revisions.services = s.revisions.last
}

// touchAll notes a change that may be about any Service. It counts for more than all
// that is noted of single ones.
func (s *Store) touchAll() {
	s.revisions.last++
	s.revisions.any = s.revisions.last
	clear(s.revisions.of)
}

// Revision is another whenever Destination may be another, for any client. It is
// never 0, and cheap.
func (s *Store) Revision(addr netip.AddrPort) uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r := &s.revisions
	service, ok := s.byClusterIP[addr.Addr().Unmap()]
	if !ok {
		return max(r.any, r.services, r.addresses)
	}
	revision := max(r.any, r.of[service])
	for k := range s.byParent[service] {
		for target := range s.view.routes[k].Targets() {
			revision = max(revision, r.of[key{target.Namespace, target.Name}])
		}
	}
	return revision
}
