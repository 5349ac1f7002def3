package balance

import (
	"net/netip"
	"testing"
	"time"

	"github.com/weirmesh/weir/proxy/route"
)

// admitted is how many of n are.
func admitted(b *Balancer, to *route.Backend, what Resource, n int) int {
	got := 0
	for range n {
		if b.Admit(to, what) {
			got++
		}
	}
	return got
}

// TestLimits: each bounds its own resource, of its own backend; what left makes room
// for one more; without a limit there is none.
func TestLimits(t *testing.T) {
	b, _ := newBalancer()
	to := backend(2, route.Policy{Limits: route.Limits{Requests: 3, Pending: 2, Connections: 4}})
	for what, want := range map[Resource]int{Requests: 3, Pending: 2, Connections: 4} {
		if got := admitted(b, to, what, 10); got != want {
			t.Errorf("%d of resource %d, want %d", got, what, want)
		}
		b.Leave(to, what)
		if got := admitted(b, to, what, 10); got != 1 {
			t.Errorf("one of resource %d left, %d came", what, got)
		}
	}
	other := with(to, to.Endpoints)
	other.Service = "shop/other"
	if got := admitted(b, other, Requests, 10); got != 3 {
		t.Errorf("%d requests to another Service, want 3", got)
	}
	// The same backend when its endpoints have changed, or are none.
	if admitted(b, with(to, endpoints(5, 3)), Requests, 1) != 0 {
		t.Error("other endpoints have another limit")
	}
	none := backend(0, *to.Policy)
	if got := admitted(b, none, Requests, 10); got != 3 {
		t.Errorf("%d requests to no endpoints, want 3", got)
	}
	for _, policy := range []*route.Policy{nil, {}} {
		unlimited := &route.Backend{Service: "shop/free", Policy: policy}
		if got := admitted(b, unlimited, Requests, 1000); got != 1000 {
			t.Errorf("%d of 1,000 requests", got)
		}
		if b.Admit(unlimited, Pending) {
			t.Error("somebody waits where nobody is said to")
		}
	}
}

// TestLimitsOutliveIdleTime: what is held is held, however long nothing happens.
func TestLimitsOutliveIdleTime(t *testing.T) {
	b, c := newBalancer()
	to := backend(2, route.Policy{Limits: route.Limits{Requests: 1}})
	b.Admit(to, Requests)
	for range 10 {
		c.pass(time.Hour)
		if admitted(b, to, Requests, 1) != 0 {
			t.Fatal("a request that is under way is forgotten")
		}
	}
	b, c = newBalancer()
	to.Policy = &route.Policy{Limits: route.Limits{Retries: 1}}
	b.RetryBegin(to)
	for range 10 {
		c.pass(time.Hour)
		if b.RetryBegin(to) {
			t.Fatal("a retry that is under way is forgotten")
		}
	}
}

// TestRetryBudget: a share of the requests under way, 3 where that is less, and no
// more than the policy's limit.
func TestRetryBudget(t *testing.T) {
	for _, test := range []struct {
		requests, limit int
		budget          uint32
		want            int
	}{
		{0, 0, 0, 3}, {15, 0, 0, 3}, {20, 0, 0, 4}, {100, 0, 0, 20}, {100, 0, 50, 50}, {199, 0, 1, 3}, {1000, 0, 1, 10}, {100, 7, 0, 7}, {0, 1, 0, 1},
	} {
		b, _ := newBalancer()
		to := backend(2, route.Policy{Budget: test.budget, Limits: route.Limits{Retries: test.limit}})
		admitted(b, to, Requests, test.requests)
		begun := func() int {
			got := 0
			for range 200 {
				if b.RetryBegin(to) {
					got++
				}
			}
			return got
		}
		if got := begun(); got != test.want {
			t.Errorf("%+v: %d retries", test, got)
		}
		b.RetryEnd(to)
		if got := begun(); got != 1 {
			t.Errorf("%+v: one retry ended, %d began", test, got)
		}
	}
}

// TestRateLimit: a burst at once, then the rate; the time to wait is exact; what is
// refused takes no token.
func TestRateLimit(t *testing.T) {
	for _, test := range []struct {
		limit route.RateLimit
		burst int
		each  time.Duration
	}{
		{route.RateLimit{Requests: 10, Per: time.Second}, 10, 100 * time.Millisecond},
		{route.RateLimit{Requests: 10, Per: time.Second, Burst: 3}, 3, 100 * time.Millisecond},
		{route.RateLimit{Requests: 1, Per: time.Minute}, 1, time.Minute},
		{route.RateLimit{Requests: 1, Per: time.Hour, Burst: 2}, 2, time.Hour},
		{route.RateLimit{Requests: 3, Per: time.Second}, 3, time.Second / 3},
	} {
		b, c := newBalancer()
		to := backend(2, route.Policy{RateLimit: &test.limit})
		allow := func() (time.Duration, bool) { return b.Allow(to, Client{}) }
		burst := func(want int) {
			t.Helper()
			for i := range want {
				if wait, ok := allow(); !ok || wait != 0 {
					t.Fatalf("%+v: request %d of a burst has to wait %s", test.limit, i, wait)
				}
			}
			if wait, ok := allow(); ok || wait != test.each {
				t.Fatalf("%+v: after a burst of %d: %t, wait %s", test.limit, want, ok, wait)
			}
		}
		burst(test.burst)
		c.pass(test.each - 1)
		for range 5 {
			if wait, ok := allow(); ok || wait != 1 {
				t.Fatalf("%+v: %t, wait %s", test.limit, ok, wait)
			}
		}
		c.pass(1)
		burst(1)
		c.pass(time.Duration(test.burst+5) * test.each)
		burst(test.burst) // and no more, however long nobody came
	}
}

