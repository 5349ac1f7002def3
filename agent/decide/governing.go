package decide

import (
	"slices"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// Governing are those of the routes that are in the destination at a Service's port,
// each once for every parent of it that is that port.
func Governing(d route.Destination, svc model.Service, number uint16, routes []model.Route) []model.Governing {
	port, ok := tcpPort(svc, number)
	if !ok || d.Routes == nil {
		return nil
	}
	var out []model.Governing
	for _, r := range routes {
		name := r.FullName()
		if !slices.ContainsFunc(d.Routes.Rules, func(rule route.Rule) bool { return rule.Route == name }) {
			continue
		}
		for _, p := range r.Parents {
			if selects(p, svc, port) {
				out = append(out, model.Governing{Object: name, Parent: p.String(), Generation: r.Generation})
			}
		}
	}
	return out
}
