package proxypb

import (
	"fmt"
	"math"
	"net/netip"
	"strings"
	"time"

	"github.com/weirmesh/weir/proxy/route"
)

// ToDestination reads a route.Destination from the wire. An error names what
// cannot be: an address that cannot be dialled, a rule that is not there, an
// expression that does not compile, a number out of range.
func (x *Destination) ToDestination() (route.Destination, error) {
	var r reader
	out := route.Destination{
		Service: x.GetService(), Endpoints: r.endpoints(x.GetEndpoints()), Protocol: r.protocol(x.GetProtocol()),
		Policy: r.policy(x.GetPolicy()), Routes: r.routes(x.GetRoutes()),
		Identity: r.identity(x.GetIdentity()),
	}
	if out.Service == "" && (len(out.Endpoints) > 0 || out.Routes != nil) {
		r.fail("endpoints or routes without a Service")
	}
	if r.err != nil {
		return route.Destination{}, r.err
	}
	return out, nil
}

// ToInbound reads what holds for callers, by port. An error names what cannot be.
func (x *ProxyConfig) ToInbound() (map[uint16]*route.Policy, error) {
	var r reader
	out := make(map[uint16]*route.Policy, len(x.GetInbound()))
	for port, p := range x.GetInbound() {
		out[uint16(r.upTo(port, math.MaxUint16))] = r.policy(p)
	}
	return out, r.err
}

// ToPeers reads what callers must come with: on any port, and by port where that is
// something else. An error names what cannot be.
func (x *ProxyConfig) ToPeers() (route.PeerMode, map[uint16]route.PeerMode, error) {
	var r reader
	out := make(map[uint16]route.PeerMode, len(x.GetPeersByPort()))
	for port, mode := range x.GetPeersByPort() {
		out[uint16(r.upTo(port, math.MaxUint16))] = r.peers(mode)
	}
	return r.peers(x.GetPeers()), out, r.err
}

// ToProbes reads the probes. An error names what cannot be: a probe of no port, or of
// nothing.
func (x *ProxyConfig) ToProbes() (route.Probes, error) {
	var r reader
	out := route.Probes{}
	for _, address := range x.GetNodeAddresses() {
		addr, err := netip.ParseAddr(address)
		if err != nil {
			r.fail("node address: %w", err)
		}
		out.From = append(out.From, addr.Unmap())
	}
	for _, p := range x.GetProbes() {
		port := r.upTo(p.GetPort(), math.MaxUint16)
		if port == 0 || !p.GetGrpc() && !strings.HasPrefix(p.GetTarget(), "/") {
			r.fail("a probe of port %d, of %q", p.GetPort(), p.GetTarget())
		}
		out.Declared = append(out.Declared, route.Probe{Port: uint16(port), Target: p.GetTarget(), GRPC: p.GetGrpc()})
	}
	return out, r.err
}

func (r *reader) peers(mode PeerMode) route.PeerMode {
	if mode < 0 || mode > PeerMode_DISABLE {
		r.fail("peer mode %d", mode)
	}
	return route.PeerMode(mode)
}

// reader keeps the first error.
type reader struct{ err error }

func (r *reader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf(format, args...)
	}
}

func (r *reader) endpoints(in []*Endpoint) []route.Endpoint {
	return each(in, func(e *Endpoint) route.Endpoint {
		addr, err := netip.ParseAddrPort(e.GetAddress())
		switch {
		case err != nil:
			r.fail("endpoint %q: %w", e.GetAddress(), err)
		case addr.Port() == 0 || addr.Addr().IsUnspecified():
			r.fail("endpoint %s cannot be dialled", addr)
		}
		// Connections' addresses are compared with these.
		return route.Endpoint{Addr: netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port()), Pod: e.GetPod(), Workload: e.GetWorkload(), Identity: r.identity(e.GetIdentity())}
	})
}

// identity is empty, or a SPIFFE ID.
func (r *reader) identity(id string) string {
	if id != "" && !strings.HasPrefix(id, "spiffe://") {
		r.fail("identity %q is no SPIFFE ID", id)
	}
	return id
}

func (r *reader) protocol(p Protocol) route.Protocol {
	if p < 0 || p > Protocol_HTTP2 {
		r.fail("protocol %d", p)
	}
	return route.Protocol(p)
}

