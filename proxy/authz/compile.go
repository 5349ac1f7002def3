package authz

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Set are compiled policies. Use Compile. Nil is no policy: all is allowed.
type Set struct {
	deny, allow []policy
	// Whether one of allow is in force, and whether one is with audit.
	closed, auditClosed bool

	// The rules whose sources an identity is one of; of those that are about all of a
	// namespace the identity has no ServiceAccount. A peer is looked up once, whatever
	// the number of rules.
	rules   int // that have sources
	sources map[Identity]numbers
}

// numbers are a set of small numbers, each a bit.
type numbers []uint64

func (n numbers) have(i int) bool { return i/64 < len(n) && n[i/64]&(1<<(i%64)) != 0 }

func (n numbers) with(i int) numbers {
	for i/64 >= len(n) {
		n = append(n, 0)
	}
	n[i/64] |= 1 << (i % 64)
	return n
}

type policy struct {
	name  string
	audit bool
	rules []rule
}

type rule struct {
	anyone bool
	number int // in Set.sources, if it is not about anyone
	ports  []uint16
	http   *http
}

type http struct {
	methods  []string
	anyPath  bool
	exact    map[string]struct{}
	prefixes []string
	headers  []Header
}

// Compile makes a Set of the policies that govern one pod, in any order. trustDomain is
// the pod's own; while that is empty, sources that name none are met by no one. The
// error names a policy and what is wrong with it.
func Compile(trustDomain string, policies []Policy) (*Set, error) {
	if len(policies) == 0 {
		return nil, nil
	}
	out := &Set{sources: map[Identity]numbers{}}
	policies = slices.SortedFunc(slices.Values(policies), func(a, b Policy) int { return cmp.Compare(a.Name, b.Name) })
	for _, p := range policies {
		compiled := policy{name: p.Name, audit: p.Audit}
		for i, r := range p.Rules {
			one, err := out.compile(trustDomain, r)
			if err != nil {
				return nil, fmt.Errorf("policy %q: rule %d: %w", p.Name, i, err)
			}
			compiled.rules = append(compiled.rules, one)
		}
		switch p.Action {
		case Deny:
			out.deny = append(out.deny, compiled)
		case Allow:
			out.allow = append(out.allow, compiled)
			out.closed, out.auditClosed = out.closed || !p.Audit, out.auditClosed || p.Audit
		default:
			return nil, fmt.Errorf("policy %q: action %d", p.Name, p.Action)
		}
	}
	return out, nil
}

func (s *Set) compile(trustDomain string, r Rule) (rule, error) {
	if slices.Contains(r.Ports, 0) {
		return rule{}, errors.New("port 0")
	}
	out := rule{anyone: r.Sources == nil, ports: r.Ports}
	if !out.anyone {
		out.number = s.rules
		s.rules++
	}
	for _, one := range r.Sources {
		if one.Namespace == "" || one.ServiceAccount == "" {
			return rule{}, fmt.Errorf("a source of namespace %q and service account %q", one.Namespace, one.ServiceAccount)
		}
		id := Identity{cmp.Or(one.TrustDomain, trustDomain), one.Namespace, one.ServiceAccount}
		if one.ServiceAccount == AllAccounts {
			id.ServiceAccount = ""
		}
		if id.TrustDomain != "" {
			s.sources[id] = s.sources[id].with(out.number)
		}
	}
	var err error
	out.http, err = compileHTTP(r.HTTP)
	return out, err
}

func compileHTTP(h *HTTP) (*http, error) {
	if h == nil {
		return nil, nil
	}
	out := &http{methods: h.Methods, anyPath: len(h.Paths) == 0, exact: map[string]struct{}{}, headers: h.Headers}
	for _, p := range h.Paths {
		switch {
		case p.Prefix && (p.Value == "" || p.Value[0] == '/' && !strings.HasSuffix(p.Value, "/")):
			out.prefixes = append(out.prefixes, p.Value)
		case !p.Prefix && p.Value != "":
			out.exact[p.Value] = struct{}{}
		default:
			return nil, fmt.Errorf("path %q, prefix %t", p.Value, p.Prefix)
		}
	}
	for _, one := range h.Headers {
		if one.Name == "" || one.Name != strings.ToLower(one.Name) {
			return nil, fmt.Errorf("header %q is not in lower case", one.Name)
		}
	}
	return out, nil
}
