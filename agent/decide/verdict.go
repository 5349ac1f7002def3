package decide

import (
	"cmp"
	"fmt"
	"strings"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// Reasons of conditions, as the Gateway API has them (v1.6, RouteConditionReason).
// Conflicted is that of GEP-1426. References are not refused for their namespace:
// in a mesh, ReferenceGrants do not count (GEP-1294).
const (
	Accepted            = "Accepted"
	NoMatchingParent    = "NoMatchingParent"
	UnsupportedValue    = "UnsupportedValue"
	IncompatibleFilters = "IncompatibleFilters"
	Conflicted          = "Conflicted"

	ResolvedRefs        = "ResolvedRefs"
	BackendNotFound     = "BackendNotFound"
	InvalidKind         = "InvalidKind"
	UnsupportedProtocol = "UnsupportedProtocol"
)

// Condition is what is said of one aspect of a route.
type Condition struct {
	True            bool
	Reason, Message string
}

// Verdict is what is said of a route with regard to one of its parents.
type Verdict struct {
	Parent                 model.ParentRef
	Accepted, ResolvedRefs Condition
	PartiallyInvalid       *Condition // nil: it is not; never false
}

// Verdicts judges a route, once for each of its parents and in their order. routes
// are all that name any of these parents too, in any order; the route itself may be
// among them.
func Verdicts(r model.Route, routes []model.Route, find Lookup) []Verdict {
	p, refs := prepare(r), resolvedRefs(r, find)
	out := make([]Verdict, len(r.Parents))
	for i, parent := range r.Parents {
		out[i] = Verdict{Parent: parent, ResolvedRefs: refs, Accepted: accepted(p, parent, routes, find)}
		if out[i].Accepted.True {
			out[i].Accepted.Message = withoutEffect(r)
			out[i].PartiallyInvalid = partiallyInvalid(p)
		}
	}
	return out
}

func no(reason, format string, args ...any) Condition {
	return Condition{Reason: reason, Message: fmt.Sprintf(format, args...)}
}

func accepted(p prepared, parent model.ParentRef, routes []model.Route, find Lookup) Condition {
	if len(p.Rules) > 0 && len(p.faults) == len(p.Rules) {
		return no(p.faults[0].reason, "%s", rules(p.faults))
	}
	id := parent.Namespace + "/" + parent.Name
	svc, _, ok := find(parent.Namespace, parent.Name)
	switch {
	case !ok:
		return no(NoMatchingParent, "there is no Service %s", id)
	case svc.External:
		return no(NoMatchingParent, "Service %s is of type ExternalName", id)
	case len(svc.ClusterIPs) == 0:
		return no(NoMatchingParent, "Service %s is headless: its clients connect to pods, past any route", id)
	}
	ports, winner := 0, ""
	for _, port := range svc.Ports {
		if !selects(parent, svc, port) {
			continue
		}
		ports++
		governing := governIn(svc, port, routes, p.Namespace)
		for _, g := range governing {
			if g.Kind == p.Kind && g.ID() == p.ID() {
				return Condition{True: true, Reason: Accepted}
			}
		}
		if len(governing) > 0 && winner == "" {
			winner = governing[0].FullName()
		}
	}
	switch {
	case ports == 0:
		return no(NoMatchingParent, "Service %s has no such TCP port", id)
	case winner != "":
		return no(Conflicted, "%s governs the port", winner)
	}
	return Condition{True: true, Reason: Accepted}
}

// withoutEffect says what of a route that is accepted does nothing: support for it is
// extended, and a route that asks for it is not refused.
func withoutEffect(r model.Route) string {
	var texts []string
	for i, rule := range r.Rules {
		if rule.SessionPersistence {
			texts = append(texts, fmt.Sprintf("rules[%d]: sessionPersistence is ignored; "+
				"a TrafficPolicy's loadBalancer keeps sessions, by a cookie or a header field that the application has", i))
		}
	}
	return strings.Join(texts, "; ")
}

// partiallyInvalid says which of a route's rules are invalid, if others are valid.
func partiallyInvalid(p prepared) *Condition {
	if len(p.faults) == 0 {
		return nil
	}
	return &Condition{True: true, Reason: p.faults[0].reason, Message: "Dropped Rule: " + rules(p.faults)}
}

func rules(faults []fault) string {
	texts := make([]string, len(faults))
	for i, f := range faults {
		texts[i] = fmt.Sprintf("rules[%d]: %s", f.rule, f.text)
	}
	return strings.Join(texts, "; ")
}

// resolvedRefs says whether all that a route refers to is there. Of several faults
// it tells all, with the first one's reason.
func resolvedRefs(r model.Route, find Lookup) Condition {
	var reason string
	var texts []string
	bad := func(where, why, text string) {
		reason = cmp.Or(reason, why)
		texts = append(texts, where+": "+text)
	}
	look := func(where string, t model.Target) {
		if _, _, _, why, text := target(r.Kind, t, find); why != "" {
			bad(where, why, text)
		}
	}
	filters := func(where string, f *model.RouteFilters) {
		if f == nil {
			return
		}
		for _, e := range f.Extensions {
			bad(where+".filters", InvalidKind, "there is no filter "+e+"; its requests are answered 500")
		}
		for _, m := range f.Mirrors {
			look(where+".filters", m.Target)
		}
	}
	for i, rule := range r.Rules {
		filters(fmt.Sprintf("rules[%d]", i), rule.Filters)
		for j, b := range rule.Backends {
			where := fmt.Sprintf("rules[%d].backendRefs[%d]", i, j)
			look(where, b.Target)
			filters(where, b.Filters)
		}
	}
	if reason != "" {
		return no(reason, "%s", strings.Join(texts, "; "))
	}
	return Condition{True: true, Reason: ResolvedRefs}
}

// target finds the Service and the port that a reference of a route of a kind is
// to. If that is nothing that the route's requests can go to, it says why: as a
// reason of the condition ResolvedRefs, and in words.
func target(k route.Kind, t model.Target, find Lookup) (model.Service, []model.EndpointSlice, model.ServicePort, string, string) {
	fail := func(reason, format string, args ...any) (model.Service, []model.EndpointSlice, model.ServicePort, string, string) {
		return model.Service{}, nil, model.ServicePort{}, reason, fmt.Sprintf(format, args...)
	}
	if t.Kind != "" {
		return fail(InvalidKind, "%s is not a Service", t.Kind)
	}
	svc, endpointSlices, ok := find(t.Namespace, t.Name)
	switch {
	case !ok:
		return fail(BackendNotFound, "there is no Service %s", t.ID())
	case svc.External:
		return fail(InvalidKind, "Service %s is of type ExternalName", t.ID())
	case t.Port == 0:
		return fail(BackendNotFound, "no port of Service %s is named", t.ID())
	}
	port, ok := tcpPort(svc, t.Port)
	if !ok {
		return fail(BackendNotFound, "Service %s has no TCP port %d", t.ID(), t.Port)
	}
	if _, ok := carried(k, port); !ok {
		return fail(UnsupportedProtocol, "port %d of Service %s carries %s, which %ss cannot send", t.Port, t.ID(), port.AppProtocol, model.KindName(k))
	}
	return svc, endpointSlices, port, "", ""
}