func (r *reader) routes(x *Routes) *route.Routes {
	if x == nil {
		return nil
	}
	out := &route.Routes{Kind: route.Kind(x.GetKind()), Rules: each(x.GetRules(), r.rule)}
	if out.Kind < route.GRPCRoute || out.Kind > route.TCPRoute {
		r.fail("routes of kind %d", x.GetKind())
	}
	if out.Kind == route.TCPRoute && len(out.Rules) != 1 {
		r.fail("%d rules of a TCPRoute, not 1", len(out.Rules))
	}
	for _, m := range x.GetMatches() {
		if int(m.GetRule()) >= len(out.Rules) {
			r.fail("a match of rule %d, of %d", m.GetRule(), len(out.Rules))
		}
		out.Matches = append(out.Matches, r.match(m))
	}
	return out
}

func (r *reader) match(x *Match) route.Match {
	out := route.Match{Rule: int(x.GetRule()), Method: x.GetMethod(), Headers: each(x.GetHeaders(), r.value), Query: each(x.GetQuery(), r.value)}
	if p := x.GetPath(); p != nil {
		out.Path = route.Path{Kind: route.PathKind(p.GetKind()), Value: p.GetValue()}
		switch out.Path.Kind {
		case route.PathAny, route.PathExact, route.PathPrefix:
		case route.PathRegexp:
			out.Path = route.Path{Kind: route.PathRegexp, Regexp: r.regexp(p.GetValue())}
		default:
			r.fail("path of kind %d", p.GetKind())
		}
	}
	if g := x.GetGrpc(); g != nil {
		out.GRPC = &route.Method{Service: g.GetService(), Method: g.GetMethod()}
		if g.GetRegexp() {
			out.GRPC = &route.Method{}
			if g.GetService() != "" {
				out.GRPC.ServiceRegexp = r.regexp(g.GetService())
			}
			if g.GetMethod() != "" {
				out.GRPC.MethodRegexp = r.regexp(g.GetMethod())
			}
		}
	}
	return out
}

func (r *reader) value(x *Value) route.Value {
	if x.GetRegexp() {
		return route.Value{Name: x.GetName(), Regexp: r.regexp(x.GetValue())}
	}
	return route.Value{Name: x.GetName(), Value: x.GetValue()}
}

func (r *reader) regexp(expression string) *route.Regexp {
	compiled, err := route.CompileWhole(expression)
	if err != nil {
		r.fail("%w", err)
	}
	return compiled
}

func (r *reader) rule(x *Rule) route.Rule {
	out := route.Rule{
		Route: x.GetRoute(), Name: x.GetName(), Filters: r.filters(x.GetFilters()),
		Backends: each(x.GetBackends(), func(b *WeightedBackend) route.WeightedBackend {
			return route.WeightedBackend{Weight: b.GetWeight(), Backend: r.backend(b.GetBackend()), Filters: r.filters(b.GetFilters())}
		}),
		BackendTimeout: r.duration(x.GetBackendTimeout()), Retry: r.retry(x.GetRetry()),
	}
	if x.Timeout != nil {
		out.Timeout = new(r.duration(x.GetTimeout()))
	}
	return out
}

func (r *reader) backend(x *Backend) route.Backend {
	return route.Backend{
		Service: x.GetService(), Endpoints: r.endpoints(x.GetEndpoints()), Protocol: r.protocol(x.GetProtocol()),
		Policy: r.policy(x.GetPolicy()), Invalid: x.GetInvalid(),
	}
}

