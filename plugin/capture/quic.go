package capture

// quicPort is where HTTP/3 is served unless something else was said; clients go
// back to TCP when it does not answer, and at once when it is refused.
const quicPort = 443

// quic refuses outbound QUIC where its TCP would be turned aside, as far as
// owners, interfaces and addresses go: what is excluded keeps its QUIC, and so do
// lo and the proxy. The sender's call fails with EPERM, as the packet ends in
// this hook, or with what the ICMP error said, ECONNREFUSED.
func quic(s Spec) Chain {
	rules := []Rule{
		leave(Loopback{Out: true}),
		leave(OwnSocket{s.Bypass}),
	}
	rules = append(rules, leaveOutbound(s)...)
	refuse := func(where ...Match) Rule {
		return Rule{
			Matches: append([]Match{UDPDestPort{[]PortRange{{quicPort, quicPort}}}}, where...),
			Counter: QUICRefused,
			Verdict: Verdict{Kind: Unreachable},
		}
	}
	if len(s.IncludeOutboundCIDRs) == 0 {
		rules = append(rules, refuse())
	}
	for _, prefixes := range families(s.IncludeOutboundCIDRs) {
		rules = append(rules, refuse(DestAddr{prefixes}))
	}
	return Chain{Name: "quic", Type: "filter", Hook: "output", Priority: guardPriority, Rules: rules}
}
