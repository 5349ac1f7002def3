package decide

import (
	"cmp"
	"slices"
	"strings"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// govern are the routes that govern one port of a Service for the clients of one
// namespace, the oldest first; all are of one kind (GEP-1294, GEP-1426).
//
// Those in the clients' own namespace, consumer routes, take the place of those in
// the Service's, producer routes. Routes of other namespaces do not count.
func govern(svc model.Service, port model.ServicePort, routes []model.Route, namespace string) []prepared {
	if namespace != svc.Namespace {
		if consumers := governIn(svc, port, routes, namespace); len(consumers) > 0 {
			return consumers
		}
	}
	return governIn(svc, port, routes, svc.Namespace)
}

// governIn are the routes of one namespace that govern a port: of the weightiest
// kind that there is; of TCPRoutes, which say nothing of which connections they are
// for, the oldest.
func governIn(svc model.Service, port model.ServicePort, routes []model.Route, namespace string) []prepared {
	var out []prepared
	for _, r := range routes {
		if r.Namespace != namespace || !attached(r, svc, port) || len(out) > 0 && r.Kind > out[0].Kind {
			continue
		}
		p := prepare(r)
		switch {
		case !p.inForce():
			continue
		case len(out) > 0 && p.Kind < out[0].Kind:
			out = out[:0]
		}
		out = append(out, p)
	}
	slices.SortFunc(out, older)
	if len(out) > 1 && out[0].Kind == route.TCPRoute {
		out = out[:1]
	}
	return out
}

// older orders routes by age, then by "namespace/name".
func older(a, b prepared) int {
	return cmp.Or(a.Created.Compare(b.Created), strings.Compare(a.ID(), b.ID()))
}

// attached reports whether a parentRef of the route is to the port.
func attached(r model.Route, svc model.Service, port model.ServicePort) bool {
	return slices.ContainsFunc(r.Parents, func(p model.ParentRef) bool { return selects(p, svc, port) })
}

// selects reports whether a parentRef is to a Service's port.
func selects(p model.ParentRef, svc model.Service, port model.ServicePort) bool {
	return p.Namespace == svc.Namespace && p.Name == svc.Name && port.Protocol == model.TCP &&
		(p.Port == 0 || p.Port == port.Port) && (p.Section == "" || p.Section == port.Name)
}
