package capture

// quicPort is where HTTP/3 is served unless something else was said; clients go
// back to TCP when it does not answer, and at once when it is refused.
const quicPort = 443

// refuseQUIC refuses outbound QUIC where its TCP would be turned aside, as far as
// owners, interfaces and addresses go: what is excluded keeps its QUIC, and so do
// lo and the proxy. The sender's call fails with EPERM, as the packet ends in
// this hook, or with what the ICMP error said, ECONNREFUSED.
func refuseQUIC(s Spec) []Rule {
	refuse := func(where ...Match) Rule {
		return Rule{
			Matches: append([]Match{UDPDestPort{[]PortRange{{quicPort, quicPort}}}}, where...),
			Counter: QUICRefused,
			Verdict: Verdict{Kind: Unreachable},
		}
	}
	if len(s.IncludeOutboundCIDRs) == 0 {
		return []Rule{refuse()}
	}
	var rules []Rule
	for _, prefixes := range families(s.IncludeOutboundCIDRs) {
		rules = append(rules, refuse(DestAddr{prefixes}))
	}
	return rules
}
