package authz

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// reference decides as the text does, sentence by sentence, without a thought of speed.
func reference(own string, policies []Policy, peer Identity, port uint16, r *request) Decision {
	policies = slices.Clone(policies)
	slices.SortFunc(policies, func(a, b Policy) int { return strings.Compare(a.Name, b.Name) })
	matches := func(p Policy) bool {
		return slices.ContainsFunc(p.Rules, func(one Rule) bool { return ruleMatches(own, p.Action, one, peer, port, r) })
	}
	var audited []string
	// DENY first.
	for _, p := range policies {
		if p.Action == Deny && matches(p) {
			if !p.Audit {
				return Decision{Policy: p.Name, Audited: audited}
			}
			audited = append(audited, p.Name) // logs instead of refusing
		}
	}
	// Any ALLOW policy that selects the pod: what none allows is refused.
	var inForce, audit, met, auditMet []string
	for _, p := range policies {
		switch {
		case p.Action != Allow:
		case p.Audit:
			audit = append(audit, p.Name)
			if matches(p) {
				auditMet = append(auditMet, p.Name)
			}
		default:
			inForce = append(inForce, p.Name)
			if matches(p) {
				met = append(met, p.Name)
			}
		}
	}
	if len(inForce) > 0 {
		if len(met) == 0 {
			return Decision{Policy: NoPolicy, Audited: audited}
		}
		return Decision{Allowed: true, Policy: met[0], Audited: audited}
	}
	if len(audit) > 0 && len(auditMet) == 0 {
		audited = append(audited, NoPolicy)
	}
	return Decision{Allowed: true, Audited: audited}
}

func ruleMatches(own string, action Action, one Rule, peer Identity, port uint16, r *request) bool {
	// Sources OR. Omitted: anyone; an empty list: no one; plaintext peers match no source.
	if one.Sources != nil {
		found := false
		for _, s := range one.Sources {
			trustDomain := s.TrustDomain
			if trustDomain == "" {
				trustDomain = own
			}
			found = found || peer != Identity{} && trustDomain != "" && peer.TrustDomain == trustDomain &&
				peer.Namespace == s.Namespace && (s.ServiceAccount == "*" || peer.ServiceAccount == s.ServiceAccount)
		}
		if !found {
			return false
		}
	}
	// Sources and attributes AND.
	if len(one.Ports) > 0 && !slices.Contains(one.Ports, port) {
		return false
	}
	if one.HTTP == nil {
		return true
	}
	// HTTP rules on a port that is not HTTP: ALLOW rules never match, DENY rules always do.
	if r == nil {
		return action == Deny
	}
	if len(one.HTTP.Methods) > 0 && !slices.Contains(one.HTTP.Methods, r.method) {
		return false
	}
	if len(one.HTTP.Paths) > 0 && !slices.ContainsFunc(one.HTTP.Paths, func(p Path) bool {
		if p.Prefix {
			return r.path != "" && (p.Value == "" || strings.HasPrefix(r.path+"/", p.Value+"/"))
		}
		return p.Value == r.path
	}) {
		return false
	}
	for _, h := range one.HTTP.Headers {
		var values []string
		for _, f := range r.fields {
			if name, value, _ := strings.Cut(f, ": "); name == h.Name {
				values = append(values, value)
			}
		}
		other := slices.ContainsFunc(values, func(v string) bool { return v != h.Value })
		if !slices.Contains(values, h.Value) || action == Allow && other {
			return false
		}
	}
	return true
}

// dice draws from what the fuzzer makes up; at its end it draws zeros.
type dice struct{ data []byte }

func (d *dice) below(n int) int {
	if len(d.data) == 0 {
		return 0
	}
	v := int(d.data[0]) % n
	d.data = d.data[1:]
	return v
}

func draw[T any](d *dice, from ...T) T { return from[d.below(len(from))] }

// some draws up to most; nil as often as any other number.
func some[T any](d *dice, most int, one func() T) []T {
	n := d.below(most + 2)
	if n == most+1 {
		return nil
	}
	out := []T{}
	for range n {
		out = append(out, one())
	}
	return out
}

func (d *dice) domain() string  { return draw(d, "cluster.local", "elsewhere.example") }
func (d *dice) name() string    { return draw(d, "a", "b", "ab") }
func (d *dice) port() uint16    { return draw[uint16](d, 80, 81, 65535) }
func (d *dice) method() string  { return draw(d, "GET", "POST", "CONNECT") }
func (d *dice) headers() Header { return Header{d.name(), draw(d, "", "x", "y")} }

func (d *dice) path() Path {
	if d.below(2) == 0 {
		return Path{Value: draw(d, "/", "/a", "/a/b", "/a%2Fb", "*")}
	}
	return Path{Prefix: true, Value: draw(d, "", "/a", "/a/b", "/ab")}
}

func (d *dice) source() Source {
	return Source{draw(d, "", d.domain()), d.name(), draw(d, d.name(), AllAccounts)}
}

func (d *dice) rule() Rule {
	out := Rule{Sources: some(d, 2, d.source), Ports: some(d, 2, d.port)}
	if d.below(2) == 1 {
		out.HTTP = &HTTP{some(d, 2, d.method), some(d, 2, d.path), some(d, 2, d.headers)}
	}
	return out
}

func (d *dice) policy() Policy {
	return Policy{Name: draw(d, "n/a", "n/b", "n/c", "n/d"), Action: draw(d, Allow, Deny), Audit: d.below(3) == 1, Rules: some(d, 2, d.rule)}
}

func (d *dice) request() *request {
	if d.below(4) == 1 {
		return nil
	}
	return &request{d.method(), draw(d, "/", "", "/a", "/a/b", "/ab", "/a%2Fb", "*"), some(d, 3, func() string {
		h := d.headers()
		return h.Name + ": " + h.Value
	})}
}

// FuzzDecisions: compiled or not, policies mean the same.
func FuzzDecisions(f *testing.F) {
	for i := range 64 {
		seed := make([]byte, 96)
		for j := range seed {
			seed[j] = byte(i*j*7 + j*j*31 + i)
		}
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		d := &dice{data}
		own := draw(d, "cluster.local", "")
		peer := draw(d, none, Identity{d.domain(), d.name(), d.name()}, Identity{"cluster.local", d.name(), d.name()})
		port, r := d.port(), d.request()
		policies := some(d, 4, d.policy)
		s, err := Compile(own, policies)
		if err != nil {
			t.Fatalf("%+v: %v", policies, err)
		}
		want, got := reference(own, policies, peer, port, r), s.Evaluate(peer, port, r.asRequest())
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%+v\nby %v at %d: %+v\n-reference +compiled:\n%s", policies, peer, port, r, diff)
		}
		if got.Allowed && s.Hopeless(peer, port) {
			t.Errorf("%+v\nby %v at %d: %+v is allowed where nothing can be", policies, peer, port, r)
		}
	})
}
