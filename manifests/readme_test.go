package manifests

import (
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/route"
)

// readme is the repository's.
const readme = "../README.md"

// TestTheREADMEsExamplesAreValid: an API server takes those of our kinds, a directory all.
func TestTheREADMEsExamplesAreValid(t *testing.T) {
	examples := examplesOf(t, readme)
	ours := slices.DeleteFunc(slices.Clone(examples), func(e string) bool { return !strings.Contains(e, "policy.weirmesh.io/") })
	if len(ours) < 2 {
		t.Errorf("of our kinds there are %d", len(ours))
	}
	serverTakes(t, ours, "base/crds/policy.weirmesh.io_authorizationpolicies.yaml", "base/crds/policy.weirmesh.io_peerauthentications.yaml")
	fromDirectory(t, examples)
}

// TestTheREADMEsPoliciesLetFrontAloneCallBack, as it says.
func TestTheREADMEsPoliciesLetFrontAloneCallBack(t *testing.T) {
	store := fromDirectory(t, examplesOf(t, readme))
	for _, test := range []struct {
		app, account string
		want         bool
	}{
		{"back", "front", true},
		{"back", "ingress", false},
		{"back", "", false}, // in plaintext
		{"front", "ingress", true},
		{"front", "", true},
	} {
		labels := map[string]string{"app": test.app}
		mode, _, _ := store.Peers("shop", test.app, "", labels)
		policies, _ := store.Authorization("shop", test.app, "", labels)
		set, err := authz.Compile("cluster.local", policies)
		if err != nil {
			t.Fatal(err)
		}
		caller := authz.Identity{}
		if test.account != "" {
			caller = authz.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: test.account}
		}
		if got := set.Evaluate(caller, 8080, nil).Allowed; got != test.want {
			t.Errorf("%q calls %s: %t, want %t", test.account, test.app, got, test.want)
		}
		if strict := mode == route.Strict; strict != (test.app == "back") {
			t.Errorf("%s is in mode %d", test.app, mode)
		}
	}
}
