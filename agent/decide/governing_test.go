package decide

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// governing is what is part of what a namespace's clients are told of a port of
// shop/back.
func (m mesh) governing(t *testing.T, namespace string, port uint16) []model.Governing {
	t.Helper()
	return Governing(m.dial(t, namespace, port), m.services["shop/back"], port, m.routes)
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
