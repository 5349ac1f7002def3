package proxypb

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/weirmesh/weir/proxy/authz"
)

func TestPoliciesAreReadAsTheyWereWritten(t *testing.T) {
	want := []authz.Policy{
		{Name: "shop/a", Action: authz.Allow, Rules: []authz.Rule{
			{},
			{Sources: []authz.Source{}},
			{Sources: []authz.Source{{TrustDomain: "a.example", Namespace: "shop", ServiceAccount: "front"}, {Namespace: "lab", ServiceAccount: "*"}}, Ports: []uint16{80, 65535}},
			{HTTP: &authz.HTTP{}},
		}},
		{Name: "shop/b", Action: authz.Deny, Audit: true},
		{Name: "shop/c", Action: authz.Deny, Rules: []authz.Rule{{HTTP: &authz.HTTP{
			Methods: []string{"GET"}, Paths: []authz.Path{{Value: "/a"}, {Prefix: true}}, Headers: []authz.Header{{Name: "x", Value: "Y"}},
		}}}},
	}
	wire, err := proto.Marshal(FromAuthorization("cluster.local", want))
	if err != nil {
		t.Fatal(err)
	}
	var read Authorization
	if err := proto.Unmarshal(wire, &read); err != nil {
		t.Fatal(err)
	}
	got, err := read.toPolicies()
	if diff := cmp.Diff(want, got); diff != "" || err != nil || read.GetTrustDomain() != "cluster.local" {
		t.Errorf("of %s, %v (-written, +read):\n%s", read.GetTrustDomain(), err, diff)
	}
	if set, err := read.ToSet(); set == nil || err != nil {
		t.Errorf("%v, %v", set, err)
	}
}

func TestNoPoliciesAreNothing(t *testing.T) {
	x := FromAuthorization("cluster.local", nil)
	if set, err := x.ToSet(); x != nil || set != nil || err != nil {
		t.Errorf("%v, %v, %v", x, set, err)
	}
}

// unknown gives a message a field of another version.
func unknown[M proto.Message](m M) M {
	m.ProtoReflect().SetUnknown(protoreflect.RawFields{0xf8, 0x07, 1}) // field 127
	return m
}

func TestPoliciesThatCannotBeAreRefused(t *testing.T) {
	rule := func(r *AuthorizationRule) *Authorization {
		return &Authorization{Policies: []*AuthorizationPolicy{{Name: "a", Action: AuthorizationPolicy_DENY, Rules: []*AuthorizationRule{r}}}}
	}
	const newer = "fields that this proxy does not know"
	for _, tt := range []struct {
		want string
		of   *Authorization
	}{
		{"policy a: action 0", &Authorization{Policies: []*AuthorizationPolicy{{Name: "a"}}}},
		{"policy a: action 3", &Authorization{Policies: []*AuthorizationPolicy{{Name: "a", Action: 3}}}},
		{"policy a: action 257", &Authorization{Policies: []*AuthorizationPolicy{{Name: "a", Action: 257}}}},
		{"65536 is more than 65535", rule(&AuthorizationRule{Ports: []uint32{65536}})},
		{"port 0", rule(&AuthorizationRule{Ports: []uint32{0}})},
		{"a source of namespace", rule(&AuthorizationRule{Sources: &Sources{Sources: []*Source{{}}}})},
		{"lower case", rule(&AuthorizationRule{Http: &RequestConditions{Headers: []*Header{{Name: "X"}}}})},
		{"path", rule(&AuthorizationRule{Http: &RequestConditions{Paths: []*PathCondition{{}}}})},
		{newer, unknown(&Authorization{})},
		{newer, &Authorization{Policies: []*AuthorizationPolicy{unknown(&AuthorizationPolicy{Name: "a", Action: AuthorizationPolicy_DENY})}}},
		{newer, rule(unknown(&AuthorizationRule{}))},
		{newer, rule(&AuthorizationRule{Sources: unknown(&Sources{})})},
		{newer, rule(&AuthorizationRule{Sources: &Sources{Sources: []*Source{unknown(&Source{Namespace: "a", ServiceAccount: "b"})}}})},
		{newer, rule(&AuthorizationRule{Http: unknown(&RequestConditions{})})},
		{newer, rule(&AuthorizationRule{Http: &RequestConditions{Paths: []*PathCondition{unknown(&PathCondition{Value: "/"})}}})},
		{newer, rule(&AuthorizationRule{Http: &RequestConditions{Headers: []*Header{unknown(&Header{Name: "a"})}}})},
	} {
		if _, err := tt.of.ToSet(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: %v, want %s", tt.of, err, tt.want)
		}
	}
}
