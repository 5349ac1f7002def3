// Package balance picks the endpoint of a request or a connection, as the backend's
// policy says, and keeps the counts that a policy's limits are about.
//
// The default is: of two random endpoints that with fewer requests. This is as good
// as looking at all of them in practice, costs the same for 2 and for 2,000, and
// many proxies that do it do not all run to the same idle pod. Endpoints that fail
// are set aside for a while (eject.go), new ones come to their share slowly
// (choose.go); limits.go admits, counts retries and meters.
//
// What is known of an endpoint is kept by its address, whatever backends it is
// behind; what is known of a backend, by its Service and port (memory.go). Both are
// forgotten some time after they were used last. Pure: it neither dials nor knows
// which endpoints are ready; clock and randomness are fields.
package balance

import (
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"github.com/cespare/xxhash/v2"

	"github.com/weirmesh/weir/proxy/route"
)

// Balancer picks and counts. The zero value is ready for use; its fields may be set
// before the first call. Backends that are handed in, and their lists of endpoints,
// must not be changed afterwards: a list is known by its place in memory.
type Balancer struct {
	// Random returns a number in [0, n); nil: math/rand/v2.
	Random func(n int) int

	// Now is a clock that only goes forward; nil: time.Now.
	Now func() time.Time

	// Ejected, if set, is told of each endpoint that is set aside, and for how long.
	Ejected func(backend *route.Backend, addr netip.AddrPort, how time.Duration)

	mu        sync.Mutex
	epoch     time.Time // of the first call; times below are since then
	nextSweep time.Duration
	endpoints map[netip.AddrPort]*endpoint
	groups    map[groupKey]*group
	lists     map[listKey]*listUse
	added     int // endpoints of the lists that came since the last sweep
	inUse     int // of those that were there before it, and used since the one before
}

// Key is what a choice may depend on.
type Key struct {
	Client netip.Addr // whose request it is
	Hash   uint64     // HashOf the header or cookie the policy names; 0: the request has none
}

// HashOf is the hash for Key, never 0 and the same in every proxy.
func HashOf(value []byte) uint64 { return max(xxhash.Sum64(value), 1) }

// Outcome is how a request, or an attempt to connect, ended for its endpoint.
type Outcome uint8

// The outcomes.
const (
	Unknown        Outcome = iota // nothing that tells of the endpoint
	Success                       // an answer below 500, a connection
	ServerError                   // an answer of 5xx
	ConnectFailure                // no connection
)

// Pick chooses an endpoint of the backend that is not in tried, and counts a
// request to it until Done is called with its address. Endpoints that are set aside
// are chosen only where no other is left. Without any left it is false.
func (b *Balancer) Pick(backend *route.Backend, key Key, tried []netip.AddrPort) (route.Endpoint, bool) {
	if len(backend.Endpoints) == 0 {
		return route.Endpoint{}, false
	}
	now := b.lockNow()
	defer b.mu.Unlock()
	c := choice{b: b, list: b.list(backend, now), policy: policyOf(backend), tried: tried, now: now}
	i := c.choose(key)
	if i < 0 {
		return route.Endpoint{}, false
	}
	c.list.endpoints[i].active++
	return backend.Endpoints[i], true
}

// Done says that a request to addr, counted by Pick, is over, and reports how it
// ended.
func (b *Balancer) Done(backend *route.Backend, addr netip.AddrPort, outcome Outcome) {
	b.report(backend, addr, outcome, 1)
}

// Report says how things go with addr before Done, for what takes long: that a
// connection was made, that a stream's answer began.
func (b *Balancer) Report(backend *route.Backend, addr netip.AddrPort, outcome Outcome) {
	b.report(backend, addr, outcome, 0)
}

func (b *Balancer) report(backend *route.Backend, addr netip.AddrPort, outcome Outcome, ended int) {
	now := b.lockNow()
	var aside time.Duration
	if e := b.endpoints[addr]; e != nil {
		e.active = max(e.active-ended, 0)
		aside = b.judge(e, backend, outcome, now)
	}
	b.mu.Unlock()
	if aside > 0 && b.Ejected != nil {
		b.Ejected(backend, addr, aside)
	}
}

// Active is how many requests to addr are under way.
func (b *Balancer) Active(addr netip.AddrPort) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	if e := b.endpoints[addr]; e != nil {
		return e.active
	}
	return 0
}

// lock locks.
func (b *Balancer) lock() {
	b.mu.Lock()
	if b.endpoints == nil {
		if b.Now == nil {
			start := time.Now()
			b.Now = func() time.Time { return start.Add(time.Since(start)) } // for half of what time.Now takes
		}
		b.epoch = b.Now()
		b.endpoints, b.groups, b.lists = map[netip.AddrPort]*endpoint{}, map[groupKey]*group{}, map[listKey]*listUse{}
		b.nextSweep = sweepInterval
	}
}

// lockNow locks, and tells the time. From time to time it forgets what is not used.
func (b *Balancer) lockNow() time.Duration {
	b.lock()
	now := b.Now().Sub(b.epoch)
	if now >= b.nextSweep {
		b.sweep(now)
	}
	return now
}

func (b *Balancer) random(n int) int {
	if b.Random != nil {
		return b.Random(n)
	}
	return rand.IntN(n)
}

var defaults route.Policy

func policyOf(backend *route.Backend) *route.Policy {
	if backend.Policy == nil {
		return &defaults
	}
	return backend.Policy
}
