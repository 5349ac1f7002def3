package balance

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/weirmesh/weir/proxy/route"
)

// endpoints are n of them, from that one on.
func endpoints(first, n int) []route.Endpoint {
	var out []route.Endpoint
	for i := first; i < first+n; i++ {
		out = append(out, route.Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 80)})
	}
	return out
}

func backend(n int, policy route.Policy) *route.Backend {
	return &route.Backend{Service: "shop/cart", Endpoints: endpoints(0, n), Policy: &policy}
}

// with is the same backend, with other endpoints.
func with(b *route.Backend, list []route.Endpoint) *route.Backend {
	out := *b
	out.Endpoints = list
	return &out
}

// clock is a test's own time.
type clock struct{ now time.Time }

func (c *clock) Now() time.Time { return c.now }
func (c *clock) pass(d time.Duration) {
	c.now = c.now.Add(d)
}

// newBalancer has the test's clock, and the same random numbers each time.
func newBalancer() (*Balancer, *clock) {
	c := &clock{now: time.Unix(1_000_000, 0)}
	return &Balancer{Random: rand.New(rand.NewPCG(1, 2)).IntN, Now: c.Now}, c
}

// client is one of many.
func client(i int) Key {
	return Key{Client: netip.AddrFrom4([4]byte{192, byte(i >> 16), byte(i >> 8), byte(i)})}
}

func pick(t testing.TB, b *Balancer, to *route.Backend, key Key, tried ...netip.AddrPort) netip.AddrPort {
	t.Helper()
	e, ok := b.Pick(to, key, tried)
	if !ok {
		t.Fatal("nothing is picked")
	}
	return e.Addr
}

// spread is how often each endpoint is picked, one request after the other, of which
// nobody says how it went.
func spread(t testing.TB, b *Balancer, to *route.Backend, n int) map[netip.AddrPort]int {
	t.Helper()
	out := map[netip.AddrPort]int{}
	for i := range n {
		addr := pick(t, b, to, client(i))
		b.Done(to, addr, Unknown)
		out[addr]++
	}
	return out
}

func fail(t testing.TB, b *Balancer, to *route.Backend, addr netip.AddrPort, n int, outcome Outcome) {
	for range n {
		b.Report(to, addr, outcome)
	}
}

var algorithms = []route.Algorithm{route.LeastRequest, route.RoundRobin, route.Random, route.ConsistentHash}

// TestPick: whatever the algorithm, whatever is under way, set aside or new, the
// pick is one of the endpoints and none that was tried, as long as there is one.
func TestPick(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for round := range 3000 {
		b, c := newBalancer()
		algorithm := algorithms[round%3]
		if round%50 == 0 {
			algorithm = route.ConsistentHash
		}
		to := backend(1+r.IntN(12), route.Policy{Balance: algorithm, SlowStart: time.Duration(r.IntN(2)) * time.Minute})
		for range r.IntN(30) {
			addr := pick(t, b, to, client(r.IntN(100)))
			fail(t, b, to, addr, r.IntN(7), ServerError)
		}
		c.pass(time.Duration(r.IntN(40)) * time.Second)
		to = with(to, endpoints(r.IntN(6), 1+r.IntN(12)))
		var tried []netip.AddrPort
		for i := range len(to.Endpoints) + 1 {
			e, ok := b.Pick(to, client(r.IntN(100)), tried)
			if ok != (i < len(to.Endpoints)) {
				t.Fatalf("picked: %t, after %d of %d", ok, i, len(to.Endpoints))
			}
			if ok && (slices.Contains(tried, e.Addr) || !slices.Contains(to.Endpoints, e)) {
				t.Fatalf("%v is picked, of %v without %v", e, to.Endpoints, tried)
			}
			tried = append(tried, e.Addr)
		}
	}
}

// TestLeastRequestSpreads: two choices keep the fullest endpoint close to the mean;
// one choice would leave it some 30 % over.
func TestLeastRequestSpreads(t *testing.T) {
	b, _ := newBalancer()
	to := backend(20, route.Policy{})
	const each = 100
	for i := range each * 20 {
		pick(t, b, to, client(i))
	}
	for _, e := range to.Endpoints {
		if n := b.Active(e.Addr); n < each-5 || n > each+5 {
			t.Errorf("%s has %d, want about %d", e.Addr, n, each)
		}
	}
}

