package decide

import (
	"fmt"
	"strings"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// prepared is a route with its matches ready for use, and what is wrong with it.
type prepared struct {
	model.Route
	rules  []preparedRule
	faults []fault
}

// preparedRule is a rule that is in force.
type preparedRule struct {
	model.RouteRule
	matches []route.Match // in order; their Rule is not set
	invalid bool          // it has a filter that cannot be applied: 500
}

// fault is why a rule does not do what it says.
type fault struct {
	rule   int
	reason string
	text   string
}

// prepare reads a route's rules. One whose matches cannot be compared is left out.
// One whose filters cannot be applied stays and is invalid, since a filter is never
// skipped.
func prepare(r model.Route) prepared {
	out := prepared{Route: r}
	for i, rule := range r.Rules {
		if r.Kind == route.TCPRoute && i > 0 {
			out.faults = append(out.faults, fault{i, UnsupportedValue, "a TCPRoute's first rule is for all connections"})
			continue
		}
		p := preparedRule{RouteRule: rule}
		var err error
		if p.matches, err = matches(r.Kind, rule.Matches); err != nil {
			out.faults = append(out.faults, fault{i, UnsupportedValue, err.Error()})
			continue
		}
		if reason, text := badFilters(rule); reason != "" {
			p.invalid = true
			out.faults = append(out.faults, fault{i, reason, text + "; the rule's requests are answered 500"})
		}
		out.rules = append(out.rules, p)
	}
	return out
}

// inForce reports whether the route governs anything. A GRPCRoute without rules
// does: none of them matches any request.
func (p prepared) inForce() bool {
	return len(p.rules) > 0 || len(p.Rules) == 0 && p.Kind == route.GRPCRoute
}

// matches are a rule's conditions, compiled. A rule of an HTTPRoute or a GRPCRoute
// without any is met by all requests.
func matches(k route.Kind, in []model.RouteMatch) ([]route.Match, error) {
	if k == route.TCPRoute {
		return nil, nil
	}
	if len(in) == 0 {
		return []route.Match{{}}, nil
	}
	out := make([]route.Match, len(in))
	for i, m := range in {
		var err error
		if out[i], err = match(m); err != nil {
			return nil, fmt.Errorf("matches[%d]: %w", i, err)
		}
	}
	return out, nil
}

func match(m model.RouteMatch) (route.Match, error) {
	if m.Unknown != "" {
		return route.Match{}, fmt.Errorf("%s is not known", m.Unknown)
	}
	out := route.Match{Method: m.Method, Path: route.Path{Kind: m.Path.Kind, Value: m.Path.Value}}
	var err error
	switch m.Path.Kind {
	case route.PathRegexp:
		out.Path.Value = ""
		if out.Path.Regexp, err = route.CompileWhole(m.Path.Value); err != nil {
			return route.Match{}, fmt.Errorf("path: %w", err)
		}
	case route.PathPrefix:
		if out.Path.Value = strings.TrimSuffix(m.Path.Value, "/"); out.Path.Value == "" {
			out.Path = route.Path{}
		}
	}
	if g := m.GRPC; g != nil {
		if out.GRPC, err = grpcMethod(*g); err != nil {
			return route.Match{}, fmt.Errorf("method: %w", err)
		}
	}
	if out.Headers, err = values(m.Headers, strings.ToLower); err != nil {
		return route.Match{}, fmt.Errorf("headers: %w", err)
	}
	if out.Query, err = values(m.Query, func(name string) string { return name }); err != nil {
		return route.Match{}, fmt.Errorf("queryParams: %w", err)
	}
	return out, nil
}

func grpcMethod(g model.GRPCMethod) (*route.Method, error) {
	if !g.Regexp {
		return &route.Method{Service: g.Service, Method: g.Method}, nil
	}
	out := &route.Method{}
	var err error
	if g.Service != "" {
		if out.ServiceRegexp, err = route.CompileWhole(g.Service); err != nil {
			return nil, err
		}
	}
	if g.Method != "" {
		if out.MethodRegexp, err = route.CompileWhole(g.Method); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// values are conditions on names; of several on one name, the first counts.
func values(in []model.RouteValue, canonical func(string) string) ([]route.Value, error) {
	var out []route.Value
	seen := map[string]bool{}
	for _, v := range in {
		name := canonical(v.Name)
		if seen[name] {
			continue
		}
		seen[name] = true
		if !v.Regexp {
			out = append(out, route.Value{Name: name, Value: v.Value})
			continue
		}
		compiled, err := route.CompileWhole(v.Value)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", v.Name, err)
		}
		out = append(out, route.Value{Name: name, Regexp: compiled})
	}
	return out, nil
}

// badFilters says, as a reason of a condition and in words, why a rule's filters, or those of its backends, cannot be
// applied. An ExtensionRef is not looked at: it is a reference that does not
// resolve, of a rule that is well formed.
func badFilters(rule model.RouteRule) (string, string) {
	redirect, rewrite := false, false
	levels := []*model.RouteFilters{rule.Filters}
	for _, b := range rule.Backends {
		levels = append(levels, b.Filters)
	}
	for _, f := range levels {
		switch {
		case f == nil:
			continue
		case len(f.Unknown) > 0:
			return UnsupportedValue, fmt.Sprintf("filters of type %s are not known", f.Unknown[0])
		case replacesPrefix(f) && !onePrefix(rule.Matches):
			return UnsupportedValue, "ReplacePrefixMatch needs a rule with one match, of type PathPrefix"
		}
		redirect, rewrite = redirect || f.Redirect != nil, rewrite || f.Rewrite != nil
	}
	if redirect && rewrite {
		return IncompatibleFilters, "RequestRedirect and URLRewrite exclude each other"
	}
	return "", ""
}

func replacesPrefix(f *model.RouteFilters) bool {
	return f.Redirect != nil && f.Redirect.Path != nil && f.Redirect.Path.Prefix ||
		f.Rewrite != nil && f.Rewrite.Path != nil && f.Rewrite.Path.Prefix
}

// onePrefix: a rule without matches has one, the default: the prefix "/".
func onePrefix(matches []model.RouteMatch) bool {
	return len(matches) == 0 || len(matches) == 1 && matches[0].Path.Kind == route.PathPrefix
}