// TestRateLimitOfEachClient: one that asks too much takes nothing from the others,
// by whichever form of its address.
func TestRateLimitOfEachClient(t *testing.T) {
	b, _ := newBalancer()
	to := backend(2, route.Policy{RateLimit: &route.RateLimit{Requests: 1, Per: time.Minute, PerClient: true}})
	for i := range 3 {
		if _, ok := b.Allow(to, Client{Addr: client(i).Client}); !ok {
			t.Errorf("client %d: the first is refused", i)
		}
		if _, ok := b.Allow(to, Client{Addr: netip.AddrFrom16(client(i).Client.As16())}); ok {
			t.Errorf("client %d: the second is allowed", i)
		}
	}
}

// TestRateLimitOfEachIdentity: all its addresses are one client, and who shows none is
// its address.
func TestRateLimitOfEachIdentity(t *testing.T) {
	for _, byIdentity := range []bool{false, true} {
		b, _ := newBalancer()
		to := backend(2, route.Policy{RateLimit: &route.RateLimit{Requests: 1, Per: time.Minute, PerClient: true, ByIdentity: byIdentity}})
		for _, c := range []struct {
			number   int
			identity string
			want     bool
		}{
			{0, "spiffe://a/ns/shop/sa/front", true},
			{1, "spiffe://a/ns/shop/sa/front", !byIdentity},
			{0, "spiffe://a/ns/shop/sa/back", byIdentity},
			{0, "", byIdentity},
			{0, "", false},
			{2, "", true},
		} {
			if _, ok := b.Allow(to, Client{client(c.number).Client, c.identity}); ok != c.want {
				t.Errorf("by identity %t, %+v: allowed %t", byIdentity, c, ok)
			}
		}
	}
}

// TestRateLimitChanges: a limit that is raised holds at once.
func TestRateLimitChanges(t *testing.T) {
	b, c := newBalancer()
	slow := backend(2, route.Policy{RateLimit: &route.RateLimit{Requests: 5, Per: 5 * time.Hour}})
	for range 5 {
		b.Allow(slow, Client{})
	}
	fast := with(slow, slow.Endpoints)
	fast.Policy = &route.Policy{RateLimit: &route.RateLimit{Requests: 10, Per: time.Second}}
	if wait, ok := b.Allow(fast, Client{}); ok || wait > 100*time.Millisecond {
		t.Errorf("%t, wait %s", ok, wait)
	}
	c.pass(100 * time.Millisecond)
	if _, ok := b.Allow(fast, Client{}); !ok {
		t.Error("it waits for the limit that was")
	}
}

// TestLargestRateLimit overflows nothing.
func TestLargestRateLimit(t *testing.T) {
	for _, limit := range []route.RateLimit{
		{Requests: 1, Per: 24 * time.Hour, Burst: 1<<32 - 1}, {Requests: 1<<32 - 1, Per: 1, Burst: 1<<32 - 1}, {Requests: 1<<32 - 1, Per: 1000 * time.Hour},
	} {
		b, _ := newBalancer()
		to := &route.Backend{Service: "s", Policy: &route.Policy{RateLimit: &limit}}
		for i := range 10_000 {
			if wait, ok := b.Allow(to, Client{}); !ok {
				t.Fatalf("%+v: request %d waits %s", limit, i, wait)
			}
		}
	}
}

// TestRateIsRemembered: staying away for less than it takes fills no bucket.
func TestRateIsRemembered(t *testing.T) {
	b, c := newBalancer()
	to := backend(0, route.Policy{RateLimit: &route.RateLimit{Requests: 1, Per: time.Hour}})
	b.Allow(to, Client{})
	c.pass(31 * time.Second)
	b.Active(netip.AddrPort{})
	for range 3 {
		if wait, ok := b.Allow(to, Client{}); ok {
			t.Fatal("its bucket is full again")
		} else if wait > time.Hour {
			t.Fatalf("wait %s", wait)
		}
		c.pass(10 * time.Minute)
	}
}
