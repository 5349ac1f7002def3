package balance

import (
	"net/netip"
	"time"

	"github.com/weirmesh/weir/proxy/route"
)

const (
	// defaultBudget is route.Policy's, in percent.
	defaultBudget = 20

	// minRetries may be under way at a time whatever the budget, lest it allow none
	// where there are few requests.
	minRetries = 3
)

// Resource is what route.Limits bound.
type Resource uint8

// The resources of Admit; retries have a way of their own.
const (
	Requests    Resource = iota // under way, all attempts of one counted once
	Pending                     // requests, and clients' connections, that wait for a connection
	Connections                 // to the backend's endpoints, idle ones too
	resources   = iota
)

// Admit takes one of a resource until Leave. False: the policy's limit is reached,
// and nothing was taken.
func (b *Balancer) Admit(backend *route.Backend, what Resource) bool {
	limits := &policyOf(backend).Limits
	limit := [resources]int{Requests: limits.Requests, Pending: limits.Pending, Connections: limits.Connections}[what]
	b.lockNow()
	defer b.mu.Unlock()
	g := b.group(backend)
	if (limit > 0 || what == Pending) && g.held[what] >= limit {
		return false
	}
	g.held[what]++
	return true
}

// Leave gives back what Admit took for the same backend.
func (b *Balancer) Leave(backend *route.Backend, what Resource) {
	b.lock()
	defer b.mu.Unlock()
	g := b.group(backend)
	g.held[what] = max(g.held[what]-1, 0)
}

// RetryBegin asks whether a request to the backend may be tried again, and counts
// the retry until RetryEnd: at a time at most the budget's percentage of the
// requests that are admitted, or 3 if that is less, and at most Limits.Retries.
func (b *Balancer) RetryBegin(backend *route.Backend) bool {
	policy := policyOf(backend)
	b.lock()
	defer b.mu.Unlock()
	g := b.group(backend)
	allowed := max(minRetries, g.held[Requests]*int(orDefault(policy.Budget, defaultBudget))/100)
	if limit := policy.Limits.Retries; limit > 0 {
		allowed = min(allowed, limit)
	}
	if g.retries >= allowed {
		return false
	}
	g.retries++
	return true
}

// RetryEnd ends what RetryBegin allowed for the same backend.
func (b *Balancer) RetryEnd(backend *route.Backend) {
	b.lock()
	defer b.mu.Unlock()
	g := b.group(backend)
	g.retries = max(g.retries-1, 0)
}

// bucket is a token bucket as the time at which it will be full again, which is all
// there is to know (the generic cell rate algorithm, ITU-T I.371).
type bucket struct{ full time.Duration }

// Client is whose requests a limit may count by themselves.
type Client struct {
	Addr     netip.Addr
	Identity string // SPIFFE ID; empty: it has shown none
}

// by is the client as a limit tells it from others.
func (c Client) by(limit *route.RateLimit) Client {
	if limit.ByIdentity && c.Identity != "" {
		return Client{Identity: c.Identity}
	}
	return Client{Addr: c.Addr.Unmap()}
}

// Allow takes a token for a client's request from the policy's rate limit. False:
// there is none, and nothing was taken; the next one comes after that time.
func (b *Balancer) Allow(backend *route.Backend, client Client) (time.Duration, bool) {
	limit := policyOf(backend).RateLimit
	if limit == nil {
		return 0, true
	}
	now := b.lockNow()
	defer b.mu.Unlock()
	g := b.group(backend)
	tokens := &g.bucket
	if limit.PerClient {
		tokens = g.buckets.at(client.by(limit))
	}
	wait, ok := tokens.take(limit, now)
	g.keepUntil = max(g.keepUntil, tokens.full)
	return wait, ok
}

func (t *bucket) take(limit *route.RateLimit, now time.Duration) (time.Duration, bool) {
	const longest = 1 << 61 // 73 years: no burst takes longer to come back, none overflows
	each := max(limit.Per/time.Duration(limit.Requests), 1)
	room := float64(orDefault(limit.Burst, limit.Requests)-1) * float64(each)
	ahead := time.Duration(min(room, longest))
	// No later than a bucket of this limit can be: the limit may have been another.
	full := min(max(t.full, now), now+ahead+each)
	if wait := full - now - ahead; wait > 0 {
		t.full = full
		return wait, false
	}
	t.full = full + each
	return 0, true
}
