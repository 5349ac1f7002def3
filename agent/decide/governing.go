package decide

import (
	"iter"
	"slices"
	"strings"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// Governing is what the destination at a Service's port is made of: those of the routes
// that are in it, each once for every parent of it that is that port, and the policies
// of the Service and of all backends, as far as they tell clients anything.
func Governing(d route.Destination, svc model.Service, number uint16, routes []model.Route, policies Policies) []model.Governing {
	port, ok := tcpPort(svc, number)
	if !ok {
		return nil
	}
	var out []model.Governing
	for _, r := range routes {
		name := r.FullName()
		if d.Routes == nil || !slices.ContainsFunc(d.Routes.Rules, func(rule route.Rule) bool { return rule.Route == name }) {
			continue
		}
		for _, p := range r.Parents {
			if selects(p, svc, port) {
				out = append(out, model.Governing{Object: name, Parent: p.String(), Generation: r.Generation})
			}
		}
	}
	seen := map[string]bool{}
	for b := range backendsOf(d) {
		if b.Policy == nil || seen[b.Service] {
			continue
		}
		seen[b.Service] = true
		namespace, name, _ := strings.Cut(b.Service, "/")
		if p, ok := inForce(policies(namespace, name)); ok && !forPodsAlone(p) {
			out = append(out, governingPolicy(p))
		}
	}
	return out
}

func governingPolicy(p model.TrafficPolicy) model.Governing {
	return model.Governing{Object: p.FullName(), Generation: p.Generation}
}

// forPodsAlone reports whether all that a policy says is a limit that the Service's own
// pods keep.
func forPodsAlone(p model.TrafficPolicy) bool {
	limit := p.Policy.RateLimit
	return limit != nil && limit.PerClient && p.Policy == route.Policy{Name: p.Policy.Name, RateLimit: limit}
}

// backendsOf are the Service's port itself and all that the rules of its routes send to,
// or copy to.
func backendsOf(d route.Destination) iter.Seq[route.Backend] {
	return func(yield func(route.Backend) bool) {
		if !yield(d.Backend()) || d.Routes == nil {
			return
		}
		mirrors := func(f route.Filters) bool {
			return !slices.ContainsFunc(f.Mirrors, func(m route.Mirror) bool { return !yield(m.Backend) })
		}
		for _, rule := range d.Routes.Rules {
			if !mirrors(rule.Filters) {
				return
			}
			for _, b := range rule.Backends {
				if !yield(b.Backend) || !mirrors(b.Filters) {
					return
				}
			}
		}
	}
}
