package balance

import (
	"container/list"
	"net/netip"
	"slices"
	"time"

	"github.com/weirmesh/weir/proxy/route"
)

const (
	// sweepInterval is how often what was not used since the last time is forgotten.
	sweepInterval = 30 * time.Second

	// spareEndpoints may be listed, and as many again as are in use for long, before
	// that is done earlier: lists that come and go fast must not pile up.
	spareEndpoints = 16_384

	// maxClients is of how many clients a backend keeps their endpoint or their rate.
	maxClients = 4096
)

// endpoint is what is known of an address.
type endpoint struct {
	addr   netip.AddrPort
	refs   int // lists it is in
	active int // requests under way

	fresh bool          // it came to a backend that had others
	since time.Duration // when

	failures  int           // consecutive ones
	ejections int           // how often it was set aside, forgotten as time passes
	asideTill time.Duration // when it is back
}

// groupKey tells backends apart. Ports of one Service differ in the port of their
// endpoints, or lead to the same ones.
type groupKey struct {
	service string
	port    uint16 // of the first endpoint; 0: there is none
}

// group is what is known of a backend.
type group struct {
	lists []*endpointList
	known bool // it has had endpoints

	rounds round
	sticky recent[netip.Addr, stuck]

	held      [resources]int
	retries   int
	bucket    bucket
	buckets   recent[Client, bucket]
	keepUntil time.Duration // when sticky and the buckets mean nothing any more
}

// listKey is a list by its place in memory, of a Service.
type listKey struct {
	service string
	first   *route.Endpoint
	n       int
}

type listUse struct {
	list *endpointList
	used bool // since the last sweep
	old  bool // it was there before that
}

// endpointList is the endpoints of a backend at one time. All lists of a backend
// with the same content share it.
type endpointList struct {
	group     *group
	content   []route.Endpoint
	endpoints []*endpoint
	refs      int      // places in memory
	order     []int32  // indexes by address, see byAddress
	table     []uint16 // of Maglev, places in order; see hashed
}

// list finds the backend's list, or learns it. There is at least one endpoint.
func (b *Balancer) list(backend *route.Backend, now time.Duration) *endpointList {
	key := listKey{backend.Service, &backend.Endpoints[0], len(backend.Endpoints)}
	if use := b.lists[key]; use != nil {
		use.used = true
		return use.list
	}
	g := b.group(backend)
	i := slices.IndexFunc(g.lists, func(l *endpointList) bool { return slices.Equal(l.content, backend.Endpoints) })
	if i < 0 {
		i = len(g.lists)
		g.lists = append(g.lists, b.learn(g, backend.Endpoints, now))
	}
	l := g.lists[i]
	l.refs++
	b.lists[key] = &listUse{list: l, used: true}
	if b.added += key.n; b.added > b.inUse+spareEndpoints {
		b.sweep(now)
	}
	return l
}

// learn makes a list of a group's. An endpoint that no list has had for a while is
// new.
func (b *Balancer) learn(g *group, content []route.Endpoint, now time.Duration) *endpointList {
	l := &endpointList{group: g, content: content, endpoints: make([]*endpoint, len(content))}
	for i := range content {
		addr := content[i].Addr
		e := b.endpoints[addr]
		if e == nil {
			e = &endpoint{addr: addr, fresh: g.known, since: now}
			b.endpoints[addr] = e
		}
		e.refs++
		l.endpoints[i] = e
	}
	g.known = true
	return l
}

func (b *Balancer) group(backend *route.Backend) *group {
	key := groupKey{service: backend.Service}
	if len(backend.Endpoints) > 0 {
		key.port = backend.Endpoints[0].Addr.Port()
	}
	g := b.groups[key]
	if g == nil {
		g = &group{}
		b.groups[key] = g
	}
	return g
}

// sweep forgets the lists that were not used since the last time, and what nothing
// refers to any more.
func (b *Balancer) sweep(now time.Duration) {
	b.nextSweep = now + sweepInterval
	b.added, b.inUse = 0, 0
	for key, use := range b.lists {
		if use.used {
			if use.old {
				b.inUse += key.n
			}
			use.used, use.old = false, true
			continue
		}
		delete(b.lists, key)
		if use.list.refs--; use.list.refs == 0 {
			use.list.forget()
		}
	}
	for addr, e := range b.endpoints {
		if e.refs == 0 && e.active == 0 && e.asideTill <= now {
			delete(b.endpoints, addr)
		}
	}
	for key, g := range b.groups {
		if len(g.lists) == 0 && g.retries == 0 && g.held == [resources]int{} && g.keepUntil <= now {
			delete(b.groups, key)
		}
	}
}

func (l *endpointList) forget() {
	for _, e := range l.endpoints {
		e.refs--
	}
	g := l.group
	g.lists = slices.DeleteFunc(g.lists, func(other *endpointList) bool { return other == l })
	if g.rounds.list == l {
		g.rounds.list = nil
	}
}

// byAddress is the list's indexes in the order of addresses, which stays when others
// come and go.
func (l *endpointList) byAddress() []int32 {
	if l.order == nil {
		l.order = make([]int32, len(l.endpoints))
		for i := range l.order {
			l.order[i] = int32(i)
		}
		slices.SortFunc(l.order, func(i, j int32) int { return l.endpoints[i].addr.Compare(l.endpoints[j].addr) })
	}
	return l.order
}

// search is the place in byAddress of the first address that is not before addr,
// and whether it is that one.
func (l *endpointList) search(addr netip.AddrPort) (int, bool) {
	return slices.BinarySearchFunc(l.byAddress(), addr, func(i int32, addr netip.AddrPort) int {
		return l.endpoints[i].addr.Compare(addr)
	})
}

// recent keeps the values of the maxClients keys that were used last.
type recent[K comparable, V any] struct {
	entries map[K]*list.Element
	order   list.List // of *recentEntry, that which was used last first
}

type recentEntry[K, V any] struct {
	key   K
	value V
}

// at is the value of a key, zero at first.
func (r *recent[K, V]) at(key K) *V {
	if element := r.entries[key]; element != nil {
		r.order.MoveToFront(element)
		return &element.Value.(*recentEntry[K, V]).value
	}
	if r.entries == nil {
		r.entries = map[K]*list.Element{}
	}
	if len(r.entries) >= maxClients {
		delete(r.entries, r.order.Remove(r.order.Back()).(*recentEntry[K, V]).key)
	}
	entry := &recentEntry[K, V]{key: key}
	r.entries[key] = r.order.PushFront(entry)
	return &entry.value
}
