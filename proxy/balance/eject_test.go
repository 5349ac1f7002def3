package balance

import (
	"net/netip"
	"testing"
	"time"

	"github.com/weirmesh/weir/proxy/route"
)

// aside reports whether the endpoint gets none of many requests.
func aside(t *testing.T, b *Balancer, to *route.Backend, addr netip.AddrPort) bool {
	t.Helper()
	return spread(t, b, to, 200)[addr] == 0
}

// pickOnly picks that one, since all others were tried.
func pickOnly(t *testing.T, b *Balancer, to *route.Backend, addr netip.AddrPort) {
	t.Helper()
	var tried []netip.AddrPort
	for _, e := range to.Endpoints {
		if e.Addr != addr {
			tried = append(tried, e.Addr)
		}
	}
	if got := pick(t, b, to, Key{}, tried...); got != addr {
		t.Fatalf("%s is picked, not %s", got, addr)
	}
}

// TestFiveFailuresInARow, by default, set an endpoint aside for 30 s, whatever the
// algorithm; a success in between makes them begin anew.
func TestFiveFailuresInARow(t *testing.T) {
	for _, algorithm := range algorithms {
		for _, outcome := range []Outcome{ServerError, ConnectFailure} {
			b, c := newBalancer()
			var told []time.Duration
			b.Ejected = func(of *route.Backend, addr netip.AddrPort, how time.Duration) {
				if of.Service != "shop/cart" || addr != of.Endpoints[3].Addr {
					t.Errorf("%s of %s is set aside", addr, of.Service)
				}
				told = append(told, how)
			}
			to := backend(10, route.Policy{Balance: algorithm})
			bad := to.Endpoints[3].Addr
			if aside(t, b, to, bad) {
				t.Fatal("it gets nothing from the first")
			}
			fail(t, b, to, bad, 4, outcome)
			fail(t, b, to, bad, 1, Success)
			fail(t, b, to, bad, 4, outcome)
			fail(t, b, to, bad, 10, Unknown)
			if aside(t, b, to, bad) || len(told) != 0 {
				t.Fatalf("algorithm %d: four in a row set it aside", algorithm)
			}
			fail(t, b, to, bad, 4, outcome)
			pickOnly(t, b, to, bad)
			b.Done(to, bad, outcome)
			if !aside(t, b, to, bad) || len(told) != 1 || told[0] != 30*time.Second {
				t.Fatalf("algorithm %d: five in a row do not set it aside: %v", algorithm, told)
			}
			c.pass(30*time.Second - 1)
			if !aside(t, b, to, bad) {
				t.Fatalf("algorithm %d: it is back too early", algorithm)
			}
			c.pass(1)
			if aside(t, b, to, bad) {
				t.Fatalf("algorithm %d: it does not come back", algorithm)
			}
		}
	}
}

// TestEjectionAsThePolicySays: after that many failures, for that long, or never.
func TestEjectionAsThePolicySays(t *testing.T) {
	b, c := newBalancer()
	to := backend(10, route.Policy{Ejection: route.Ejection{Failures: 2, Base: 7 * time.Second}})
	bad := to.Endpoints[0].Addr
	spread(t, b, to, 1)
	fail(t, b, to, bad, 2, ServerError)
	if !aside(t, b, to, bad) {
		t.Error("two failures do not set it aside")
	}
	off := *to
	off.Policy = &route.Policy{Ejection: route.Ejection{Failures: -1}}
	if aside(t, b, &off, bad) {
		t.Error("a policy that sets none aside obeys another's")
	}
	c.pass(7 * time.Second)
	if aside(t, b, to, bad) {
		t.Error("it is not back after its time")
	}
	fail(t, b, &off, bad, 100, ServerError)
	if aside(t, b, to, bad) {
		t.Error("it is set aside where nothing should be")
	}
}

