package decide

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// governing is what is part of what a namespace's clients are told of a port of
// shop/back.
func (m mesh) governing(t *testing.T, namespace string, port uint16) []model.Governing {
	t.Helper()
	return Governing(m.dial(t, namespace, port), m.services["shop/back"], port, m.routes, m.about)
}

// TestARouteGovernsForTheParentsThatAreThePort: several of them name it, by its number,
// by its name or as any; another port's does not.
func TestARouteGovernsForTheParentsThatAreThePort(t *testing.T) {
	back := func(section string, port uint16) model.ParentRef {
		return model.ParentRef{Namespace: "shop", Name: "back", Section: section, Port: port}
	}
	r := aRoute(route.HTTPRoute, "shop", "canary", to(back("", 80), back("", 90), back("web", 0), back("", 0), model.ParentRef{Namespace: "lab", Name: "v2"}))
	r.Generation = 3
	m := newMesh(r, aRoute(route.TCPRoute, "shop", "loser"), aRoute(route.HTTPRoute, "yard", "theirs"))
	for port, parents := range map[uint16][]string{
		80: {"shop/back:80", "shop/back:web", "shop/back"},
		90: {"shop/back:90", "shop/back"},
		7:  nil,
	} {
		var want []model.Governing
		for _, p := range parents {
			want = append(want, model.Governing{Object: "HTTPRoute/shop/canary", Parent: p, Generation: 3})
		}
		if diff := cmp.Diff(want, m.governing(t, "shop", port)); diff != "" {
			t.Errorf("port %d (-want +got):\n%s", port, diff)
		}
	}
	if diff := cmp.Diff([]model.Governing{{Object: "HTTPRoute/yard/theirs", Parent: "shop/back"}}, m.governing(t, "yard", 80)); diff != "" {
		t.Errorf("to clients with a route of their own (-want +got):\n%s", diff)
	}
}

// TestAPolicyGovernsWhoeverIsToldOfItsService: to clients of that Service, and of one
// whose routes send or copy to it; but not what its own pods alone do.
func TestAPolicyGovernsWhoeverIsToldOfItsService(t *testing.T) {
	perClient := route.Policy{RateLimit: &route.RateLimit{Requests: 1, Per: time.Second, PerClient: true}}
	mirror := func(namespace, name string) *model.RouteFilters {
		return &model.RouteFilters{Mirrors: []model.RouteMirror{{Target: model.Target{Namespace: namespace, Name: name, Port: 80}, Numerator: 1, Denominator: 1}}}
	}
	toV1 := ref("shop", "v1", 80, 1)
	copiedToV2 := toV1
	copiedToV2.Filters = mirror("lab", "v2")
	limited := perClient
	limited.Budget = 30
	for _, tt := range []struct {
		promise  string
		routes   []model.Route
		policies []model.TrafficPolicy
		want     []string
	}{
		{"that of the Service", nil, []model.TrafficPolicy{aPolicy("shop", "a", "back", 1, route.Policy{}), aPolicy("shop", "b", "v1", 1, route.Policy{})},
			[]string{"TrafficPolicy/shop/a"}},
		{"of two the one in force", nil, []model.TrafficPolicy{aPolicy("shop", "a", "back", 2, route.Policy{}), aPolicy("shop", "b", "back", 1, route.Policy{})},
			[]string{"TrafficPolicy/shop/b"}},
		{"a backend's, once", []model.Route{aRoute(route.HTTPRoute, "shop", "canary", backendRefs(toV1, toV1))}, []model.TrafficPolicy{aPolicy("shop", "a", "v1", 1, route.Policy{})},
			[]string{"HTTPRoute/shop/canary", "TrafficPolicy/shop/a"}},
		{"a backend's mirror's", []model.Route{aRoute(route.HTTPRoute, "shop", "canary", backendRefs(copiedToV2))}, []model.TrafficPolicy{aPolicy("lab", "a", "v2", 1, route.Policy{})},
			[]string{"HTTPRoute/shop/canary", "TrafficPolicy/lab/a"}},
		{"a rule's mirror's", []model.Route{aRoute(route.HTTPRoute, "shop", "canary", rule(func(r *model.RouteRule) { r.Filters = mirror("lab", "v2") }))},
			[]model.TrafficPolicy{aPolicy("lab", "a", "v2", 1, route.Policy{})}, []string{"HTTPRoute/shop/canary", "TrafficPolicy/lab/a"}},
		{"not one that only pods keep", nil, []model.TrafficPolicy{aPolicy("shop", "a", "back", 1, perClient)}, nil},
		{"but one that clients keep too", nil, []model.TrafficPolicy{aPolicy("shop", "a", "back", 1, limited)}, []string{"TrafficPolicy/shop/a"}},
	} {
		m := newMesh(tt.routes...)
		m.policies = tt.policies
		var got []string
		for _, g := range m.governing(t, "shop", 80) {
			got = append(got, g.Object)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.promise, diff)
		}
	}
}
