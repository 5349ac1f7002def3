package capture

// leaveOutbound lets by what a Spec excludes of what is dialled, whatever the
// port: by the socket's owner, the interface and the address.
func leaveOutbound(s Spec) []Rule {
	rules := leaveInterfaces(s, true)
	if len(s.ExcludeOutboundUIDs) > 0 {
		rules = append(rules, leave(SocketOwner{IDs: s.ExcludeOutboundUIDs}))
	}
	if len(s.ExcludeOutboundGIDs) > 0 {
		rules = append(rules, leave(SocketOwner{Group: true, IDs: s.ExcludeOutboundGIDs}))
	}
	for _, prefixes := range families(s.ExcludeOutboundCIDRs) {
		rules = append(rules, leave(DestAddr{prefixes}))
	}
	return rules
}

// leaveInterfaces lets by what comes in by an excluded interface or, with out,
// leaves by one.
func leaveInterfaces(s Spec, out bool) []Rule {
	var rules []Rule
	for _, name := range s.ExcludeInterfaces {
		rules = append(rules, leave(Interface{Out: out, Name: name}))
	}
	return rules
}

func leave(m Match) Rule {
	return Rule{Matches: []Match{m}, Verdict: Verdict{Kind: Return}}
}
