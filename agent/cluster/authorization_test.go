package cluster

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/agent/api/v1alpha1"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/authz"
)

// authzCRD is what an API server judges AuthorizationPolicies by.
const authzCRD = "../../manifests/base/crds/policy.weirmesh.io_authorizationpolicies.yaml"

func authzDocument(spec string) string {
	return "apiVersion: policy.weirmesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {namespace: shop, name: p}\nspec: {" + spec + "}\n"
}

// TestAuthorizationThatAnAPIServerWouldRefuse has one mistake in each policy, and beside it
// the nearest value that is none.
func TestAuthorizationThatAnAPIServerWouldRefuse(t *testing.T) {
	rule := func(r string) string { return "action: ALLOW, rules: [{" + r + "}]" }
	source := func(s string) string { return rule("sources: [{" + s + "}]") }
	http := func(h string) string { return rule("http: {" + h + "}") }
	selector := func(s string) string { return "action: ALLOW, podSelector: {" + s + "}" }
	expression := func(e string) string { return selector("matchExpressions: [{" + e + "}]") }
	account := func(a string) string { return source("type: ServiceAccount, serviceAccount: {" + a + "}") }
	spiffe := func(id string) string { return source("type: SPIFFE, spiffe: '" + id + "'") }
	list := func(n int, entry string) string { return "[" + strings.Repeat(entry+",", n-1) + entry + "]" }
	long := strings.Repeat("x", 400)
	const r, unknown = "spec.rules[0].", `unknown field "spec.`
	tests := []struct{ good, bad, want string }{
		{"action: ALLOW", "rules: []", "spec.action:  is none of [ALLOW DENY]"},
		{"action: DENY", "action: Deny", "spec.action: Deny is none of [ALLOW DENY]"},
		{"action: ALLOW, audit: true", "action: ALLOW, audit: 'yes'", "json: cannot unmarshal string"},
		{"action: ALLOW, rules: " + list(32, "{}"), "action: ALLOW, rules: " + list(33, "{}"), "spec.rules: 33 are more than 32"},
		{"action: ALLOW, rules: [{}]", "action: ALLOW, rules: [null]", "spec.rules[0]: is null"},
		{"action: ALLOW, rules: [{}]", "action: ALLOW, rules: [{from: []}]", unknown + `rules[0].from"`},
		{rule("sources: []"), rule("sources: [{}]"), r + "sources[0].type:  is none of [ServiceAccount SPIFFE]"},
		{rule("sources: " + list(64, "{type: ServiceAccount, serviceAccount: {name: a}}")), rule("sources: " + list(65, "{type: ServiceAccount, serviceAccount: {name: a}}")), r + "sources: 65 are more than 64"},
		{account("name: a"), source("type: ServiceAccount"), r + "sources[0]: serviceAccount is what type ServiceAccount needs, and no other has"},
		{account("name: a"), source("type: SPIFFE, serviceAccount: {name: a}, spiffe: 'spiffe://a/ns/b/sa/c'"), r + "sources[0]: serviceAccount is what type ServiceAccount needs, and no other has"},
		{account("name: '*'"), account("name: 'a*'"), r + "sources[0].serviceAccount.name: \"a*\" does not match"},
		{account("name: a.b-c"), account("namespace: a"), r + "sources[0].serviceAccount.name: is missing"},
		{account("name: a, namespace: shop"), account("name: a, namespace: '*'"), r + "sources[0].serviceAccount.namespace: \"*\" does not match"},
		{account("name: " + long[:253]), account("name: " + long[:254]), r + "sources[0].serviceAccount.name: is longer than 253 characters"},
		{spiffe("spiffe://a/ns/b/sa/c"), source("type: SPIFFE"), r + "sources[0]: spiffe is what type SPIFFE needs, and no other has"},
		{spiffe("spiffe://a/ns/b/sa/c"), source("type: ServiceAccount, serviceAccount: {name: a}, spiffe: 'spiffe://a/ns/b/sa/c'"), r + "sources[0]: spiffe is what type SPIFFE needs, and no other has"},
		{spiffe("spiffe://a.b_c/ns/b/sa/*"), spiffe("spiffe://a/ns/*/sa/c"), r + "sources[0].spiffe: \"spiffe://a/ns/*/sa/c\" does not match"},
		{spiffe("spiffe://a/ns/b/sa/c.d"), spiffe("spiffe://a/ns/b/sa/c/d"), r + "sources[0].spiffe: \"spiffe://a/ns/b/sa/c/d\" does not match"},
		{spiffe("spiffe://a/ns/b/sa/c"), spiffe("https://a/ns/b/sa/c"), r + "sources[0].spiffe: \"https://a/ns/b/sa/c\" does not match"},
		{spiffe("spiffe://a/ns/b/sa/c"), spiffe("spiffe://A/ns/b/sa/c"), r + "sources[0].spiffe: \"spiffe://A/ns/b/sa/c\" does not match"},
		{rule("networkAttributes: {}"), rule("networkAttributes: {ports: []}"), r + "networkAttributes.ports: number of ports: 0 is not between 1 and 32"},
		{rule("networkAttributes: {ports: [1, 65535]}"), rule("networkAttributes: {ports: [1, 65536]}"), r + "networkAttributes.ports[1]: 65536 is not between 1 and 65535"},
		{rule("networkAttributes: {ports: [1]}"), rule("networkAttributes: {ports: [0]}"), r + "networkAttributes.ports[0]: 0 is not between 1 and 65535"},
		{rule("networkAttributes: {ports: " + list(32, "80") + "}"), rule("networkAttributes: {ports: " + list(33, "80") + "}"), r + "networkAttributes.ports: number of ports: 33 is not between 1 and 32"},
		{http(""), http("methods: []"), r + "http.methods: number of methods: 0 is not between 1 and 16"},
		{http("methods: [GET, VERSION-CONTROL]"), http("methods: [GET, get]"), r + "http.methods[1]: \"get\" does not match"},
		{http("methods: [GET]"), http("methods: ['']"), r + "http.methods[0]: is missing"},
		{http("methods: " + list(16, "GET")), http("methods: " + list(17, "GET")), r + "http.methods: number of methods: 17 is not between 1 and 16"},
		{http("paths: [{type: Exact, value: /}]"), http("paths: []"), r + "http.paths: number of paths: 0 is not between 1 and 32"},
		{http("paths: [{type: PathPrefix, value: /a/}]"), http("paths: [{type: Prefix, value: /a/}]"), r + "http.paths[0].type: Prefix is none of [Exact PathPrefix]"},
		{http("paths: [{type: Exact, value: /a}]"), http("paths: [{type: Exact, value: a}]"), r + "http.paths[0].value: \"a\" does not match"},
		{http("paths: [{type: Exact, value: /a}]"), http("paths: [{type: Exact}]"), r + "http.paths[0].value: is missing"},
		{http("paths: [{type: Exact, value: /a%20b}]"), http("paths: [{type: Exact, value: /a%2}]"), r + "http.paths[0].value: \"/a%2\" does not match"},
		{http("paths: [{type: Exact, value: /%01%10}]"), http("paths: [{type: Exact, value: /%00}]"), r + "http.paths[0].value: \"/%00\" does not match"},
		{http("paths: [{type: Exact, value: /a}]"), http("paths: [{type: Exact, value: '/a?b'}]"), r + "http.paths[0].value: \"/a?b\" does not match"},
		{http("headers: [{name: A, value: b}]"), http("headers: []"), r + "http.headers: number of headers: 0 is not between 1 and 16"},
		{http("headers: [{name: A, value: b}]"), http("headers: [{name: A}]"), r + "http.headers[0].value: is missing"},
		{http("headers: [{name: A, value: b}]"), http("headers: [{name: 'A:', value: b}]"), r + "http.headers[0].name: \"A:\" does not match"},
		{http("headers: [{name: Hosts, value: b}]"), http("headers: [{name: Host, value: b}]"), r + "http.headers[0]: host is no header field of HTTP/2"},
		{selector("matchLabels: {app: ''}"), selector("matchLabels: {app: -}"), "spec.podSelector.matchLabels.app: \"-\" does not match"},
		{selector("matchLabels: {app: " + long[:63] + "}"), selector("matchLabels: {app: " + long[:64] + "}"), "spec.podSelector.matchLabels.app: is longer than 63 characters"},
		{expression("key: a, operator: Exists"), expression("key: a, operator: Gt"), "spec.podSelector.matchExpressions[0].operator: Gt is none of [In NotIn Exists DoesNotExist]"},
		{expression("key: a, operator: Exists"), expression("operator: Exists"), "spec.podSelector.matchExpressions[0].key: is missing"},
		{expression("key: a, operator: In, values: [b]"), expression("key: a, operator: In"), "spec.podSelector.matchExpressions[0]: values are what In and NotIn need, and no other has"},
		{expression("key: a, operator: DoesNotExist, values: []"), expression("key: a, operator: NotIn, values: []"), "spec.podSelector.matchExpressions[0]: values are what In and NotIn need, and no other has"},
		{expression("key: a, operator: NotIn, values: ['']"), expression("key: a, operator: Exists, values: [b]"), "spec.podSelector.matchExpressions[0]: values are what In and NotIn need, and no other has"},
		{expression("key: a, operator: In, values: " + list(32, "b")), expression("key: a, operator: In, values: " + list(33, "b")), "spec.podSelector.matchExpressions[0].values: 33 are more than 32"},
	}
	var documents []string
	for _, tt := range tests {
		documents = append(documents, authzDocument(tt.good), authzDocument(tt.bad))
	}
	server := verdicts(t, []string{authzCRD}, documents...)
	for i, tt := range tests {
		t.Run(fmt.Sprint(i)+" "+tt.want, func(t *testing.T) {
			if _, err := readDir(withFile(t, documents[2*i])); err != nil || server[2*i] != "" {
				t.Errorf("%s is refused: by the directory %v, by the API server %q", tt.good, err, server[2*i])
			}
			_, err := readDir(withFile(t, documents[2*i+1]))
			if err == nil || server[2*i+1] == "" {
				t.Fatalf("%s is taken: by the directory %v, by the API server %q", tt.bad, err, server[2*i+1])
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %s", err, tt.want)
			}
		})
	}
}

