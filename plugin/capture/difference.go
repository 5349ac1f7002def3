package capture

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// NoRules is the difference of a namespace in which a backend finds nothing.
const NoRules = "there are no rules"

// Difference names the first thing in which have, the rules of a namespace, is
// not as want. Empty: there is none. Not compared are the bypass's path (the
// kernel keeps the cgroup's ID only) and the order of counters and of chains
// (they run in the order of their priority).
func Difference(have, want Ruleset) string {
	have, want = canonical(have), canonical(want)
	if have.Dormant != want.Dormant {
		return "the table is switched off"
	}
	if !slices.Equal(have.Counters, want.Counters) {
		return fmt.Sprintf("counters are %v, not %v", have.Counters, want.Counters)
	}
	for _, w := range want.Chains {
		i := slices.IndexFunc(have.Chains, func(c Chain) bool { return c.Name == w.Name })
		if i < 0 {
			return fmt.Sprintf("chain %s is missing", w.Name)
		}
		if d := w.difference(have.Chains[i]); d != "" {
			return fmt.Sprintf("chain %s: %s", w.Name, d)
		}
	}
	for _, h := range have.Chains {
		if !slices.ContainsFunc(want.Chains, func(c Chain) bool { return c.Name == h.Name }) {
			return fmt.Sprintf("chain %s is not ours", h.Name)
		}
	}
	return ""
}

func (c Chain) difference(have Chain) string {
	wantRules, haveRules := c.Rules, have.Rules
	c.Rules, have.Rules = nil, nil
	if !reflect.DeepEqual(c, have) {
		return fmt.Sprintf("it is a %s chain on %s at %d", have.Type, have.Hook, have.Priority)
	}
	for i := range max(len(wantRules), len(haveRules)) {
		switch {
		case i >= len(haveRules):
			return fmt.Sprintf("rule %d is missing: %s", i+1, wantRules[i])
		case i >= len(wantRules):
			return fmt.Sprintf("rule %d is not ours: %s", i+1, haveRules[i])
		case !reflect.DeepEqual(wantRules[i], haveRules[i]):
			return fmt.Sprintf("rule %d is %q, not %q", i+1, haveRules[i], wantRules[i])
		}
	}
	return ""
}

func canonical(r Ruleset) Ruleset {
	out := r.MapBypass(func(b Bypass) Bypass { b.Path = ""; return b })
	out.Counters = slices.Clone(r.Counters)
	slices.Sort(out.Counters)
	slices.SortFunc(out.Chains, func(a, b Chain) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// MapBypass returns the rules with f of every bypass in them.
func (r Ruleset) MapBypass(f func(Bypass) Bypass) Ruleset {
	out := Ruleset{Dormant: r.Dormant, Counters: r.Counters}
	for _, c := range r.Chains {
		rules := c.Rules
		c.Rules = nil
		for _, rule := range rules {
			rule.Matches = slices.Clone(rule.Matches)
			for i, m := range rule.Matches {
				if own, ok := m.(OwnSocket); ok {
					rule.Matches[i] = OwnSocket{Cgroup: f(own.Cgroup)}
				}
			}
			c.Rules = append(c.Rules, rule)
		}
		out.Chains = append(out.Chains, c)
	}
	return out
}
