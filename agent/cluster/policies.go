package cluster

import (
	"cmp"
	"fmt"
	"strings"
	"time"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weirmesh/weir/agent/api/v1alpha1"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// TrafficPolicy cuts an object down to the model. The error names the field; it is
// about what the CRD lets no object have.
func TrafficPolicy(p *v1alpha1.TrafficPolicy) (model.TrafficPolicy, error) {
	if err := validateTrafficPolicy(p); err != nil {
		return model.TrafficPolicy{}, err
	}
	spec := &p.Spec
	out := model.TrafficPolicy{
		Namespace: shared(p.Namespace), Name: p.Name, Created: p.CreationTimestamp.UTC(), Generation: p.Generation,
		Service: shared(string(spec.TargetRef.Name)),
		Policy:  route.Policy{Ejection: ejection(spec.OutlierDetection), Retry: policyRetry(spec.Retry)},
	}
	policy := &out.Policy
	policy.Name = out.ID()
	if b := spec.LoadBalancer; b != nil {
		loadBalancer(policy, *b)
	}
	if c := spec.CircuitBreaker; c != nil {
		policy.Limits = limits(*c)
	}
	if c := spec.RetryConstraint; c != nil && c.Budget != nil {
		policy.Budget = uint32(value(c.Budget.Percent, 0))
	}
	if t := spec.Timeouts; t != nil {
		policy.Timeout = validDuration(t.Request)
	}
	if l := spec.RateLimit; l != nil {
		policy.RateLimit = &route.RateLimit{
			Requests: uint32(l.Count), Per: validDuration(&l.Interval), Burst: uint32(value(l.Burst, 0)),
			PerClient: value(l.PerClient, false), ByIdentity: value(l.ClientBy, v1alpha1.ByAddress) == v1alpha1.ByIdentity,
		}
	}
	return out, nil
}

func loadBalancer(policy *route.Policy, b v1alpha1.LoadBalancer) {
	policy.Balance = algorithms[value(b.Type, v1alpha1.LeastRequest)]
	if h := b.ConsistentHash; h != nil {
		policy.HashOn = hashSources[h.Type]
		switch {
		case h.Header != nil:
			policy.HashName = strings.ToLower(h.Header.Name)
		case h.Cookie != nil:
			policy.HashName = h.Cookie.Name
		}
	}
	if b.SlowStart != nil {
		policy.SlowStart = validDuration(&b.SlowStart.Window)
	}
}

// maxPending is Envoy's default.
const maxPending = 1024

func limits(c v1alpha1.CircuitBreaker) route.Limits {
	out := route.Limits{
		Connections: int(value(c.MaxConnections, 0)),
		Requests:    int(value(c.MaxParallelRequests, 0)), Retries: int(value(c.MaxParallelRetries, 0)),
	}
	if out.Connections > 0 {
		out.Pending = int(value(c.MaxPendingRequests, maxPending))
	}
	return out
}

var algorithms = map[v1alpha1.LoadBalancerType]route.Algorithm{
	v1alpha1.LeastRequest: route.LeastRequest, v1alpha1.RoundRobin: route.RoundRobin,
	v1alpha1.Random: route.Random, v1alpha1.ConsistentHashBalance: route.ConsistentHash,
}

var hashSources = map[v1alpha1.ConsistentHashType]route.HashSource{
	v1alpha1.SourceIP: route.HashClient, v1alpha1.Header: route.HashHeader, v1alpha1.Cookie: route.HashCookie,
}

func ejection(d *v1alpha1.OutlierDetection) route.Ejection {
	if d == nil {
		return route.Ejection{}
	}
	out := route.Ejection{Base: validDuration(d.BaseEjectionTime), MaxPercent: int(value(d.MaxEjectionPercent, 0))}
	if d.ConsecutiveErrors != nil {
		out.Failures = cmp.Or(int(*d.ConsecutiveErrors), -1)
	}
	return out
}

// policyRetry has the defaults of an HTTPRoute's retry.
func policyRetry(r *v1alpha1.Retry) *route.Retry {
	if r == nil {
		return nil
	}
	out := &route.Retry{Attempts: int(value(r.Attempts, retryAttempts)), Codes: retryCodes, Backoff: retryBackoff}
	if len(r.Codes) > 0 {
		out.Codes = make([]uint16, len(r.Codes))
		for i, c := range r.Codes {
			out.Codes[i] = uint16(c)
		}
	}
	if r.Backoff != nil {
		out.Backoff = validDuration(r.Backoff)
	}
	return out
}

// validDuration reads one that has been validated. Nil is 0.
func validDuration(d *gatewayv1.Duration) time.Duration {
	out, _ := duration(d)
	return out
}

// validateTrafficPolicy checks what the CRD does, in manifests/base/crds: its schema
// and its expressions.
func validateTrafficPolicy(p *v1alpha1.TrafficPolicy) error {
	v := &validator{}
	spec := &p.Spec
	ref := spec.TargetRef
	oneOf(v, "spec.targetRef.group", value(ref.Group, ""), []string{""})
	oneOf(v, "spec.targetRef.kind", value(ref.Kind, "Service"), []string{"Service"})
	v.text("spec.targetRef.name", string(ref.Name), 253, nil)
	if b := spec.LoadBalancer; b != nil {
		v.loadBalancer("spec.loadBalancer", *b)
	}
	if d := spec.OutlierDetection; d != nil {
		v.number("spec.outlierDetection.consecutiveErrors", d.ConsecutiveErrors, 0, 1000)
		v.period("spec.outlierDetection.baseEjectionTime", d.BaseEjectionTime, time.Second, time.Hour)
		v.number("spec.outlierDetection.maxEjectionPercent", d.MaxEjectionPercent, 1, 100)
	}
	if c := spec.CircuitBreaker; c != nil {
		v.number("spec.circuitBreaker.maxConnections", c.MaxConnections, 1, maxCount)
		v.number("spec.circuitBreaker.maxPendingRequests", c.MaxPendingRequests, 0, maxCount)
		if c.MaxPendingRequests != nil && c.MaxConnections == nil {
			v.fail("spec.circuitBreaker", "maxPendingRequests is about what waits where maxConnections says how many connections there are")
		}
		v.number("spec.circuitBreaker.maxParallelRequests", c.MaxParallelRequests, 1, maxCount)
		v.number("spec.circuitBreaker.maxParallelRetries", c.MaxParallelRetries, 1, maxCount)
	}
	if r := spec.Retry; r != nil {
		v.number("spec.retry.attempts", r.Attempts, 1, 10)
		if r.Codes != nil {
			v.between("spec.retry.codes: number of codes", len(r.Codes), 1, 16)
		}
		for i, c := range r.Codes {
			v.between(fmt.Sprintf("spec.retry.codes[%d]", i), int(c), 500, 599)
		}
		v.period("spec.retry.backoff", r.Backoff, 0, 10*time.Second)
	}
	if c := spec.RetryConstraint; c != nil && c.Budget != nil {
		v.number("spec.retryConstraint.budget.percent", c.Budget.Percent, 1, 100)
	}
	if t := spec.Timeouts; t != nil {
		v.period("spec.timeouts.request", t.Request, 0, 24*time.Hour)
	}
	if l := spec.RateLimit; l != nil {
		v.number("spec.rateLimit.count", &l.Count, 1, maxCount)
		v.period("spec.rateLimit.interval", &l.Interval, time.Millisecond, time.Hour)
		v.number("spec.rateLimit.burst", l.Burst, 1, maxCount)
		oneOf(v, "spec.rateLimit.clientBy", value(l.ClientBy, v1alpha1.ByAddress), []v1alpha1.ClientBy{v1alpha1.ByAddress, v1alpha1.ByIdentity})
		if l.ClientBy != nil && !value(l.PerClient, false) {
			v.fail("spec.rateLimit", "clientBy is about what perClient counts")
		}
	}
	return v.err
}

// maxCount is the greatest number of requests that a policy may name.
const maxCount = 1_000_000

func (v *validator) loadBalancer(path string, b v1alpha1.LoadBalancer) {
	kind := value(b.Type, v1alpha1.LeastRequest)
	oneOf(v, path+".type", kind, []v1alpha1.LoadBalancerType{
		v1alpha1.LeastRequest, v1alpha1.RoundRobin, v1alpha1.Random, v1alpha1.ConsistentHashBalance,
	})
	hashed := kind == v1alpha1.ConsistentHashBalance
	if (b.ConsistentHash != nil) != hashed {
		v.fail(path, "consistentHash is what type ConsistentHash needs, and no other has")
	}
	if h := b.ConsistentHash; h != nil {
		path := path + ".consistentHash"
		oneOf(v, path+".type", h.Type, []v1alpha1.ConsistentHashType{v1alpha1.SourceIP, v1alpha1.Header, v1alpha1.Cookie})
		if (h.Header != nil) != (h.Type == v1alpha1.Header) {
			v.fail(path, "header is what type Header needs, and no other has")
		}
		if (h.Cookie != nil) != (h.Type == v1alpha1.Cookie) {
			v.fail(path, "cookie is what type Cookie needs, and no other has")
		}
		if h.Header != nil {
			v.text(path+".header.name", h.Header.Name, 256, headerName)
		}
		if h.Cookie != nil {
			v.text(path+".cookie.name", h.Cookie.Name, 256, headerName)
		}
	}
	if b.SlowStart != nil {
		if hashed {
			v.fail(path, "slowStart and type ConsistentHash exclude each other")
		}
		v.period(path+".slowStart.window", &b.SlowStart.Window, time.Millisecond, time.Hour)
	}
}

// number checks a number that may be left out.
func (v *validator) number(path string, n *int32, low, high int) {
	if n != nil {
		v.between(path, int(*n), low, high)
	}
}

// period checks a duration that may be left out.
func (v *validator) period(path string, d *gatewayv1.Duration, low, high time.Duration) {
	v.duration(path, d)
	if d == nil || v.err != nil {
		return
	}
	if t := validDuration(d); t < low || t > high {
		v.fail(path, "%s is not between %s and %s", *d, low, high)
	}
}
