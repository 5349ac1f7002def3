package proxypb

import (
	"github.com/weirmesh/weir/proxy/route"
)

// FromDestination renders a route.Destination for the wire.
func FromDestination(d route.Destination) *Destination {
	return &Destination{
		Service: d.Service, Endpoints: fromEndpoints(d.Endpoints), Protocol: Protocol(d.Protocol),
		Policy: fromPolicy(d.Policy), Routes: fromRoutes(d.Routes), Identity: d.Identity,
	}
}

func fromEndpoints(endpoints []route.Endpoint) []*Endpoint {
	return each(endpoints, func(e route.Endpoint) *Endpoint {
		return &Endpoint{Address: e.Addr.String(), Pod: e.Pod, Workload: e.Workload, Identity: e.Identity}
	})
}

func fromRoutes(r *route.Routes) *Routes {
	if r == nil {
		return nil
	}
	return &Routes{Kind: Routes_Kind(r.Kind), Matches: each(r.Matches, fromMatch), Rules: each(r.Rules, fromRule)}
}

func fromMatch(m route.Match) *Match {
	out := &Match{Rule: uint32(m.Rule), Method: m.Method, Headers: each(m.Headers, fromValue), Query: each(m.Query, fromValue)}
	if m.Path.Kind != route.PathAny {
		out.Path = &Path{Kind: Path_Kind(m.Path.Kind), Value: m.Path.Value}
		if m.Path.Regexp != nil {
			out.Path.Value = m.Path.Regexp.String()
		}
	}
	if g := m.GRPC; g != nil {
		out.Grpc = &GRPCMethod{Service: g.Service, Method: g.Method}
		if g.ServiceRegexp != nil || g.MethodRegexp != nil {
			out.Grpc = &GRPCMethod{Service: source(g.ServiceRegexp), Method: source(g.MethodRegexp), Regexp: true}
		}
	}
	return out
}

func fromValue(v route.Value) *Value {
	if v.Regexp != nil {
		return &Value{Name: v.Name, Value: source(v.Regexp), Regexp: true}
	}
	return &Value{Name: v.Name, Value: v.Value}
}

// source is the expression that CompileWhole was given.
func source(r *route.Regexp) string {
	if r == nil {
		return ""
	}
	return r.String()
}

func fromRule(r route.Rule) *Rule {
	return &Rule{
		Route: r.Route, Name: r.Name, Filters: fromFilters(r.Filters),
		Backends: each(r.Backends, func(b route.WeightedBackend) *WeightedBackend {
			return &WeightedBackend{Weight: b.Weight, Backend: fromBackend(b.Backend), Filters: fromFilters(b.Filters)}
		}),
		Timeout: (*int64)(r.Timeout), BackendTimeout: int64(r.BackendTimeout), Retry: fromRetry(r.Retry),
	}
}

func fromBackend(b route.Backend) *Backend {
	return &Backend{
		Service: b.Service, Endpoints: fromEndpoints(b.Endpoints), Protocol: Protocol(b.Protocol),
		Policy: fromPolicy(b.Policy), Invalid: b.Invalid,
	}
}

func fromFilters(f route.Filters) *Filters {
	out := &Filters{
		RequestHeaders: fromHeaderChange(f.RequestHeaders), ResponseHeaders: fromHeaderChange(f.ResponseHeaders), Invalid: f.Invalid,
		Mirrors: each(f.Mirrors, func(m route.Mirror) *Mirror {
			return &Mirror{Backend: fromBackend(m.Backend), Numerator: m.Numerator, Denominator: m.Denominator}
		}),
	}
	if r := f.Redirect; r != nil {
		out.Redirect = &Redirect{
			Scheme: r.Scheme, Hostname: r.Hostname, Path: fromPathChange(r.Path), Port: uint32(r.Port), Status: uint32(r.Status),
		}
	}
	if r := f.Rewrite; r != nil {
		out.Rewrite = &Rewrite{Hostname: r.Hostname, Path: fromPathChange(r.Path)}
	}
	if c := f.CORS; c != nil {
		out.Cors = &CORS{
			AllowOrigins: c.AllowOrigins, AllowMethods: c.AllowMethods, AllowHeaders: c.AllowHeaders,
			ExposeHeaders: c.ExposeHeaders, AllowCredentials: c.AllowCredentials, MaxAge: c.MaxAge,
		}
	}
	return out
}

func fromHeaderChange(c *route.HeaderChange) *HeaderChange {
	if c == nil {
		return nil
	}
	header := func(h route.Header) *Header { return &Header{Name: h.Name, Value: h.Value} }
	return &HeaderChange{Set: each(c.Set, header), Add: each(c.Add, header), Remove: c.Remove}
}

func fromPathChange(c *route.PathChange) *PathChange {
	if c == nil {
		return nil
	}
	return &PathChange{Prefix: c.Prefix, Value: c.Value}
}

func fromRetry(r *route.Retry) *Retry {
	if r == nil {
		return nil
	}
	return &Retry{
		Attempts: uint32(r.Attempts), Backoff: int64(r.Backoff),
		Codes: each(r.Codes, func(c uint16) uint32 { return uint32(c) }),
	}
}

func fromPolicy(p *route.Policy) *Policy {
	if p == nil {
		return nil
	}
	out := &Policy{
		Name: p.Name, Balance: Policy_Algorithm(p.Balance), HashOn: Policy_HashSource(p.HashOn), HashName: p.HashName,
		SlowStart: int64(p.SlowStart), Affinity: int64(p.Affinity),
		EjectionFailures: int32(p.Ejection.Failures), EjectionBase: int64(p.Ejection.Base), EjectionMaxPercent: uint32(p.Ejection.MaxPercent),
		MaxConnections: uint32(p.Limits.Connections), MaxPending: uint32(p.Limits.Pending),
		MaxRequests: uint32(p.Limits.Requests), MaxRetries: uint32(p.Limits.Retries),
		Retry: fromRetry(p.Retry), RetryBudget: p.Budget, Timeout: int64(p.Timeout),
	}
	if l := p.RateLimit; l != nil {
		out.RateLimit = &RateLimit{Requests: l.Requests, Per: int64(l.Per), Burst: l.Burst, PerClient: l.PerClient, ByIdentity: l.ByIdentity}
	}
	return out
}

// FromInbound renders what holds for callers, by port.
func FromInbound(policies map[uint16]*route.Policy) map[uint32]*Policy {
	out := make(map[uint32]*Policy, len(policies))
	for port, p := range policies {
		out[uint32(port)] = fromPolicy(p)
	}
	return out
}

// FromProbes renders what kubelet asks a pod.
func FromProbes(probes []route.Probe) []*Probe {
	return each(probes, func(p route.Probe) *Probe { return &Probe{Port: uint32(p.Port), Target: p.Target, Grpc: p.GRPC} })
}

// each maps a list; an empty one gives nil.
func each[A, B any](in []A, f func(A) B) []B {
	if len(in) == 0 {
		return nil
	}
	out := make([]B, len(in))
	for i, a := range in {
		out[i] = f(a)
	}
	return out
}

// FromPeers is the inverse of ToPeers.
func FromPeers(mode route.PeerMode, byPort map[uint16]route.PeerMode) (PeerMode, map[uint32]PeerMode) {
	var out map[uint32]PeerMode
	for port, m := range byPort {
		if out == nil {
			out = map[uint32]PeerMode{}
		}
		out[uint32(port)] = PeerMode(m)
	}
	return PeerMode(mode), out
}
