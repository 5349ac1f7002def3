package balance

import (
	"time"

	"github.com/weirmesh/weir/proxy/route"
)

// Defaults of route.Ejection, and its longest time.
const (
	defaultFailures   = 5
	defaultBase       = 30 * time.Second
	defaultMaxPercent = 50
	maxAside          = 300 * time.Second
)

// judge takes an outcome into account. If by that the endpoint is set aside, it is
// for how long, else 0.
//
// The n-th time takes n times as long, up to maxAside; one time is forgotten for
// each base time that the endpoint has been back. Outcomes of requests that are
// still under way when it is set aside change nothing.
func (b *Balancer) judge(e *endpoint, backend *route.Backend, outcome Outcome, now time.Duration) time.Duration {
	policy := policyOf(backend).Ejection
	if outcome == Unknown || policy.Failures < 0 || e.asideTill > now {
		return 0
	}
	if outcome == Success {
		e.failures = 0
		return 0
	}
	e.failures++
	if e.failures < orDefault(policy.Failures, defaultFailures) || len(backend.Endpoints) == 0 {
		return 0
	}
	if !b.list(backend, now).mayLose(e, orDefault(policy.MaxPercent, defaultMaxPercent), now) {
		return 0
	}
	base := orDefault(policy.Base, defaultBase)
	e.ejections = max(e.ejections-int((now-e.asideTill)/base), 0) + 1
	aside := min(base*time.Duration(e.ejections), max(base, maxAside))
	e.asideTill = now + aside
	e.failures = 0
	return aside
}

// mayLose reports whether one more may be set aside: no more than that percentage
// are then, and not all.
func (l *endpointList) mayLose(e *endpoint, percent int, now time.Duration) bool {
	aside := 0
	for _, other := range l.endpoints {
		if other == e || other.asideTill > now {
			aside++
		}
	}
	return aside < len(l.endpoints) && aside*100 <= len(l.endpoints)*percent
}

func orDefault[T int | uint32 | time.Duration](value, otherwise T) T {
	if value == 0 {
		return otherwise
	}
	return value
}