// TestLeastRequestAvoidsTheSlow: of two, the one with fewer requests.
func TestLeastRequestAvoidsTheSlow(t *testing.T) {
	b, _ := newBalancer()
	to := backend(2, route.Policy{})
	slow := pick(t, b, to, Key{})
	for range 100 {
		addr := pick(t, b, to, Key{})
		if addr == slow {
			t.Fatal("the one that has a request gets another")
		}
		b.Done(to, addr, Success)
	}
	b.Done(to, slow, Success)
	if got := spread(t, b, to, 100)[slow]; got < 30 {
		t.Errorf("its request is over, and it gets %d of 100", got)
	}
}

func TestRandomIsEven(t *testing.T) {
	b, _ := newBalancer()
	for addr, n := range spread(t, b, backend(10, route.Policy{Balance: route.Random}), 10_000) {
		if n < 880 || n > 1120 {
			t.Errorf("%s gets %d of 10,000, want about 1,000", addr, n)
		}
	}
}

func TestRoundRobinIsEven(t *testing.T) {
	b, _ := newBalancer()
	to := backend(7, route.Policy{Balance: route.RoundRobin})
	for addr, n := range spread(t, b, to, 700) {
		if n != 100 {
			t.Errorf("%s gets %d of 700", addr, n)
		}
	}
}

// TestRoundRobinSurvivesChanges: endpoints come and go with every few requests, in
// any order, and those that stay are even.
func TestRoundRobinSurvivesChanges(t *testing.T) {
	b, _ := newBalancer()
	r := rand.New(rand.NewPCG(3, 4))
	stay := endpoints(0, 10)
	to := backend(10, route.Policy{Balance: route.RoundRobin})
	got := map[netip.AddrPort]int{}
	for i := range 1000 {
		list := append(slices.Clone(stay), endpoints(100+i%3, i%4)...)
		r.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
		for addr, n := range spread(t, b, with(to, list), 5) {
			got[addr] += n
		}
	}
	low, high := 1<<30, 0
	for _, e := range stay {
		low, high = min(low, got[e.Addr]), max(high, got[e.Addr])
	}
	if high-low > 1 || low < 350 {
		t.Errorf("from %d to %d requests each", low, high)
	}
}

// TestRoundRobinBeginsAnywhere: many proxies do not all begin with the same one.
func TestRoundRobinBeginsAnywhere(t *testing.T) {
	first := map[netip.AddrPort]bool{}
	to := backend(10, route.Policy{Balance: route.RoundRobin})
	for range 100 {
		first[pick(t, &Balancer{}, to, Key{})] = true
	}
	if len(first) < 5 {
		t.Errorf("100 proxies begin with %d of 10", len(first))
	}
}

func hashed(to *route.Backend) *route.Backend {
	to.Policy = &route.Policy{Balance: route.ConsistentHash, HashOn: route.HashHeader}
	return to
}

func homes(t *testing.T, b *Balancer, to *route.Backend, n int) []netip.AddrPort {
	out := make([]netip.AddrPort, n)
	for i := range out {
		out[i] = pick(t, b, to, Key{Hash: HashOf(fmt.Append(nil, "user-", i))})
		b.Done(to, out[i], Success)
	}
	return out
}

// TestHash: the same key goes to the same endpoint, in every proxy, in whatever
// order the endpoints are; all get about as many keys; with one endpoint gone, or
// one more, few keys move but its own.
func TestHash(t *testing.T) {
	const keys, n = 20_000, 50
	b, _ := newBalancer()
	to := hashed(backend(n, route.Policy{}))
	before := homes(t, b, to, keys)

	other := slices.Clone(to.Endpoints)
	slices.Reverse(other)
	if !slices.Equal(homes(t, &Balancer{}, with(to, other), keys), before) {
		t.Error("another proxy's endpoints, in another order, have other keys")
	}
	count := map[netip.AddrPort]int{}
	for _, home := range before {
		count[home]++
	}
	for addr, got := range count {
		if got < keys/n*3/4 || got > keys/n*5/4 {
			t.Errorf("%s has %d keys, want about %d", addr, got, keys/n)
		}
	}
	for name, list := range map[string][]route.Endpoint{
		"one gone": slices.Delete(slices.Clone(to.Endpoints), 20, 21),
		"one more": append(slices.Clone(to.Endpoints), endpoints(1000, 1)...),
	} {
		moved := 0
		for i, home := range homes(t, b, with(to, list), keys) {
			newcomer := !slices.ContainsFunc(to.Endpoints, func(e route.Endpoint) bool { return e.Addr == home })
			if home != before[i] && !newcomer && before[i] != to.Endpoints[20].Addr {
				moved++
			}
		}
		if moved > keys*3/100 {
			t.Errorf("%s: %d of %d keys moved between others", name, moved, keys)
		}
	}
}