// TestAuthorizationIsJudgedAsAnAPIServerDoes: policies that have every field, and each of
// their fields in all states that the CRD says something of.
func TestAuthorizationIsJudgedAsAnAPIServerDoes(t *testing.T) {
	documents := []string{
		authzDocument("action: ALLOW"),
		authzDocument("action: DENY, audit: true, podSelector: {matchLabels: {app: a}, matchExpressions: [{key: a, operator: In, values: [b]}]}, " +
			"rules: [{sources: [{type: ServiceAccount, serviceAccount: {namespace: a, name: b}}], networkAttributes: {ports: [80]}, " +
			"http: {methods: [GET], paths: [{type: Exact, value: /a}], headers: [{name: a, value: b}]}}]"),
		authzDocument("action: ALLOW, podSelector: {matchExpressions: [{key: a, operator: Exists}]}, rules: [{sources: [{type: SPIFFE, spiffe: 'spiffe://a/ns/b/sa/c'}]}]"),
	}
	judgedAlike(t, []string{authzCRD}, documents, "policy.weirmesh.io/v1alpha1 AuthorizationPolicy")
}

func TestTheModelOfAnAuthorizationPolicy(t *testing.T) {
	for _, tt := range []struct {
		promise, spec string
		selector      model.Selector
		want          authz.Policy
	}{
		{"nothing but an action", "action: ALLOW", nil, authz.Policy{Action: authz.Allow}},
		{"for all pods", "action: DENY, audit: true, podSelector: {}", nil, authz.Policy{Action: authz.Deny, Audit: true}},
		{"for some", "action: ALLOW, podSelector: {matchLabels: {b: x, a: ''}, matchExpressions: [{key: c, operator: NotIn, values: [u, v]}]}",
			model.Selector{{Key: "a", Operator: model.In, Values: []string{""}}, {Key: "b", Operator: model.In, Values: []string{"x"}}, {Key: "c", Operator: model.NotIn, Values: []string{"u", "v"}}},
			authz.Policy{Action: authz.Allow}},
		{"anyone, no one, and some", "action: ALLOW, rules: [{}, {sources: []}, {sources: [{type: ServiceAccount, serviceAccount: {name: a}}, " +
			"{type: ServiceAccount, serviceAccount: {namespace: lab, name: '*'}}, {type: SPIFFE, spiffe: 'spiffe://b.c/ns/d/sa/e'}], networkAttributes: {ports: [80, 81]}}]", nil,
			authz.Policy{Action: authz.Allow, Rules: []authz.Rule{{}, {Sources: []authz.Source{}}, {
				Sources: []authz.Source{{Namespace: "shop", ServiceAccount: "a"}, {Namespace: "lab", ServiceAccount: "*"}, {TrustDomain: "b.c", Namespace: "d", ServiceAccount: "e"}},
				Ports:   []uint16{80, 81},
			}}}},
		{"HTTP, in its canonical form", "action: DENY, rules: [{http: {}}, {http: {methods: [GET], paths: [{type: Exact, value: '/a//b/../%7e%2f'}, " +
			"{type: PathPrefix, value: /c/}, {type: PathPrefix, value: //}], headers: [{name: X-Role, value: Admin}]}}]", nil,
			authz.Policy{Action: authz.Deny, Rules: []authz.Rule{{HTTP: &authz.HTTP{}}, {HTTP: &authz.HTTP{
				Methods: []string{"GET"}, Paths: []authz.Path{{Value: "/a/~%2F"}, {Prefix: true, Value: "/c"}, {Prefix: true}},
				Headers: []authz.Header{{Name: "x-role", Value: "Admin"}},
			}}}}},
	} {
		t.Run(tt.promise, func(t *testing.T) {
			v, err := readDir(withFile(t, authzDocument(tt.spec)))
			if err != nil {
				t.Fatal(err)
			}
			tt.want.Name = "shop/p"
			want := map[key]model.AuthorizationPolicy{{"shop", "p"}: {Namespace: "shop", Name: "p", Selector: tt.selector, Policy: tt.want}}
			if diff := cmp.Diff(want, v.authz); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if _, err := authz.Compile("cluster.local", []authz.Policy{tt.want}); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestAPolicyThatCannotBeReadRefuses: what its CRD should not have let pass.
func TestAPolicyThatCannotBeReadRefuses(t *testing.T) {
	selector := &v1alpha1.PodSelector{MatchLabels: map[string]v1alpha1.LabelValue{"app": "x"}}
	bad := []v1alpha1.AuthorizationRule{{}, {NetworkAttributes: &v1alpha1.NetworkAttributes{Ports: []int32{0}}}}
	app := model.Selector{{Key: "app", Operator: model.In, Values: []string{"x"}}}
	for want, tt := range map[string]struct {
		spec     v1alpha1.AuthorizationPolicySpec
		selector model.Selector
		policy   authz.Policy
	}{
		"spec.rules[1].networkAttributes.ports[0]: 0 is not between 1 and 65535": {
			v1alpha1.AuthorizationPolicySpec{Action: v1alpha1.Allow, PodSelector: selector, Rules: bad}, app, authz.Policy{Action: authz.Allow},
		},
		"spec.rules[1].networkAttributes.ports[0]: 0 is not between 1 and 65535 ": {
			v1alpha1.AuthorizationPolicySpec{Action: v1alpha1.Deny, PodSelector: selector, Rules: bad}, app, authz.Policy{Action: authz.Deny, Rules: []authz.Rule{{}}},
		},
		"spec.action: LOG is none of [ALLOW DENY]": {
			v1alpha1.AuthorizationPolicySpec{Action: "LOG", PodSelector: selector}, app, authz.Policy{Action: authz.Allow},
		},
		`spec.podSelector.matchLabels.app: "-" does not match ^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$`: {
			v1alpha1.AuthorizationPolicySpec{Action: v1alpha1.Allow, PodSelector: &v1alpha1.PodSelector{MatchLabels: map[string]v1alpha1.LabelValue{"app": "-"}}, Rules: bad[:1]},
			nil, authz.Policy{Action: authz.Allow},
		},
	} {
		p := &v1alpha1.AuthorizationPolicy{ObjectMeta: meta("shop", "p"), Spec: tt.spec}
		got, err := AuthorizationPolicy(p)
		if err == nil || err.Error() != strings.TrimSpace(want) {
			t.Errorf("%v, want %s", err, want)
		}
		tt.policy.Name = "shop/p"
		if diff := cmp.Diff(model.AuthorizationPolicy{Namespace: "shop", Name: "p", Selector: tt.selector, Policy: tt.policy}, got); diff != "" {
			t.Errorf("%s: -want +got:\n%s", want, diff)
		}
		s := NewStore()
		if err := authzSink(s).set(p); err != nil || len(s.view.authz) != 1 {
			t.Errorf("it is left out: %v", err)
		}
	}
}

// governs are the names of the policies that govern shop/front.
func governs(s *Store, uid string, labels map[string]string) string {
	var out []string
	policies, governing := s.Authorization("shop", "front", uid, labels)
	for i, p := range policies {
		out = append(out, fmt.Sprint(p.Name, " of ", len(p.Rules), " rules"))
		if governing[i].Object != "AuthorizationPolicy/"+p.Name {
			out = append(out, governing[i].Object)
		}
	}
	return strings.Join(out, ", ")
}

// apiAuthz is a policy for pods with a label app.
func apiAuthz(name, app string) *v1alpha1.AuthorizationPolicy {
	return &v1alpha1.AuthorizationPolicy{ObjectMeta: meta("shop", name), Spec: v1alpha1.AuthorizationPolicySpec{
		Action: v1alpha1.Allow, Rules: []v1alpha1.AuthorizationRule{{}, {Sources: []v1alpha1.AuthorizationSource{}}},
		PodSelector: &v1alpha1.PodSelector{MatchLabels: map[string]v1alpha1.LabelValue{"app": v1alpha1.LabelValue(app)}},
	}}
}

// TestAPodIsGovernedByItsLabels: those that it has, or had when it was captured; of which
// nothing is known, it is governed by whatever refuses.
func TestAPodIsGovernedByItsLabels(t *testing.T) {
	s := NewStore()
	s.tables.authz.set(must(AuthorizationPolicy(apiAuthz("p", "x"))))
	front := apiPod("front", "u-1", "enabled")
	s.setPod(must(toCompactPod(front)))
	const governed, closed = "shop/p of 2 rules", "shop/p of 0 rules"
	check := func(what, uid string, labels map[string]string, want string) {
		t.Helper()
		if got := governs(s, uid, labels); got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	check("by its labels", "u-1", map[string]string{}, governed)
	check("another pod of its name", "u-2", map[string]string{"app": "y"}, "")
	check("another pod of its name", "u-2", map[string]string{"app": "x"}, governed)
	check("another pod of its name, of which nothing is known", "u-2", nil, closed)
	front.Labels = map[string]string{"app": "y"}
	s.setPod(must(toCompactPod(front)))
	check("its labels have changed", "u-1", map[string]string{"app": "x"}, "")
	front.Labels = nil
	s.setPod(must(toCompactPod(front)))
	check("it has none", "u-1", nil, "")
	s.dropPod(key{"shop", "front"})
	check("it is gone", "u-1", map[string]string{"app": "x"}, governed)
}

func TestAuthorizationIsFollowedAndForgotten(t *testing.T) {
	s := NewStore()
	p := apiAuthz("p", "x")
	labels := map[string]string{"app": "x"}
	changes := s.changes.Load()
	changed := func(want bool) {
		t.Helper()
		if now := s.changes.Load(); (now != changes) != want {
			t.Errorf("it is told: %t", !want)
		}
		changes = s.changes.Load()
	}
	sink := authzSink(s)
	for range 2 {
		if err := sink.set(p); err != nil {
			t.Fatal(err)
		}
	}
	changed(true)
	_ = sink.set(p)
	changed(false)
	if got := governs(s, "", labels); got != "shop/p of 2 rules" {
		t.Error(got)
	}
	if diff := cmp.Diff(map[string]int64{"AuthorizationPolicy/shop/p": 0}, s.Known()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	sink.replace([]*v1alpha1.AuthorizationPolicy{apiAuthz("q", "x")}, nil)
	changed(true)
	if got := governs(s, "", labels); got != "shop/q of 2 rules" {
		t.Error(got)
	}
	sink.drop(key{"shop", "q"})
	changed(true)
	if got := governs(s, "", labels); got != "" {
		t.Error(got)
	}
}

func TestAuthorizationIsKeptForAnotherAgent(t *testing.T) {
	s := NewStore()
	s.tables.authz.set(must(AuthorizationPolicy(apiAuthz("p", "x"))))
	lastGood := LastGood{Path: t.TempDir() + "/last-good.gz", Version: "v1"}
	if err := lastGood.save(s.copy()); err != nil {
		t.Fatal(err)
	}
	after, log := NewStore(), &logBuffer{}
	lastGood.restore(after, log.logger())
	if diff := cmp.Diff(s.view.authz, after.view.authz); diff != "" { // an empty list of sources among it
		t.Errorf("-before +after:\n%s; log %s", diff, log)
	}
	listed := NewStore()
	listed.tables.authz.replace(map[key]model.AuthorizationPolicy{})
	lastGood.restore(listed, log.logger())
	if len(listed.view.authz) != 0 {
		t.Error("what the server has listed is not taken from the file")
	}
}

func TestADirectorysAuthorizationIsInForce(t *testing.T) {
	dir := withFile(t, authzDocument("action: ALLOW"))
	s, _ := runDir(t, dir)
	if got := governs(s, "", nil); got != "shop/p of 0 rules" {
		t.Error(got)
	}
	write(t, dir, "another.yaml", strings.Replace(authzDocument("action: DENY, rules: [{}]"), "name: p", "name: q", 1))
	eventually(t, "there is another", func() bool { return governs(s, "", nil) == "shop/p of 0 rules, shop/q of 1 rules" })
}

func TestStrippedAuthorizationKeepsItsSpec(t *testing.T) {
	sameAfter(t, apiAuthz("p", "x"), func(p *v1alpha1.AuthorizationPolicy) { dropManagedFields(p) }, AuthorizationPolicy)
}
