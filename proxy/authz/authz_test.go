package authz

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// request is a Request; fields are "name: value".
type request struct {
	method, path string
	fields       []string
}

func (r *request) Method() []byte { return []byte(r.method) }
func (r *request) Path() []byte   { return []byte(r.path) }
func (r *request) Len() int       { return len(r.fields) }

func (r *request) Is(i int, name string) bool {
	is, _, _ := strings.Cut(r.fields[i], ": ")
	return is == name
}

func (r *request) Value(i int) []byte {
	_, value, _ := strings.Cut(r.fields[i], ": ")
	return []byte(value)
}

// request may be nil, and is no HTTP then.
func (r *request) asRequest() Request {
	if r == nil {
		return nil
	}
	return r
}

var (
	front = Identity{"cluster.local", "shop", "front"}
	back  = Identity{"cluster.local", "shop", "back"}
	spy   = Identity{"cluster.local", "lab", "front"}
	alien = Identity{"elsewhere.example", "shop", "front"}
	none  = Identity{}
)

func compiled(t testing.TB, policies ...Policy) *Set {
	t.Helper()
	s, err := Compile("cluster.local", policies)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func from(sources ...Source) []Rule { return []Rule{{Sources: sources}} }

func asking(h HTTP) []Rule { return []Rule{{HTTP: &h}} }

// TestWhoMayCall is the table of what policies mean.
func TestWhoMayCall(t *testing.T) {
	allow := func(rules ...Rule) Policy { return Policy{Name: "shop/allow", Action: Allow, Rules: rules} }
	deny := func(rules ...Rule) Policy { return Policy{Name: "shop/deny", Action: Deny, Rules: rules} }
	audited := func(p Policy) Policy { p.Name, p.Audit = p.Name+"-audit", true; return p }
	isFront := Source{Namespace: "shop", ServiceAccount: "front"}
	get := &request{"GET", "/a", nil}
	fields := func(f ...string) *request { return &request{"GET", "/a", f} }
	yes := func(policy string, audited ...string) Decision {
		return Decision{Allowed: true, Policy: policy, Audited: audited}
	}
	no := func(policy string, audited ...string) Decision { return Decision{Policy: policy, Audited: audited} }
	byHeader := asking(HTTP{Headers: []Header{{"role", "admin"}}})
	byPath := asking(HTTP{Paths: []Path{{Value: "/a"}, {Prefix: true, Value: "/b"}}})
	tests := []struct {
		promise  string
		policies []Policy
		peer     Identity
		port     uint16
		request  *request
		want     Decision
	}{
		{"without a policy all is allowed", nil, none, 80, get, yes("")},
		{"what a rule allows is allowed", []Policy{allow(from(isFront)...)}, front, 80, get, yes("shop/allow")},
		{"what no ALLOW policy allows is refused", []Policy{allow(from(isFront)...)}, back, 80, get, no(NoPolicy)},
		{"of two ALLOW policies one is enough", []Policy{allow(from(isFront)...), {Name: "a", Action: Allow, Rules: from(Source{Namespace: "shop", ServiceAccount: "back"})}}, back, 80, get, yes("a")},
		{"another namespace is another account", []Policy{allow(from(isFront)...)}, spy, 80, get, no(NoPolicy)},
		{"a source without a trust domain is of the pod's own", []Policy{allow(from(isFront)...)}, alien, 80, get, no(NoPolicy)},
		{"a source with one is of that", []Policy{allow(from(Source{"elsewhere.example", "shop", "front"})...)}, alien, 80, get, yes("shop/allow")},
		{"a star is all of the namespace", []Policy{allow(from(Source{Namespace: "shop", ServiceAccount: "*"})...)}, back, 80, get, yes("shop/allow")},
		{"a star is no other namespace", []Policy{allow(from(Source{Namespace: "shop", ServiceAccount: "*"})...)}, spy, 80, get, no(NoPolicy)},
		{"a star is no other trust domain", []Policy{allow(from(Source{Namespace: "shop", ServiceAccount: "*"})...)}, alien, 80, get, no(NoPolicy)},
		{"a peer in plaintext is no source", []Policy{allow(from(Source{Namespace: "shop", ServiceAccount: "*"})...)}, none, 80, get, no(NoPolicy)},
		{"omitted sources are anyone", []Policy{allow(Rule{})}, none, 80, get, yes("shop/allow")},
		{"an empty list of sources is no one", []Policy{allow(Rule{Sources: []Source{}})}, front, 80, get, no(NoPolicy)},
		{"a policy without rules allows nothing", []Policy{allow()}, front, 80, get, no(NoPolicy)},
		{"a DENY policy without rules denies nothing", []Policy{deny()}, front, 80, get, yes("")},
		{"a DENY policy alone allows the rest", []Policy{deny(from(isFront)...)}, back, 80, get, yes("")},
		{"DENY goes before ALLOW", []Policy{allow(Rule{}), deny(from(isFront)...)}, front, 80, get, no("shop/deny")},
		{"a DENY of sources is not of peers in plaintext", []Policy{deny(from(Source{Namespace: "shop", ServiceAccount: "*"})...)}, none, 80, get, yes("")},
		{"a DENY of an empty list is of no one", []Policy{deny(Rule{Sources: []Source{}})}, front, 80, get, yes("")},

		{"a rule's port is one of its list", []Policy{allow(Rule{Ports: []uint16{80, 81}})}, none, 81, get, yes("shop/allow")},
		{"another port is not", []Policy{allow(Rule{Ports: []uint16{80, 81}})}, none, 82, get, no(NoPolicy)},
		{"sources and ports are both to be met", []Policy{allow(Rule{Sources: []Source{isFront}, Ports: []uint16{80}})}, front, 81, get, no(NoPolicy)},
		{"rules are alternatives", []Policy{allow(Rule{Ports: []uint16{80}}, Rule{Ports: []uint16{81}})}, none, 81, get, yes("shop/allow")},

		{"a method is one of the list", []Policy{allow(asking(HTTP{Methods: []string{"PUT", "GET"}})...)}, none, 80, get, yes("shop/allow")},
		{"another method is not", []Policy{allow(asking(HTTP{Methods: []string{"PUT"}})...)}, none, 80, get, no(NoPolicy)},
		{"methods have their case", []Policy{allow(asking(HTTP{Methods: []string{"GET"}})...)}, none, 80, &request{method: "get", path: "/a"}, no(NoPolicy)},
		{"an exact path", []Policy{allow(byPath...)}, none, 80, get, yes("shop/allow")},
		{"an exact path is not what is below it", []Policy{allow(byPath...)}, none, 80, &request{method: "GET", path: "/a/"}, no(NoPolicy)},
		{"a prefix is itself", []Policy{allow(byPath...)}, none, 80, &request{method: "GET", path: "/b"}, yes("shop/allow")},
		{"a prefix is what is below it", []Policy{allow(byPath...)}, none, 80, &request{method: "GET", path: "/b/c"}, yes("shop/allow")},
		{"a prefix has whole elements", []Policy{allow(byPath...)}, none, 80, &request{method: "GET", path: "/bc"}, no(NoPolicy)},
		{"the prefix / is every path", []Policy{allow(asking(HTTP{Paths: []Path{{Prefix: true}}})...)}, none, 80, get, yes("shop/allow")},
		{"what has no path is no path", []Policy{allow(asking(HTTP{Paths: []Path{{Prefix: true}}})...)}, none, 80, &request{method: "CONNECT"}, no(NoPolicy)},
		{"a header", []Policy{allow(byHeader...)}, none, 80, fields("role: admin"), yes("shop/allow")},
		{"another value", []Policy{allow(byHeader...)}, none, 80, fields("role: administrator"), no(NoPolicy)},
		{"no such header", []Policy{allow(byHeader...)}, none, 80, fields("roles: admin"), no(NoPolicy)},
		{"all headers are to be met", []Policy{allow(asking(HTTP{Headers: []Header{{"role", "admin"}, {"a", "b"}}})...)}, none, 80, fields("role: admin"), no(NoPolicy)},
		{"ALLOW wants every value of a header", []Policy{allow(byHeader...)}, none, 80, fields("role: admin", "role: guest"), no(NoPolicy)},
		{"DENY wants one value of a header", []Policy{deny(byHeader...)}, none, 80, fields("role: guest", "role: admin"), no("shop/deny")},
		{"DENY by a header that is not there", []Policy{deny(byHeader...)}, none, 80, fields("role: guest"), yes("")},

		{"without HTTP, ALLOW by HTTP is not met", []Policy{allow(byPath...)}, front, 80, nil, no(NoPolicy)},
		{"without HTTP, DENY by HTTP is met", []Policy{deny(byPath...)}, front, 80, nil, no("shop/deny")},
		{"if its other parts are", []Policy{deny(Rule{Ports: []uint16{81}, HTTP: &HTTP{Methods: []string{"GET"}}})}, front, 80, nil, yes("")},
		{"without HTTP, ALLOW by source is met", []Policy{allow(from(isFront)...)}, front, 80, nil, yes("shop/allow")},

		{"a DENY with audit refuses nothing", []Policy{audited(deny(Rule{}))}, front, 80, get, yes("", "shop/deny-audit")},
		{"and says so of what is allowed", []Policy{audited(deny(Rule{})), allow(Rule{})}, front, 80, get, yes("shop/allow", "shop/deny-audit")},
		{"a DENY with audit is not in the way of a DENY", []Policy{audited(deny(Rule{})), {Name: "z", Action: Deny, Rules: []Rule{{}}}}, front, 80, get, no("z", "shop/deny-audit")},
		{"an ALLOW with audit refuses nothing", []Policy{audited(allow(from(isFront)...))}, back, 80, get, yes("", NoPolicy)},
		{"and is silent of what it allows", []Policy{audited(allow(from(isFront)...))}, front, 80, get, yes("")},
		{"an ALLOW with audit allows nothing", []Policy{audited(allow(Rule{})), allow(from(isFront)...)}, back, 80, get, no(NoPolicy)},
		{"and says nothing beside an ALLOW", []Policy{audited(allow()), allow(from(isFront)...)}, front, 80, get, yes("shop/allow")},
	}
	for _, tt := range tests {
		t.Run(tt.promise, func(t *testing.T) {
			s := compiled(t, tt.policies...)
			got := s.Evaluate(tt.peer, tt.port, tt.request.asRequest())
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if s.Hopeless(tt.peer, tt.port) && got.Allowed {
				t.Errorf("is allowed where nothing can be")
			}
		})
	}
}

func TestWhatNothingCanChangeIsHopeless(t *testing.T) {
	someone := []Source{{Namespace: "shop", ServiceAccount: "front"}}
	onlyGet := &HTTP{Methods: []string{"GET"}}
	for want, policies := range map[bool][][]Policy{
		true: {
			{{Name: "a", Action: Allow}},
			{{Name: "a", Action: Allow, Rules: []Rule{{Sources: someone, HTTP: onlyGet}}}},
			{{Name: "a", Action: Deny, Rules: []Rule{{Ports: []uint16{80}}}}},
		},
		false: {
			nil,
			{{Name: "a", Action: Allow, Audit: true}},
			{{Name: "a", Action: Allow, Rules: []Rule{{HTTP: onlyGet}}}},
			{{Name: "a", Action: Deny, Rules: []Rule{{HTTP: onlyGet}}}},
			{{Name: "a", Action: Deny, Audit: true, Rules: []Rule{{}}}},
			{{Name: "a", Action: Deny, Rules: []Rule{{Sources: someone}}}},
		},
	} {
		for _, p := range policies {
			if got := compiled(t, p...).Hopeless(back, 80); got != want {
				t.Errorf("%+v: %t", p, got)
			}
		}
	}
}

func TestWhatCannotBeIsNotCompiled(t *testing.T) {
	for want, p := range map[string]Policy{
		`policy "a": action 0`:       {},
		`policy "a": rule 0: port 0`: {Action: Allow, Rules: []Rule{{Ports: []uint16{0}}}},
		`policy "a": rule 0: a source of namespace "" and service account "b"`: {Action: Allow, Rules: from(Source{ServiceAccount: "b"})},
		`policy "a": rule 1: a source of namespace "b" and service account ""`: {Action: Allow, Rules: []Rule{{}, {Sources: []Source{{Namespace: "b"}}}}},
		`policy "a": rule 0: path "/b/", prefix true`:                          {Action: Deny, Rules: asking(HTTP{Paths: []Path{{Prefix: true, Value: "/b/"}}})},
		`policy "a": rule 0: path "b", prefix true`:                            {Action: Deny, Rules: asking(HTTP{Paths: []Path{{Prefix: true, Value: "b"}}})},
		`policy "a": rule 0: path "", prefix false`:                            {Action: Deny, Rules: asking(HTTP{Paths: []Path{{}}})},
		`policy "a": rule 0: header "Role" is not in lower case`:               {Action: Deny, Rules: asking(HTTP{Headers: []Header{{"Role", "b"}}})},
		`policy "a": rule 0: header "" is not in lower case`:                   {Action: Deny, Rules: asking(HTTP{Headers: []Header{{"", "b"}}})},
	} {
		p.Name = "a"
		if _, err := Compile("cluster.local", []Policy{p}); err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

func TestWithoutATrustDomainNobodyIsASource(t *testing.T) {
	s, err := Compile("", []Policy{{Name: "a", Action: Allow, Rules: from(Source{Namespace: "shop", ServiceAccount: "front"}, Source{Namespace: "shop", ServiceAccount: "*"})}})
	if err != nil {
		t.Fatal(err)
	}
	for _, peer := range []Identity{none, front, {"", "shop", "front"}} {
		if s.Evaluate(peer, 80, nil).Allowed {
			t.Errorf("%v is allowed", peer)
		}
	}
}

// many are as many policies as a pod of a large team has.
func many() []Policy {
	var out []Policy
	for i := range 20 {
		var sources []Source
		for j := range 32 {
			sources = append(sources, Source{Namespace: fmt.Sprint("team-", i), ServiceAccount: fmt.Sprint("service-", j)})
		}
		out = append(out, Policy{Name: fmt.Sprintf("shop/allow-%02d", i), Action: Allow, Rules: []Rule{{
			Sources: sources, Ports: []uint16{8080, 9090},
			HTTP: &HTTP{Methods: []string{"GET", "POST"}, Paths: []Path{{Value: "/health"}, {Prefix: true, Value: "/api/v1"}}, Headers: []Header{{"tenant", "a"}}},
		}}})
	}
	return append(out, Policy{Name: "shop/deny", Action: Deny, Rules: asking(HTTP{Paths: []Path{{Prefix: true, Value: "/admin"}}})})
}

// bytesRequest makes no bytes for each question.
type bytesRequest struct{ method, path, name, value []byte }

func (r *bytesRequest) Method() []byte             { return r.method }
func (r *bytesRequest) Path() []byte               { return r.path }
func (r *bytesRequest) Len() int                   { return 1 }
func (r *bytesRequest) Is(_ int, name string) bool { return string(r.name) == name }
func (r *bytesRequest) Value(int) []byte           { return r.value }

func BenchmarkEvaluate(b *testing.B) {
	r := &bytesRequest{[]byte("GET"), []byte("/api/v1/things/7"), []byte("tenant"), []byte("a")}
	for name, peer := range map[string]Identity{
		"allowed by the last": {"cluster.local", "team-19", "service-31"}, "allowed by none": front, "in plaintext": none,
	} {
		b.Run(name, func(b *testing.B) {
			s := compiled(b, many()...)
			b.ReportAllocs()
			for b.Loop() {
				s.Evaluate(peer, 8080, r)
			}
		})
	}
}

func TestADecisionAllocatesNothing(t *testing.T) {
	s := compiled(t, many()...)
	r := &bytesRequest{[]byte("GET"), []byte("/api/v1/things/7"), []byte("tenant"), []byte("a")}
	for _, peer := range []Identity{{"cluster.local", "team-19", "service-31"}, front, none} {
		if n := testing.AllocsPerRun(100, func() { s.Evaluate(peer, 8080, r) }); n != 0 {
			t.Errorf("%v: %v allocations", peer, n)
		}
	}
}

func TestAnIdentityIsReadAsItIsWritten(t *testing.T) {
	id := Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "front"}
	if got := ParseIdentity(id.String()); got != id {
		t.Errorf("%q is read as %+v", id, got)
	}
	for _, text := range []string{
		"", "spiffe://", "https://cluster.local/ns/shop/sa/front", "spiffe://cluster.local/ns/shop/sa/", "spiffe:///ns/shop/sa/front",
		"spiffe://cluster.local/ns/shop/sa/front/", "spiffe://cluster.local/ns//sa/front", "spiffe://cluster.local/sa/shop/ns/front", "spiffe://cluster.local/ns/shop",
	} {
		if got := ParseIdentity(text); got.Known() {
			t.Errorf("%q is read as %+v", text, got)
		}
	}
}