func (r *reader) filters(x *Filters) route.Filters {
	out := route.Filters{
		RequestHeaders: headerChange(x.GetRequestHeaders()), ResponseHeaders: headerChange(x.GetResponseHeaders()), Invalid: x.GetInvalid(),
		Mirrors: each(x.GetMirrors(), func(m *Mirror) route.Mirror {
			if m.GetDenominator() == 0 {
				r.fail("a mirror's share of %d in 0", m.GetNumerator())
			}
			return route.Mirror{Backend: r.backend(m.GetBackend()), Numerator: m.GetNumerator(), Denominator: m.GetDenominator()}
		}),
	}
	if d := x.GetRedirect(); d != nil {
		out.Redirect = &route.Redirect{
			Scheme: d.GetScheme(), Hostname: d.GetHostname(), Path: pathChange(d.GetPath()),
			Port: uint16(r.upTo(d.GetPort(), math.MaxUint16)), Status: int(d.GetStatus()),
		}
		if out.Redirect.Status < 300 || out.Redirect.Status > 399 {
			r.fail("redirect with status %d", out.Redirect.Status)
		}
	}
	if w := x.GetRewrite(); w != nil {
		out.Rewrite = &route.Rewrite{Hostname: w.GetHostname(), Path: pathChange(w.GetPath())}
	}
	if c := x.GetCors(); c != nil {
		out.CORS = &route.CORS{
			AllowOrigins: c.GetAllowOrigins(), AllowMethods: c.GetAllowMethods(), AllowHeaders: c.GetAllowHeaders(),
			ExposeHeaders: c.GetExposeHeaders(), AllowCredentials: c.GetAllowCredentials(), MaxAge: c.GetMaxAge(),
		}
	}
	return out
}

func headerChange(x *HeaderChange) *route.HeaderChange {
	if x == nil {
		return nil
	}
	header := func(h *Header) route.Header { return route.Header{Name: h.GetName(), Value: h.GetValue()} }
	return &route.HeaderChange{Set: each(x.GetSet(), header), Add: each(x.GetAdd(), header), Remove: x.GetRemove()}
}

func pathChange(x *PathChange) *route.PathChange {
	if x == nil {
		return nil
	}
	return &route.PathChange{Prefix: x.GetPrefix(), Value: x.GetValue()}
}

func (r *reader) retry(x *Retry) *route.Retry {
	if x == nil {
		return nil
	}
	return &route.Retry{
		Attempts: int(r.upTo(x.GetAttempts(), math.MaxInt16)), Backoff: r.duration(x.GetBackoff()),
		Codes: each(x.GetCodes(), func(c uint32) uint16 { return uint16(r.upTo(c, 599)) }),
	}
}

func (r *reader) policy(x *Policy) *route.Policy {
	if x == nil {
		return nil
	}
	out := &route.Policy{
		Name: x.GetName(), Balance: route.Algorithm(x.GetBalance()), HashOn: route.HashSource(x.GetHashOn()), HashName: x.GetHashName(),
		SlowStart: r.duration(x.GetSlowStart()), Affinity: r.duration(x.GetAffinity()),
		Ejection: route.Ejection{
			Failures: int(x.GetEjectionFailures()), Base: r.duration(x.GetEjectionBase()),
			MaxPercent: int(r.upTo(x.GetEjectionMaxPercent(), 100)),
		},
		Limits: route.Limits{
			Connections: int(r.upTo(x.GetMaxConnections(), math.MaxInt32)), Pending: int(r.upTo(x.GetMaxPending(), math.MaxInt32)),
			Requests: int(r.upTo(x.GetMaxRequests(), math.MaxInt32)), Retries: int(r.upTo(x.GetMaxRetries(), math.MaxInt32)),
		},
		Retry: r.retry(x.GetRetry()), Budget: r.upTo(x.GetRetryBudget(), 100), Timeout: r.duration(x.GetTimeout()),
	}
	if out.Balance > route.ConsistentHash || out.HashOn > route.HashCookie {
		r.fail("policy %q balances by %d on %d", out.Name, out.Balance, out.HashOn)
	}
	if l := x.GetRateLimit(); l != nil {
		out.RateLimit = &route.RateLimit{Requests: l.GetRequests(), Per: r.duration(l.GetPer()), Burst: l.GetBurst(), PerClient: l.GetPerClient(), ByIdentity: l.GetByIdentity()}
		if l.GetRequests() == 0 || l.GetPer() == 0 {
			r.fail("policy %q: a rate limit of %d in %s", out.Name, l.GetRequests(), out.RateLimit.Per)
		}
	}
	return out
}

func (r *reader) duration(nanos int64) time.Duration {
	if nanos < 0 {
		r.fail("a time of %d ns", nanos)
	}
	return time.Duration(nanos)
}

func (r *reader) upTo(n, limit uint32) uint32 {
	if n > limit {
		r.fail("%d is more than %d", n, limit)
	}
	return n
}
