package decide

import (
	"cmp"
	"slices"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/authz"
)

// Authorization are the policies that govern a pod of a namespace, in order of their
// names, and beside them which these are. policies are all there are, in any order.
//
// Nil labels are not known: whatever might select the pod does then, but no ALLOW policy
// that might not allows anything.
func Authorization(namespace string, labels map[string]string, policies []model.AuthorizationPolicy) ([]authz.Policy, []model.Governing) {
	var out []authz.Policy
	var governing []model.Governing
	for _, p := range slices.SortedFunc(slices.Values(policies), func(a, b model.AuthorizationPolicy) int { return cmp.Compare(a.Name, b.Name) }) {
		unsure := labels == nil && len(p.Selector) > 0
		if p.Namespace != namespace || !unsure && !p.Selector.Matches(labels) {
			continue
		}
		if unsure && p.Policy.Action == authz.Allow {
			p.Policy.Rules = nil
		}
		out = append(out, p.Policy)
		governing = append(governing, model.Governing{Object: p.FullName(), Generation: p.Generation})
	}
	return out, governing
}
