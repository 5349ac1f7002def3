package capture

import "slices"

// Released says what takes the place of a Spec's rules while a pod is let go:
// nothing is turned aside any more, and what was turned aside before goes on. The
// translation of those connections ends with the last rule that needs conntrack
// and with the last nat chain, so both stay until the proxy has no connection
// left; only then may the rules be deleted. The guard keeps refusing direct dials
// of the proxy's ports as long as it listens there.
func Released(s Spec) Ruleset {
	out := Rules(s)
	out.Counters = []string{GuardPort}
	out.Chains = slices.DeleteFunc(out.Chains, func(c Chain) bool { return c.Name == "guard_out" })
	hold := []Rule{{Matches: []Match{FirstPacket{}, Untranslated{}}, Verdict: Verdict{Kind: Return}}}
	for i := range out.Chains {
		switch c := &out.Chains[i]; {
		case c.Type == "nat":
			c.Rules = hold
		case c.Name == "guard":
			c.Rules = slices.DeleteFunc(c.Rules, func(r Rule) bool { return r.Counter != GuardPort })
		}
	}
	return out
}
