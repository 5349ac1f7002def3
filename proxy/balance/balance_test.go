package balance

import (
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/weirmesh/weir/proxy/route"
)

func endpoints(n int) []route.Endpoint {
	var out []route.Endpoint
	for i := range n {
		out = append(out, route.Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 80)})
	}
	return out
}

// TestPickProperties: whatever is open, the pick is one of the endpoints, none
// that was tried, and never one with more open connections than both of the two
// that were looked at.
func TestPickProperties(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		var drawn []int
		b := Balancer{Random: func(n int) int {
			x := r.IntN(n)
			drawn = append(drawn, x)
			return x
		}}
		list := endpoints(1 + r.IntN(8))
		for range r.IntN(30) {
			b.Pick(list, nil)
		}
		var tried []netip.AddrPort
		var left []route.Endpoint
		for _, e := range list {
			if r.IntN(3) == 0 {
				tried = append(tried, e.Addr)
			} else {
				left = append(left, e)
			}
		}
		open := map[netip.AddrPort]int{}
		for _, e := range list {
			open[e.Addr] = b.Open(e.Addr)
		}
		drawn = nil
		got, ok := b.Pick(list, tried)
		if ok != (len(left) > 0) {
			t.Fatalf("picked: %t, with %d left", ok, len(left))
		}
		if !ok {
			continue
		}
		least := open[got.Addr]
		if len(left) > 1 {
			i, j := drawn[0], drawn[1]
			if j >= i {
				j++
			}
			if i == j {
				t.Fatal("looked at one endpoint twice")
			}
			least = min(open[left[i].Addr], open[left[j].Addr])
		}
		if open[got.Addr] != least || b.Open(got.Addr) != open[got.Addr]+1 {
			t.Fatalf("picked one with %d open, %d was possible; now %d", open[got.Addr], least, b.Open(got.Addr))
		}
		for _, a := range tried {
			if a == got.Addr {
				t.Fatalf("%s was tried before", a)
			}
		}
	}
}

// TestSpread: two choices keep the fullest endpoint close to the mean; one choice
// would leave it some 30 % over.
func TestSpread(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	b := Balancer{Random: r.IntN}
	list := endpoints(20)
	const perEndpoint = 100
	for range perEndpoint * len(list) {
		b.Pick(list, nil)
	}
	for _, e := range list {
		if n := b.Open(e.Addr); n < perEndpoint-5 || n > perEndpoint+5 {
			t.Errorf("%s has %d, want about %d", e.Addr, n, perEndpoint)
		}
	}
}

func TestDoneForgets(t *testing.T) {
	var b Balancer
	list := endpoints(3)
	var picked []netip.AddrPort
	for range 100 {
		e, _ := b.Pick(list, nil)
		picked = append(picked, e.Addr)
	}
	for _, a := range picked {
		b.Done(a)
	}
	if len(b.open) != 0 {
		t.Errorf("still counted: %v", b.open)
	}
}

func BenchmarkPick(b *testing.B) {
	var x Balancer
	list := endpoints(1000)
	b.ReportAllocs()
	for b.Loop() {
		e, _ := x.Pick(list, nil)
		x.Done(e.Addr)
	}
}
