package decide

import (
	"slices"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// resolver resolves references for one destination.
type resolver struct {
	find       Lookup
	policies   Policies
	client     Client
	ip4        bool // endpoints are of the family that was dialled
	parent     route.Backend
	parentPort model.ServicePort
}

// flatten makes one table of the routes that govern a port, with all their matches
// in order of precedence. The routes are the oldest first.
func (x resolver) flatten(governing []prepared) *route.Routes {
	out := &route.Routes{Kind: governing[0].Kind}
	for _, r := range governing {
		for _, rule := range r.rules {
			for _, m := range rule.matches {
				m.Rule = len(out.Rules)
				out.Matches = append(out.Matches, m)
			}
			out.Rules = append(out.Rules, x.rule(r, rule))
		}
	}
	// Stable: what is left equal stays in the order of age, name, rule and match.
	weight := httpWeight
	if out.Kind == route.GRPCRoute {
		weight = grpcWeight
	}
	slices.SortStableFunc(out.Matches, func(a, b route.Match) int { return slices.Compare(weight(b), weight(a)) })
	return out
}

// A weight is a match's precedence: of two, the one whose first number that differs
// is greater goes first. The Gateway API leaves open where regular expressions
// stand: here behind what is exact, before the rest, the longer first.

func httpWeight(m route.Match) []int {
	path := []int{0, len(m.Path.Value)} // a prefix, or none
	switch m.Path.Kind {
	case route.PathExact:
		path = []int{2, 0} // two that are met by one path are equal
	case route.PathRegexp:
		path = []int{1, len(m.Path.Regexp.String())}
	}
	return append(path, min(len(m.Method), 1), len(m.Headers), len(m.Query))
}

func grpcWeight(m route.Match) []int {
	g := m.GRPC
	if g == nil {
		g = &route.Method{}
	}
	return slices.Concat(nameWeight(g.Service, g.ServiceRegexp), nameWeight(g.Method, g.MethodRegexp), []int{len(m.Headers)})
}

func nameWeight(exact string, expression *route.Regexp) []int {
	switch {
	case exact != "":
		return []int{2, len(exact)}
	case expression != nil:
		return []int{1, len(expression.String())}
	}
	return []int{0, 0}
}

func (x resolver) rule(r prepared, rule preparedRule) route.Rule {
	out := route.Rule{
		Route: r.FullName(), Name: rule.Name, Filters: x.filters(r.Kind, rule.Filters),
		Timeout: rule.Timeout, BackendTimeout: rule.BackendTimeout, Retry: rule.Retry,
	}
	out.Filters.Invalid = out.Filters.Invalid || rule.invalid
	if len(rule.Backends) == 0 {
		parent := x.parent
		parent.Protocol, _ = carried(r.Kind, x.parentPort)
		out.Backends = []route.WeightedBackend{{Weight: 1, Backend: parent}}
	}
	for _, ref := range rule.Backends {
		out.Backends = append(out.Backends, route.WeightedBackend{
			Weight: ref.Weight, Backend: x.resolve(r.Kind, ref.Target), Filters: x.filters(r.Kind, ref.Filters),
		})
	}
	return out
}

func (x resolver) filters(k route.Kind, f *model.RouteFilters) route.Filters {
	if f == nil {
		return route.Filters{}
	}
	out := route.Filters{
		RequestHeaders: f.RequestHeaders, ResponseHeaders: f.ResponseHeaders,
		Redirect: f.Redirect, Rewrite: f.Rewrite, CORS: f.CORS,
		Invalid: len(f.Extensions)+len(f.Unknown) > 0,
	}
	for _, m := range f.Mirrors {
		if backend := x.resolve(k, m.Target); !backend.Invalid && m.Numerator > 0 {
			out.Mirrors = append(out.Mirrors, route.Mirror{Backend: backend, Numerator: m.Numerator, Denominator: m.Denominator})
		}
	}
	return out
}

// resolve finds what a reference is to, for a route of a kind. If that is nothing
// that its requests can go to, the Backend is Invalid.
func (x resolver) resolve(k route.Kind, t model.Target) route.Backend {
	svc, endpointSlices, port, reason, _ := target(k, t, x.find)
	if reason != "" {
		return route.Backend{Service: t.ID(), Invalid: true}
	}
	protocol, _ := carried(k, port)
	return route.Backend{
		Service: svc.ID(), Endpoints: endpoints(svc, port, endpointSlices, x.ip4, x.client), Protocol: protocol, Policy: policy(svc, x.policies),
	}
}
