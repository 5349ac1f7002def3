package decide

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/authz"
)

func TestAPolicyGovernsThePodsThatItSelects(t *testing.T) {
	policy := func(namespace, name string, action authz.Action, selector ...model.Requirement) model.AuthorizationPolicy {
		return model.AuthorizationPolicy{
			Namespace: namespace, Name: name, Generation: 3, Selector: selector,
			Policy: authz.Policy{Name: namespace + "/" + name, Action: action, Rules: []authz.Rule{{Ports: []uint16{80}}}},
		}
	}
	app := func(value string) model.Requirement {
		return model.Requirement{Key: "app", Operator: model.In, Values: []string{value}}
	}
	all := []model.AuthorizationPolicy{
		policy("shop", "d", authz.Deny, app("front")),
		policy("lab", "all", authz.Allow),
		policy("shop", "c", authz.Deny, app("back")),
		policy("shop", "b", authz.Allow, app("back")),
		policy("shop", "a", authz.Allow),
	}
	closed := all[3].Policy
	closed.Rules = nil
	for _, tt := range []struct {
		promise   string
		namespace string
		labels    map[string]string
		want      []authz.Policy
	}{
		{"of its namespace and its labels", "shop", map[string]string{"app": "back"}, []authz.Policy{all[4].Policy, all[3].Policy, all[2].Policy}},
		{"without labels, those that select all", "shop", map[string]string{}, []authz.Policy{all[4].Policy}},
		{"of another namespace", "lab", map[string]string{"app": "back"}, []authz.Policy{all[1].Policy}},
		{"of a namespace without policies", "empty", nil, nil},
		{"of labels that nobody knows, whatever refuses", "shop", nil, []authz.Policy{all[4].Policy, closed, all[2].Policy, all[0].Policy}},
	} {
		got, governing := Authorization(tt.namespace, tt.labels, all)
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: -want +got:\n%s", tt.promise, diff)
		}
		var want []model.Governing
		for _, p := range tt.want {
			want = append(want, model.Governing{Object: "AuthorizationPolicy/" + p.Name, Generation: 3})
		}
		if diff := cmp.Diff(want, governing); diff != "" {
			t.Errorf("%s: -want +got:\n%s", tt.promise, diff)
		}
	}
}