// TestHashOfWhatIsNotThere: requests without the header do not all go to one.
func TestHashOfWhatIsNotThere(t *testing.T) {
	b, _ := newBalancer()
	if got := spread(t, b, hashed(backend(10, route.Policy{})), 200); len(got) < 10 {
		t.Errorf("only %d of 10 get any", len(got))
	}
}

func TestHashOnClient(t *testing.T) {
	b, _ := newBalancer()
	to := backend(10, route.Policy{Balance: route.ConsistentHash})
	mapped := netip.AddrFrom16(client(1).Client.As16())
	if pick(t, b, to, client(1)) != pick(t, b, to, Key{Client: mapped, Hash: 7}) {
		t.Error("a client has two endpoints")
	}
	if got := spread(t, b, to, 200); len(got) < 10 {
		t.Errorf("200 clients have %d of 10 endpoints", len(got))
	}
}

// TestMoreEndpointsThanPlaces: as many have one as can be.
func TestMoreEndpointsThanPlaces(t *testing.T) {
	b, _ := newBalancer()
	to := hashed(backend(70_000, route.Policy{}))
	pick(t, b, to, Key{Hash: 1})
	places := map[uint16]bool{}
	for _, place := range b.group(to).lists[0].table {
		places[place] = true
	}
	if len(places) != 1<<16 {
		t.Errorf("%d of them have a place", len(places))
	}
}

// TestAffinity: a client keeps its endpoint as long as it comes back in time, also
// when others come and go.
func TestAffinity(t *testing.T) {
	b, c := newBalancer()
	to := backend(10, route.Policy{Affinity: time.Minute})
	home := pick(t, b, to, client(1))
	for i := range 50 {
		c.pass(50 * time.Second)
		list := slices.DeleteFunc(endpoints(i%2, 11), func(e route.Endpoint) bool { return e.Addr == home })
		if got := pick(t, b, with(to, append(list, route.Endpoint{Addr: home})), client(1)); got != home {
			t.Fatalf("request %d goes to %s, the first went to %s", i, got, home)
		}
	}
	if got := pick(t, b, to, Key{Client: netip.AddrFrom16(client(1).Client.As16())}); got != home {
		t.Errorf("by the other form of its address it goes to %s", got)
	}
	moved := 0
	for range 20 {
		c.pass(61 * time.Second)
		if got := pick(t, b, to, client(1)); got != home {
			moved++
			home = got
		}
	}
	if moved < 10 {
		t.Errorf("after its time a client moved %d times of 20", moved)
	}
}

// TestAffinityLeavesWhatFails: a client whose endpoint is tried, set aside or gone
// has another one from then on.
func TestAffinityLeavesWhatFails(t *testing.T) {
	b, c := newBalancer()
	to := backend(10, route.Policy{Affinity: time.Hour})
	first := pick(t, b, to, client(1))
	second := pick(t, b, to, client(1), first)
	if got := pick(t, b, to, client(1)); second == first || got != second {
		t.Fatalf("tried %s, got %s, then %s", first, second, got)
	}
	fail(t, b, to, second, 5, ServerError)
	third := pick(t, b, to, client(1))
	if third == second {
		t.Fatal("it keeps one that is set aside")
	}
	c.pass(31 * time.Second)
	if got := pick(t, b, to, client(1)); got != third {
		t.Fatalf("it leaves %s for %s", third, got)
	}
	without := slices.DeleteFunc(slices.Clone(to.Endpoints), func(e route.Endpoint) bool { return e.Addr == third })
	if got := pick(t, b, with(to, without), client(1)); got == third {
		t.Fatal("it keeps one that is gone")
	}
}

// TestAffinityIsRemembered for as long as the policy says, however long nothing else
// happens.
func TestAffinityIsRemembered(t *testing.T) {
	b, c := newBalancer()
	to := backend(50, route.Policy{Affinity: 3 * time.Hour})
	home := pick(t, b, to, client(1))
	b.Done(to, home, Success)
	for range 3 {
		c.pass(time.Hour - time.Minute)
		spread(t, b, &route.Backend{Service: "other", Endpoints: endpoints(500, 2)}, 3)
	}
	if got := pick(t, b, to, client(1)); got != home {
		t.Errorf("%s, then %s", home, got)
	}
}

