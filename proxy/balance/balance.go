// Package balance picks the endpoint of a connection: of two random ones, that
// with fewer open connections. This is as good as looking at all of them in
// practice, costs the same for 2 and for 2,000, and many proxies that do it do
// not all run to the same idle pod.
//
// Connections are counted by the endpoint's address, over all destinations. Pure:
// it neither dials nor knows which endpoints are ready.
package balance

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"

	"github.com/weirmesh/weir/proxy/route"
)

// Balancer counts open connections. The zero value is ready for use.
type Balancer struct {
	// Random returns a number in [0, n); nil: math/rand/v2.
	Random func(n int) int

	mu   sync.Mutex
	open map[netip.AddrPort]int
}

// Pick chooses one of endpoints that is not in tried and counts a connection to
// it until Done is called with its address. Without any left it returns false.
func (b *Balancer) Pick(endpoints []route.Endpoint, tried []netip.AddrPort) (route.Endpoint, bool) {
	if len(tried) > 0 {
		endpoints = slices.DeleteFunc(slices.Clone(endpoints), func(e route.Endpoint) bool {
			return slices.Contains(tried, e.Addr)
		})
	}
	if len(endpoints) == 0 {
		return route.Endpoint{}, false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	chosen := endpoints[0]
	if n := len(endpoints); n > 1 {
		i, j := b.random(n), b.random(n-1)
		if j >= i {
			j++ // two different ones
		}
		chosen = endpoints[i]
		if b.open[endpoints[j].Addr] < b.open[chosen.Addr] {
			chosen = endpoints[j]
		}
	}
	if b.open == nil {
		b.open = map[netip.AddrPort]int{}
	}
	b.open[chosen.Addr]++
	return chosen, true
}

// Done says that a connection to addr, counted by Pick, is over.
func (b *Balancer) Done(addr netip.AddrPort) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.open[addr]--; b.open[addr] <= 0 {
		delete(b.open, addr)
	}
}

// Open is how many connections to addr are counted now.
func (b *Balancer) Open(addr netip.AddrPort) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.open[addr]
}

func (b *Balancer) random(n int) int {
	if b.Random != nil {
		return b.Random(n)
	}
	return rand.IntN(n)
}
