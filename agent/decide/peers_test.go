package decide

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// demandOf is a policy of an age: the older the higher.
func demandOf(namespace, name string, age int, selector ...model.Requirement) model.PeerAuthentication {
	return model.PeerAuthentication{
		Namespace: namespace, Name: name, Generation: 3, Selector: selector,
		Created: time.Date(2030, 1, 1, 0, -age, 0, 0, time.UTC),
	}
}

func all(mode route.PeerMode, p model.PeerAuthentication) model.PeerAuthentication {
	p.Mode = &mode
	return p
}

func on(port uint16, mode route.PeerMode, p model.PeerAuthentication) model.PeerAuthentication {
	p.Ports = map[uint16]route.PeerMode{port: mode}
	return p
}

func TestWhatIsDemandedOfCallers(t *testing.T) {
	const root, p, s, d = "weir-system", route.Permissive, route.Strict, route.Disable
	back := model.Requirement{Key: "app", Operator: model.In, Values: []string{"back"}}
	front := model.Requirement{Key: "app", Operator: model.In, Values: []string{"front"}}
	of := map[string]string{"app": "back"}
	mesh := all(s, demandOf(root, "mesh", 1))
	namespace := all(d, demandOf("shop", "ns", 1))
	workload := all(p, demandOf("shop", "w", 1, back))
	closed := demandOf("shop", "bad", 1)
	closed.Closed = true
	type policies = []model.PeerAuthentication
	type ports = map[uint16]route.PeerMode
	for _, tt := range []struct {
		promise  string
		labels   map[string]string
		policies policies
		mode     route.PeerMode
		byPort   ports
		by       []string
	}{
		{"nobody says anything", of, nil, p, nil, nil},
		{"the mesh does", of, policies{mesh}, s, nil, []string{root + "/mesh"}},
		{"the namespace before the mesh", of, policies{mesh, namespace}, d, nil, []string{"shop/ns"}},
		{"the workload before the namespace", of, policies{mesh, namespace, workload}, p, nil, []string{"shop/w"}},
		{"a port before the workload, and the rest as the namespace has it", of, policies{namespace, on(80, s, demandOf("shop", "a", 1, back))}, d, ports{80: s}, []string{"shop/a", "shop/ns"}},
		{"a port of a younger one than what says it of all", of, policies{all(s, demandOf("shop", "b", 2, back)), on(80, p, demandOf("shop", "a", 1, back))}, s, ports{80: p}, []string{"shop/b", "shop/a"}},
		{"the oldest among equals", of, policies{all(s, demandOf("shop", "a", 1)), all(d, demandOf("shop", "b", 2))}, d, nil, []string{"shop/b"}},
		{"the first by name of the same age", of, policies{all(d, demandOf("shop", "b", 1)), all(s, demandOf("shop", "a", 1))}, s, nil, []string{"shop/a"}},
		{"the oldest of a port", of, policies{on(80, p, demandOf("shop", "a", 1, back)), on(80, s, demandOf("shop", "b", 2, back))}, p, ports{80: s}, []string{"shop/b"}},
		{"not of other pods, nor of other namespaces", of, policies{all(s, demandOf("shop", "a", 1, front)), all(s, demandOf("lab", "b", 1)), all(s, demandOf(root, "c", 1, back))}, p, nil, nil},
		{"what cannot be read is Strict before all others", of, policies{workload, on(80, d, demandOf("shop", "a", 5, back)), closed}, s, nil, []string{"shop/a", "shop/w", "shop/bad"}},
		{"of unknown labels, what is Strict of whom it may be about", nil, policies{namespace, all(s, demandOf("shop", "a", 1, front))}, s, nil, []string{"shop/a"}},
		{"of unknown labels, the same of a port", nil, policies{namespace, on(80, s, demandOf("shop", "a", 1, front))}, d, ports{80: s}, []string{"shop/a", "shop/ns"}},
		{"of unknown labels, nothing that is not", nil, policies{mesh, workload, on(80, d, demandOf("shop", "a", 1, back))}, s, nil, []string{root + "/mesh"}},
	} {
		mode, byPort, governing := Peers(root, "shop", tt.labels, tt.policies)
		if mode != tt.mode || len(byPort) != len(tt.byPort) || len(tt.byPort) > 0 && !cmp.Equal(byPort, tt.byPort) {
			t.Errorf("%s: %d %v, want %d %v", tt.promise, mode, byPort, tt.mode, tt.byPort)
		}
		var by []string
		for _, g := range governing {
			if g.Generation != 3 {
				t.Errorf("%s: %+v", tt.promise, g)
			}
			by = append(by, g.Object[len("PeerAuthentication/"):])
		}
		if diff := cmp.Diff(tt.by, by); diff != "" {
			t.Errorf("%s: -want +got:\n%s", tt.promise, diff)
		}
	}
}