// TestEjectionsGrow: each takes longer, up to 300 s, and what was long ago is
// forgotten.
func TestEjectionsGrow(t *testing.T) {
	b, c := newBalancer()
	var last time.Duration
	b.Ejected = func(_ *route.Backend, _ netip.AddrPort, how time.Duration) { last = how }
	to := backend(10, route.Policy{})
	bad := to.Endpoints[0].Addr
	for i := 1; i <= 15; i++ {
		spread(t, b, to, 1)
		fail(t, b, to, bad, 5, ServerError)
		if want := min(time.Duration(i)*30, 300) * time.Second; last != want {
			t.Fatalf("time %d is %s, want %s", i, last, want)
		}
		// Those that were under way change nothing.
		fail(t, b, to, bad, 50, ServerError)
		fail(t, b, to, bad, 1, Success)
		for left := last; left > 0; left -= 10 * time.Second {
			c.pass(10 * time.Second)
			spread(t, b, to, 5) // it is remembered for as long as the backend is in use
		}
	}
	for range 13 * 3 {
		c.pass(10 * time.Second)
		spread(t, b, to, 5)
	}
	fail(t, b, to, bad, 5, ServerError)
	if want := 90 * time.Second; last != want {
		t.Errorf("390 s after 15 times, one takes %s, want %s", last, want)
	}
	long := backend(2, route.Policy{Ejection: route.Ejection{Base: 20 * time.Minute}})
	long.Service, long.Endpoints = "shop/other", endpoints(100, 2)
	spread(t, b, long, 1)
	fail(t, b, long, long.Endpoints[0].Addr, 5, ServerError)
	if last != 20*time.Minute {
		t.Errorf("a base of 20 minutes is %s", last)
	}
}

// TestEjectionIsRemembered by an endpoint that leaves a list and comes back.
func TestEjectionIsRemembered(t *testing.T) {
	b, c := newBalancer()
	to := backend(3, route.Policy{Ejection: route.Ejection{Base: 5 * time.Minute}})
	bad := to.Endpoints[0].Addr
	spread(t, b, to, 1)
	fail(t, b, to, bad, 5, ServerError)
	for range 8 {
		c.pass(35 * time.Second)
		spread(t, b, with(to, endpoints(1, 3)), 3)
	}
	if !aside(t, b, to, bad) {
		t.Error("it is as if nothing had been")
	}
	c.pass(20 * time.Second)
	if aside(t, b, to, bad) {
		t.Error("it is not back after its time")
	}
}

// TestNoMoreThanHalf are set aside by default, never more than the policy says, and
// never all.
func TestNoMoreThanHalf(t *testing.T) {
	for _, test := range []struct{ endpoints, percent, want int }{
		{1, 0, 0}, {2, 0, 1}, {3, 0, 1}, {10, 0, 5}, {11, 0, 5},
		{10, 10, 1}, {10, 19, 1}, {9, 10, 0}, {1, 100, 0}, {2, 100, 1}, {10, 100, 9},
	} {
		b, c := newBalancer()
		n := 0
		b.Ejected = func(*route.Backend, netip.AddrPort, time.Duration) { n++ }
		to := backend(test.endpoints, route.Policy{Ejection: route.Ejection{MaxPercent: test.percent}})
		spread(t, b, to, 1)
		for _, e := range to.Endpoints {
			fail(t, b, to, e.Addr, 20, ServerError)
		}
		if got := spread(t, b, to, 300); n != test.want || len(got) != test.endpoints-n {
			t.Errorf("%d of %d are set aside, at most %d %%; %d get requests", n, test.endpoints, test.percent, len(got))
		}
		// When there is room again, the next failure counts.
		c.pass(30 * time.Second)
		last := to.Endpoints[test.endpoints-1].Addr
		fail(t, b, to, last, 1, ServerError)
		if test.want > 0 && !aside(t, b, to, last) {
			t.Errorf("%d, %d %%: there is room, and it is not set aside", test.endpoints, test.percent)
		}
	}
}

// TestAllSetAside: when none but those are left, they are picked all the same.
func TestAllSetAside(t *testing.T) {
	for _, algorithm := range algorithms {
		b, _ := newBalancer()
		to := backend(4, route.Policy{Balance: algorithm})
		spread(t, b, to, 1)
		fail(t, b, to, to.Endpoints[0].Addr, 5, ServerError)
		fail(t, b, to, to.Endpoints[1].Addr, 5, ServerError)
		if got := spread(t, b, with(to, endpoints(0, 2)), 200); len(got) != 2 {
			t.Errorf("algorithm %d: %d of 2 get requests", algorithm, len(got))
		}
		tried := []netip.AddrPort{to.Endpoints[2].Addr, to.Endpoints[3].Addr}
		if _, ok := b.Pick(to, client(1), tried); !ok {
			t.Errorf("algorithm %d: there are some that were not tried", algorithm)
		}
	}
}
