package balance

import (
	"net/netip"
	"slices"
	"time"

	"github.com/weirmesh/weir/proxy/route"
)

// draws is how many random endpoints are looked at before all are: those that must
// not be chosen are at most half of them, as a rule.
const draws = 8

// choice is one choice of an endpoint, an index in list.endpoints; below 0 is none.
type choice struct {
	b        *Balancer
	list     *endpointList
	policy   *route.Policy
	tried    []netip.AddrPort
	now      time.Duration
	anything bool // also those set aside
}

func (c *choice) choose(key Key) int {
	i := c.chooseAble(key)
	if i < 0 && !c.anything {
		c.anything = true
		i = c.chooseAble(key)
	}
	return i
}

func (c *choice) chooseAble(key Key) int {
	if c.policy.Affinity > 0 && key.Client.IsValid() {
		return c.keep(key)
	}
	return c.byAlgorithm(key)
}

func (c *choice) byAlgorithm(key Key) int {
	switch c.policy.Balance {
	case route.RoundRobin:
		return c.next()
	case route.Random:
		return c.draw(-1)
	case route.ConsistentHash:
		if hash := hashOf(c.policy, key); hash != 0 {
			return c.hashed(hash)
		}
	}
	return c.leastRequest()
}

// able reports whether endpoint i may be chosen.
func (c *choice) able(i int) bool {
	e := c.list.endpoints[i]
	return (c.anything || e.asideTill <= c.now || c.policy.Ejection.Failures < 0) &&
		(len(c.tried) == 0 || !slices.Contains(c.tried, e.addr))
}

// share is which part of a full one endpoint i gets.
func (c *choice) share(i int) float64 {
	e := c.list.endpoints[i]
	if age := c.now - e.since; e.fresh && age < c.policy.SlowStart {
		return float64(age) / float64(c.policy.SlowStart)
	}
	return 1
}

// lucky is true for that part of its calls.
func (c *choice) lucky(share float64) bool {
	return share >= 1 || c.uniform() < share
}

// uniform is a number in [0, 1).
func (c *choice) uniform() float64 {
	const steps = 1 << 30
	return float64(c.b.random(steps)) / steps
}

// leastRequest is of two random endpoints that with fewer requests for its share.
func (c *choice) leastRequest() int {
	i := c.draw(-1)
	if i < 0 {
		return i
	}
	j := c.draw(i)
	if j < 0 {
		return i
	}
	if float64(c.list.endpoints[j].active)*c.share(i) < float64(c.list.endpoints[i].active)*c.share(j) {
		return j
	}
	return i
}

// draw is a random endpoint other than that one, each with a chance that is its
// share's.
func (c *choice) draw(other int) int {
	n := len(c.list.endpoints)
	if other >= 0 {
		n--
	}
	for range min(n, draws) {
		i := c.b.random(n)
		if other >= 0 && i >= other {
			i++
		}
		if c.able(i) && c.lucky(c.share(i)) {
			return i
		}
	}
	return c.drawOfAll(other)
}

func (c *choice) drawOfAll(other int) int {
	last, count, sum := -1, 0, 0.0
	for i := range c.list.endpoints {
		if i != other && c.able(i) {
			last = i
			count++
			sum += c.share(i)
		}
	}
	if count < 2 {
		return last
	}
	at := c.uniform() * sum
	skip := 0
	if sum == 0 { // all are new this very moment
		skip = c.b.random(count)
	}
	for i := range c.list.endpoints {
		if i == other || !c.able(i) {
			continue
		}
		if at -= c.share(i); at < 0 || sum == 0 && skip == 0 {
			return i
		}
		skip--
	}
	return last
}

// round is where round robin is: by address, so that it goes on from there in
// another list.
type round struct {
	last netip.AddrPort
	list *endpointList // where last has that place in byAddress
	at   int
}

// next is the endpoint after the last one. A new one is passed over in some rounds.
func (c *choice) next() int {
	r, order := &c.list.group.rounds, c.list.byAddress()
	start := r.at + 1
	switch {
	case !r.last.IsValid():
		start = c.b.random(len(order)) // not that all proxies begin with the same one
	case r.list != c.list:
		var found bool
		if start, found = c.list.search(r.last); found {
			start++
		}
	}
	chosen := -1
	for k := range order {
		at := (start + k) % len(order)
		if !c.able(int(order[at])) {
			continue
		}
		if chosen < 0 {
			chosen = at
		}
		if c.lucky(c.share(int(order[at]))) {
			chosen = at
			break
		}
	}
	if chosen < 0 {
		return chosen
	}
	i := int(order[chosen])
	*r = round{last: c.list.endpoints[i].addr, list: c.list, at: chosen}
	return i
}

// stuck is the endpoint of a client, and until when.
type stuck struct {
	addr  netip.AddrPort
	until time.Duration
}

// keep is the endpoint that the client had last, sessionAffinity ClientIP. If it
// cannot be chosen the client gets another one for good.
func (c *choice) keep(key Key) int {
	s := c.list.group.sticky.at(key.Client.Unmap())
	i := -1
	if s.until > c.now {
		if at, ok := c.list.search(s.addr); ok && c.able(int(c.list.order[at])) {
			i = int(c.list.order[at])
		}
	}
	if i < 0 {
		i = c.byAlgorithm(key)
	}
	if i >= 0 {
		*s = stuck{c.list.endpoints[i].addr, c.now + c.policy.Affinity}
		c.list.group.keepUntil = max(c.list.group.keepUntil, s.until)
	}
	return i
}