// TestSlowStart: the share of a new endpoint grows linearly, whatever the algorithm
// and however busy the others are; the first ones of a backend have no such time.
func TestSlowStart(t *testing.T) {
	for _, algorithm := range []route.Algorithm{route.LeastRequest, route.RoundRobin, route.Random} {
		for _, busy := range []bool{false, true} {
			if busy && algorithm != route.LeastRequest {
				continue
			}
			b, c := newBalancer()
			old := backend(9, route.Policy{Balance: algorithm, SlowStart: 100 * time.Second})
			for addr, n := range spread(t, b, old, 9000) {
				if n < 800 {
					t.Errorf("%d: one of the first, %s, gets %d of 9,000", algorithm, addr, n)
				}
			}
			to := with(old, endpoints(0, 10))
			newest := to.Endpoints[9].Addr
			var queue []netip.AddrPort
			for _, age := range []time.Duration{0, 20, 50, 100} {
				got, full := 0, 0
				const requests = 10_000
				for i := range requests {
					addr := pick(t, b, to, client(i))
					if queue = append(queue, addr); !busy || len(queue) > 200 {
						b.Done(to, queue[0], Success)
						queue = queue[1:]
					}
					if addr == newest {
						got++
					} else {
						full++
					}
				}
				share := float64(age) / 100
				want := share * float64(full) / 9
				if float64(got) < want*0.8-10 || float64(got) > want*1.2+10 {
					t.Errorf("algorithm %d, busy %t: after %d s the new one gets %d, want about %.0f", algorithm, busy, age, got, want)
				}
				c.pass(map[time.Duration]time.Duration{0: 20, 20: 30, 50: 50, 100: 0}[age] * time.Second)
			}
		}
	}
}

// TestSlowStartOfAll: with nothing but new endpoints, they are picked all the same.
func TestSlowStartOfAll(t *testing.T) {
	for _, algorithm := range algorithms {
		b, _ := newBalancer()
		old := backend(3, route.Policy{Balance: algorithm, SlowStart: time.Minute})
		pick(t, b, old, client(1))
		if got := spread(t, b, with(old, endpoints(10, 3)), 100); len(got) != 3 {
			t.Errorf("algorithm %d: %d of 3 get requests", algorithm, len(got))
		}
	}
}

// TestMemory: endpoints, lists and backends that come and go for ever leave nothing
// behind, fast or slow, used or failing.
func TestMemory(t *testing.T) {
	for name, pause := range map[string]time.Duration{"slow": time.Second, "fast": 0} {
		t.Run(name, func(t *testing.T) {
			b, c := newBalancer()
			high, lists := 0, 0
			for i := range 3000 {
				to := backend(0, route.Policy{Balance: algorithms[i%3], Affinity: time.Minute})
				to.Service = fmt.Sprint("shop/", i%50)
				to.Endpoints = endpoints(i*100, 100)
				addr := pick(t, b, to, client(i))
				b.Admit(to, Requests)
				b.Leave(to, Requests)
				fail(t, b, to, addr, 4, ConnectFailure)
				b.Done(to, addr, Success)
				high, lists = max(high, len(b.endpoints)), max(lists, len(b.lists))
				c.pass(pause)
			}
			if high > 3*spareEndpoints || lists > 3*spareEndpoints/100 {
				t.Errorf("%d endpoints in %d lists are kept", high, lists)
			}
			for range 20 {
				c.pass(sweepInterval)
				b.Admit(backend(0, route.Policy{}), Requests)
			}
			if len(b.endpoints) != 0 || len(b.lists) != 0 || len(b.groups) != 1 {
				t.Errorf("%d endpoints, %d lists, %d backends are left", len(b.endpoints), len(b.lists), len(b.groups))
			}
		})
	}
}

// TestClientsAreBounded: the clients that came last are remembered, no more.
func TestClientsAreBounded(t *testing.T) {
	b, _ := newBalancer()
	to := backend(100, route.Policy{Affinity: time.Hour, RateLimit: &route.RateLimit{Requests: 1, Per: time.Hour, PerClient: true}})
	home := pick(t, b, to, client(0))
	for i := range 3 * maxClients {
		pick(t, b, to, client(i+1))
		b.Allow(to, Client{Addr: client(i + 1).Client})
		if i%1000 == 0 && pick(t, b, to, client(0)) != home {
			t.Fatal("a client that comes all the time is forgotten")
		}
	}
	g := b.group(to)
	if n, m := len(g.sticky.entries), len(g.buckets.entries); n != maxClients || m != maxClients || g.buckets.order.Len() != maxClients {
		t.Errorf("%d endpoints and %d rates of clients are kept", n, m)
	}
	if _, ok := b.Allow(to, Client{Addr: client(3 * maxClients).Client}); ok {
		t.Error("the last client is forgotten")
	}
}

