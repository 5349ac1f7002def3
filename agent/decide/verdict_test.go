package decide

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

func TestVerdicts(t *testing.T) {
	const h, g, tcp = route.HTTPRoute, route.GRPCRoute, route.TCPRoute
	yes, resolved := Condition{True: true, Reason: Accepted}, Condition{True: true, Reason: ResolvedRefs}
	on := func(name, section string, port uint16) func(*model.Route) {
		return to(model.ParentRef{Namespace: "shop", Name: name, Section: section, Port: port})
	}
	bad, good := model.RoutePath{Kind: route.PathRegexp, Value: "("}, model.RoutePath{Kind: route.PathExact, Value: "/a"}
	const badText = "matches[0]: path: regular expression \"(\": error parsing regexp: missing closing ): `(`"
	second := func(edit func(*model.RouteRule)) func(*model.Route) {
		return func(r *model.Route) {
			r.Rules = append(r.Rules, model.RouteRule{})
			edit(&r.Rules[1])
		}
	}
	withFilters := func(f model.RouteFilters) func(*model.RouteRule) {
		return func(r *model.RouteRule) { r.Filters = &f }
	}
	both := model.RouteFilters{Redirect: &route.Redirect{}, Rewrite: &route.Rewrite{}}
	tests := []struct {
		promise  string
		route    model.Route
		others   []model.Route
		accepted Condition
		refs     Condition
		partly   *Condition
	}{
		{"a route that governs a port is accepted", aRoute(h, "shop", "a"), nil, yes, resolved, nil},
		{"so is a consumer's", aRoute(h, "lab", "a"), nil, yes, resolved, nil},
		{"a parent that is not there", aRoute(h, "shop", "a", on("nobody", "", 0)), nil, no(NoMatchingParent, "there is no Service shop/nobody"), resolved, nil},
		{"a parent without a ClusterIP", aRoute(h, "shop", "a", on("headless", "", 0)), nil, no(NoMatchingParent, "Service shop/headless is headless: its clients connect to pods, past any route"), resolved, nil},
		{"a parent outside", aRoute(h, "shop", "a", on("outside", "", 0)), nil, no(NoMatchingParent, "Service shop/outside is of type ExternalName"), resolved, nil},
		{"a port that is not there", aRoute(h, "shop", "a", on("back", "", 81)), nil, no(NoMatchingParent, "Service shop/back has no such TCP port"), resolved, nil},
		{"a sectionName of no port", aRoute(h, "shop", "a", on("back", "x", 0)), nil, no(NoMatchingParent, "Service shop/back has no such TCP port"), resolved, nil},
		{"a UDP port", aRoute(h, "shop", "a", on("back", "dns", 0)), nil, no(NoMatchingParent, "Service shop/back has no such TCP port"), resolved, nil},
		{"a weightier kind on the port", aRoute(h, "shop", "a", on("back", "", 80)), []model.Route{aRoute(g, "shop", "b")}, no(Conflicted, "GRPCRoute/shop/b governs the port"), resolved, nil},
		{"a weightier kind on one of the ports", aRoute(h, "shop", "a"), []model.Route{aRoute(g, "shop", "b", on("back", "", 80))}, yes, resolved, nil},
		{"a weightier kind that cannot be read", aRoute(h, "shop", "a"), []model.Route{aRoute(g, "shop", "b", onPaths(bad))}, yes, resolved, nil},
		{"a weightier kind of another namespace's clients", aRoute(h, "shop", "a"), []model.Route{aRoute(g, "lab", "b")}, yes, resolved, nil},
		{"a lighter kind", aRoute(h, "shop", "a"), []model.Route{aRoute(tcp, "shop", "b")}, yes, resolved, nil},
		{"an older TCPRoute", aRoute(tcp, "shop", "a", made(2)), []model.Route{aRoute(tcp, "shop", "b", made(1))}, no(Conflicted, "TCPRoute/shop/b governs the port"), resolved, nil},
		{"an older HTTPRoute", aRoute(h, "shop", "a", made(2)), []model.Route{aRoute(h, "shop", "b", made(1))}, yes, resolved, nil},
		{"an expression that does not compile", aRoute(h, "shop", "a", onPaths(bad)), nil, no(UnsupportedValue, "%s", "rules[0]: "+badText), resolved, nil},
		{"a condition that is not known", aRoute(h, "shop", "a", rule(func(r *model.RouteRule) { r.Matches = []model.RouteMatch{{Unknown: "path.type Glob"}} })), nil,
			no(UnsupportedValue, "rules[0]: matches[0]: path.type Glob is not known"), resolved, nil},
		{"one good rule, one bad", aRoute(h, "shop", "a", onPaths(good), second(func(r *model.RouteRule) { r.Matches = []model.RouteMatch{{Path: bad}} })), nil,
			yes, resolved, &Condition{True: true, Reason: UnsupportedValue, Message: "Dropped Rule: rules[1]: " + badText}},
		{"partly invalid, and not accepted", aRoute(h, "shop", "a", on("nobody", "", 0), second(func(r *model.RouteRule) { r.Matches = []model.RouteMatch{{Path: bad}} })), nil,
			no(NoMatchingParent, "there is no Service shop/nobody"), resolved, nil},
		{"what is ignored is said", aRoute(h, "shop", "a", second(func(r *model.RouteRule) { r.SessionPersistence = true })), nil,
			Condition{True: true, Reason: Accepted, Message: "rules[1]: sessionPersistence is ignored; a TrafficPolicy's loadBalancer keeps sessions, by a cookie or a header field that the application has"}, resolved, nil},
		{"filters that exclude each other", aRoute(h, "shop", "a", rule(withFilters(both))), nil,
			no(IncompatibleFilters, "rules[0]: RequestRedirect and URLRewrite exclude each other; the rule's requests are answered 500"), resolved, nil},
		{"in one rule of two", aRoute(h, "shop", "a", second(withFilters(both))), nil,
			yes, resolved, &Condition{True: true, Reason: IncompatibleFilters, Message: "Dropped Rule: rules[1]: RequestRedirect and URLRewrite exclude each other; the rule's requests are answered 500"}},
		{"a filter that is not known", aRoute(h, "shop", "a", rule(withFilters(model.RouteFilters{Unknown: []string{"ExternalAuth"}}))), nil,
			no(UnsupportedValue, "rules[0]: filters of type ExternalAuth are not known; the rule's requests are answered 500"), resolved, nil},
		{"a prefix to replace, and none that matched", aRoute(h, "shop", "a", onPaths(good), rule(withFilters(model.RouteFilters{Rewrite: &route.Rewrite{Path: &route.PathChange{Prefix: true}}}))), nil,
			no(UnsupportedValue, "rules[0]: ReplacePrefixMatch needs a rule with one match, of type PathPrefix; the rule's requests are answered 500"), resolved, nil},
		{"a second rule of a TCPRoute", aRoute(tcp, "shop", "a", second(func(*model.RouteRule) {})), nil,
			yes, resolved, &Condition{True: true, Reason: UnsupportedValue, Message: "Dropped Rule: rules[1]: a TCPRoute's first rule is for all connections"}},

		{"a backend in another namespace needs no grant", aRoute(h, "shop", "a", backendRefs(ref("lab", "v2", 80, 1))), nil, yes, resolved, nil},
		{"a backend that is not there", aRoute(h, "shop", "a", backendRefs(ref("shop", "v1", 80, 1), ref("shop", "nobody", 80, 0))), nil,
			yes, no(BackendNotFound, "rules[0].backendRefs[1]: there is no Service shop/nobody"), nil},
		{"a port that a backend has not", aRoute(h, "shop", "a", backendRefs(ref("shop", "v1", 99, 1))), nil, yes, no(BackendNotFound, "rules[0].backendRefs[0]: Service shop/v1 has no TCP port 99"), nil},
		{"no port", aRoute(h, "shop", "a", backendRefs(ref("shop", "v1", 0, 1))), nil, yes, no(BackendNotFound, "rules[0].backendRefs[0]: no port of Service shop/v1 is named"), nil},
		{"a backend of another kind", aRoute(tcp, "shop", "a", backendRefs(model.BackendRef{Target: model.Target{Kind: "example.com/Bucket", Name: "b"}})), nil,
			yes, no(InvalidKind, "rules[0].backendRefs[0]: example.com/Bucket is not a Service"), nil},
		{"a backend that is only a name", aRoute(h, "shop", "a", backendRefs(ref("shop", "outside", 80, 1))), nil, yes, no(InvalidKind, "rules[0].backendRefs[0]: Service shop/outside is of type ExternalName"), nil},
		{"a backend that does not speak HTTP", aRoute(h, "shop", "a", backendRefs(ref("lab", "v2", 33, 1))), nil,
			yes, no(UnsupportedProtocol, "rules[0].backendRefs[0]: port 33 of Service lab/v2 carries mysql, which HTTPRoutes cannot send"), nil},
		{"a mirror to nowhere", aRoute(h, "shop", "a", rule(withFilters(model.RouteFilters{Mirrors: []model.RouteMirror{{Target: model.Target{Namespace: "shop", Name: "nobody", Port: 1}}}}))), nil,
			yes, no(BackendNotFound, "rules[0].filters: there is no Service shop/nobody"), nil},
		{"an extension that nobody has", aRoute(g, "shop", "a", backendRefs(model.BackendRef{Target: ref("shop", "v1", 80, 1).Target, Filters: &model.RouteFilters{Extensions: []string{"example.com/Limit slow"}}})), nil,
			yes, no(InvalidKind, "rules[0].backendRefs[0].filters: there is no filter example.com/Limit slow; its requests are answered 500"), nil},
		{"several faults: the first's reason, all in words", aRoute(h, "shop", "a", backendRefs(ref("shop", "outside", 80, 1), ref("shop", "nobody", 80, 1))), nil,
			yes, no(InvalidKind, "rules[0].backendRefs[0]: Service shop/outside is of type ExternalName; rules[0].backendRefs[1]: there is no Service shop/nobody"), nil},
	}
	for _, tt := range tests {
		t.Run(tt.promise, func(t *testing.T) {
			m := newMesh(append(tt.others, tt.route)...)
			want := Verdict{Parent: tt.route.Parents[0], Accepted: tt.accepted, ResolvedRefs: tt.refs, PartiallyInvalid: tt.partly}
			if diff := cmp.Diff([]Verdict{want}, Verdicts(tt.route, m.routes, m.find)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestEachParentHasItsVerdict(t *testing.T) {
	r := aRoute(route.HTTPRoute, "shop", "a", to(
		model.ParentRef{Namespace: "shop", Name: "nobody"}, model.ParentRef{Namespace: "shop", Name: "back", Port: 80}, model.ParentRef{Namespace: "shop", Name: "back", Port: 90}))
	m := newMesh(r, aRoute(route.GRPCRoute, "shop", "b", to(model.ParentRef{Namespace: "shop", Name: "back", Port: 90})))
	var got []string
	for _, v := range Verdicts(r, m.routes, m.find) {
		got = append(got, v.Accepted.Reason)
	}
	if diff := cmp.Diff([]string{NoMatchingParent, Accepted, Conflicted}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