// TestListsAreShared: the same endpoints behind many routes are one list; endpoints
// that stay keep their counts when others come.
func TestListsAreShared(t *testing.T) {
	b, _ := newBalancer()
	first := backend(2, route.Policy{})
	busy := pick(t, b, first, Key{})
	for range 20 {
		pick(t, b, with(first, slices.Clone(first.Endpoints)), Key{})
	}
	if n := len(b.group(first).lists); n != 1 {
		t.Errorf("%d lists of the same endpoints", n)
	}
	if pick(t, b, with(first, endpoints(0, 3)), Key{}, first.Endpoints[0].Addr, first.Endpoints[1].Addr) != endpoints(2, 1)[0].Addr {
		t.Error("the new one is not there")
	}
	if n := b.Active(busy); n < 10 {
		t.Errorf("%d requests of it are under way", n)
	}
}

// TestCountsOutliveIdleTime: requests are counted as long as they are under way,
// however long nothing else happens and wherever the endpoint has gone.
func TestCountsOutliveIdleTime(t *testing.T) {
	b, c := newBalancer()
	to := backend(1, route.Policy{})
	addr := pick(t, b, to, Key{})
	for range 5 {
		c.pass(time.Hour)
		spread(t, b, with(to, endpoints(1, 2)), 1)
	}
	if n := b.Active(addr); n != 1 {
		t.Errorf("%d requests are counted", n)
	}
	b.Done(to, addr, Success)
	if n := b.Active(addr); n != 0 {
		t.Errorf("%d requests are counted after the end of the last one", n)
	}
}

// TestConcurrentUse: what is begun by many at a time and ended leaves no count.
func TestConcurrentUse(t *testing.T) {
	var b Balancer
	b.Ejected = func(*route.Backend, netip.AddrPort, time.Duration) {}
	var wait sync.WaitGroup
	for g := range 8 {
		to := backend(10, route.Policy{Balance: algorithms[g%4], Affinity: time.Duration(g/4) * time.Minute, SlowStart: time.Second,
			RateLimit: &route.RateLimit{Requests: 10, Per: time.Second, PerClient: g%2 == 0}})
		wait.Go(func() {
			for i := range 2000 {
				if i%100 == 0 {
					to = with(to, endpoints(i/100, 10))
				}
				b.Admit(to, Requests)
				b.Allow(to, Client{Addr: client(i).Client})
				e, ok := b.Pick(to, client(i), nil)
				if !ok {
					t.Error("nothing is picked")
				}
				if b.RetryBegin(to) {
					b.RetryEnd(to)
				}
				b.Done(to, e.Addr, Outcome(i%4))
				b.Leave(to, Requests)
			}
		})
	}
	wait.Wait()
	for _, e := range b.endpoints {
		if e.active != 0 {
			t.Errorf("%s has %d requests", e.addr, e.active)
		}
	}
	if g := b.group(backend(1, route.Policy{})); g.retries != 0 || g.held != [resources]int{} {
		t.Errorf("%d retries and %v are held", g.retries, g.held)
	}
}

func TestPickAllocatesNothing(t *testing.T) {
	for _, policy := range []route.Policy{
		{}, {Balance: route.RoundRobin}, {Balance: route.Random}, {Balance: route.ConsistentHash}, {Affinity: time.Minute},
	} {
		var b Balancer
		to := backend(100, policy)
		key, tried := client(1), []netip.AddrPort{to.Endpoints[7].Addr}
		if n := testing.AllocsPerRun(200, func() {
			b.Done(to, pick(t, &b, to, key, tried...), Success)
		}); n > 0 {
			t.Errorf("%+v: %v allocations", policy, n)
		}
	}
}

func BenchmarkPick(b *testing.B) {
	for _, algorithm := range algorithms {
		for _, n := range []int{2, 100, 10_000} {
			b.Run(fmt.Sprintf("algorithm=%d/n=%d", algorithm, n), func(b *testing.B) {
				var x Balancer
				to := backend(n, route.Policy{Balance: algorithm})
				key := client(1)
				x.Pick(to, key, nil)
				b.ReportAllocs()
				for b.Loop() {
					x.Pick(to, key, nil)
				}
			})
		}
	}
}

func BenchmarkPickAndDone(b *testing.B) {
	var x Balancer
	to := backend(100, route.Policy{})
	b.ReportAllocs()
	for b.Loop() {
		e, _ := x.Pick(to, Key{}, nil)
		x.Done(to, e.Addr, Success)
	}
}

func BenchmarkMaglev(b *testing.B) {
	for _, n := range []int{100, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			x, _ := newBalancer()
			x.lockNow()
			l := x.list(backend(n, route.Policy{}), 0)
			for b.Loop() {
				maglev(l)
			}
		})
	}
}
