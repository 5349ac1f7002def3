package capture

import (
	"net/netip"
	"slices"
)

// TableName is the nftables table, of family inet, that holds all of a pod's
// capture rules; nothing else is in it.
const TableName = "weir"

// Names of the counters. They count connections, not packets (nat chains and the
// guard's lines see first packets only), but for QUICRefused.
const (
	InTurned    = "in_turned"    // inbound connections turned aside to the proxy
	OutTurned   = "out_turned"   // outbound connections turned aside to the proxy
	OutOwn      = "out_own"      // the proxy's own connections, let by
	GuardPort   = "guard_port"   // refused packets of direct dials to the proxy's ports
	GuardMissed = "guard_missed" // refused: arrived while nobody listened (see guard)
	GuardOut    = "guard_out"    // refused: would leave without having been turned aside (see leaving)
	QUICRefused = "quic_refused" // refused datagrams to UDP port 443 (see refuseQUIC)
)

// Ruleset is what a pod's network namespace is to hold: plain data, in one
// order only, so that two of them can be compared.
type Ruleset struct {
	Dormant  bool // the table is switched off; ours never are, but see Chain.Drop
	Counters []string
	Chains   []Chain
}

// Chain is a base chain.
type Chain struct {
	Name     string
	Type     string // "nat" or "filter"
	Hook     string // "prerouting", "output" or "input"
	Priority int
	Drop     bool // policy drop; ours accept, but what is read back may have been changed
	Rules    []Rule
}

// Rule acts on a packet for which all of Matches hold.
type Rule struct {
	Matches []Match
	Counter string // name of the counter to step, or empty
	Verdict Verdict
}

// Verdict is what becomes of the packet; Port is the proxy's, for Redirect.
type Verdict struct {
	Kind VerdictKind
	Port uint16
}

// VerdictKind is one of the four things a rule does.
type VerdictKind int

// Return leaves the chain, which in a base chain accepts the packet; Redirect
// is DNAT to this host; Reject answers with a TCP reset, Unreachable with an ICMP
// or ICMPv6 error: port unreachable.
const (
	Return VerdictKind = iota + 1
	Redirect
	Reject
	Unreachable
)

// Match is one condition. The types below are all there are.
type Match interface{ isMatch() }

type (
	// Loopback: the packet comes in by lo or, with Out, leaves by it.
	Loopback struct{ Out, Not bool }
	// LocalDest: the destination is an address of this namespace.
	LocalDest struct{ Not bool }
	// TCP: the packet is TCP. FirstPacket and DestPort imply it.
	TCP struct{}
	// FirstPacket: TCP with SYN set and ACK, RST and FIN not.
	FirstPacket struct{ Not bool }
	// DestPort: the TCP destination port is one of Ports, which are sorted and
	// do not touch.
	DestPort struct{ Ports []PortRange }
	// DestAddr: the destination is in one of Prefixes, which are of one address
	// family, sorted and do not overlap.
	DestAddr struct{ Prefixes []netip.Prefix }
	// OwnSocket: the sending socket was created in the cgroup or below it.
	OwnSocket struct{ Cgroup Bypass }
	// AnySocket: a socket exists on the destination address and port, be it
	// bound to a wildcard or in TIME_WAIT.
	AnySocket struct{}
	// Untranslated: the connection's destination is not rewritten by DNAT.
	Untranslated struct{}
	// Interface: the packet comes in by the interface of this name or, with Out,
	// leaves by it.
	Interface struct {
		Out  bool
		Name string
	}
	// SocketOwner: the user (or, with Group, the group) that the sending socket
	// was made as is one of IDs, which are sorted and do not overlap.
	SocketOwner struct {
		Group bool
		IDs   []IDRange
	}
	// UDPDestPort: the packet is UDP and its destination port one of Ports, which
	// are sorted and do not touch.
	UDPDestPort struct{ Ports []PortRange }
)

func (Loopback) isMatch()     {}
func (LocalDest) isMatch()    {}
func (TCP) isMatch()          {}
func (FirstPacket) isMatch()  {}
func (DestPort) isMatch()     {}
func (DestAddr) isMatch()     {}
func (OwnSocket) isMatch()    {}
func (AnySocket) isMatch()    {}
func (Untranslated) isMatch() {}
func (Interface) isMatch()    {}
func (SocketOwner) isMatch()  {}
func (UDPDestPort) isMatch()  {}

// Priorities. Equal ones run in the order of registration, and the first DNAT
// wins: -110 is ahead of whatever a pod or another plugin puts at -100.
const (
	natPriority   = -110
	guardPriority = 0
)

// Rules says how a Spec is done. Every condition is a positive list, so that a
// backend whose lists are short (iptables: 15 ports) can split a rule in two.
func Rules(s Spec) Ruleset {
	n := normal(s)
	r := Ruleset{
		Counters: []string{InTurned, OutTurned, OutOwn, GuardPort, GuardMissed, GuardOut},
		Chains:   []Chain{leaving(n), inbound(n), outbound(n), guard(n)},
	}
	if n.KeepClient {
		r.Chains = append([]Chain{client(n)}, r.Chains...)
	}
	if n.RefuseQUIC {
		r.Counters = append(r.Counters, QUICRefused)
	}
	return r
}

// inbound turns aside what comes from outside to a port on which somebody
// listens: a closed port stays closed, so that callers and TCP probes see what
// they would see without the proxy. lo is left alone: what a pod says to itself
// is direct.
func inbound(s Spec) Chain {
	rules := []Rule{
		{Matches: []Match{Loopback{}}, Verdict: Verdict{Kind: Return}},
		{Matches: []Match{LocalDest{Not: true}}, Verdict: Verdict{Kind: Return}},
		// A namespace without rules has no conntrack: the first packet in the
		// middle of a connection that is older than the rules counts as new, and
		// would be turned aside and reset.
		{Matches: []Match{FirstPacket{Not: true}}, Verdict: Verdict{Kind: Return}},
		{Matches: []Match{DestPort{proxyPorts(s)}}, Verdict: Verdict{Kind: Return}},
	}
	rules = append(rules, leaveInterfaces(s, false)...)
	rules = append(rules, leavePorts(s.ExcludeInboundPorts)...)
	tcp := onlyPorts(s.IncludeInboundPorts)
	if tcp == nil {
		tcp = []Match{TCP{}} // what returned above was TCP: UDP comes as far as here
	}
	rules = append(rules, Rule{
		Matches: append(tcp, AnySocket{}),
		Counter: InTurned,
		Verdict: Verdict{Redirect, s.InboundPort},
	})
	return Chain{Name: "in", Type: "nat", Hook: "prerouting", Priority: natPriority, Rules: rules}
}

// outbound turns aside what the application dials, and lets by what the proxy
// dials: those sockets were created in the proxies' cgroup, which unlike a uid
// or a mark no process of the pod can choose for itself.
func outbound(s Spec) Chain {
	rules := []Rule{
		{Matches: []Match{Loopback{Out: true}}, Verdict: Verdict{Kind: Return}},
		{Matches: []Match{OwnSocket{s.Bypass}}, Counter: OutOwn, Verdict: Verdict{Kind: Return}},
	}
	rules = append(rules, leaveOutbound(s)...)
	rules = append(rules, dialled(s, Rule{Counter: OutTurned, Verdict: Verdict{Redirect, s.OutboundPort}})...)
	return Chain{Name: "out", Type: "nat", Hook: "output", Priority: natPriority, Rules: rules}
}

// dialled does something with what a Spec captures of what is dialled, after
// leaveOutbound.
func dialled(s Spec, what Rule, more ...Match) []Rule {
	rules := leavePorts(s.ExcludeOutboundPorts)
	where := append([]Match{FirstPacket{}}, onlyPorts(s.IncludeOutboundPorts)...)
	rule := func(to ...Match) Rule {
		return Rule{Matches: slices.Concat(where, to, more), Counter: what.Counter, Verdict: what.Verdict}
	}
	if len(s.IncludeOutboundCIDRs) == 0 {
		return append(rules, rule())
	}
	for _, prefixes := range families(s.IncludeOutboundCIDRs) {
		rules = append(rules, rule(DestAddr{prefixes}))
	}
	return rules
}

// leaving refuses what is not to leave the pod. First of all what outbound was not asked
// about: a connection from the port that the proxy dialled the same address from, and had
// no answer; for two minutes conntrack takes it for that one, which is not turned aside.
// (What is turned aside leaves by lo from here on.) And QUIC, where that is asked for. It
// is the first chain, which iptables puts in force last.
func leaving(s Spec) Chain {
	rules := []Rule{
		leave(Loopback{Out: true}),
		{Matches: []Match{FirstPacket{Not: true}}, Verdict: Verdict{Kind: Return}}, // as in guard
		leave(OwnSocket{s.Bypass}),
	}
	rules = append(rules, leaveOutbound(s)...)
	if s.RefuseQUIC {
		rules = append(rules, refuseQUIC(s)...)
	}
	rules = append(rules, dialled(s, Rule{Counter: GuardOut, Verdict: Verdict{Kind: Reject}}, Untranslated{})...)
	return Chain{Name: "guard_out", Type: "filter", Hook: "output", Priority: guardPriority, Rules: rules}
}

// guard refuses two things. Direct dials of the proxy's own ports, from inside
// and outside: they never went through DNAT, and have no original destination.
// And connections that inbound let by because nobody listened, in case somebody
// listens by now: without this line 94 of 59,000 reached an application past
// its proxy while its listener came and went. It must name exactly the ports
// and interfaces that inbound captures, or it would reset the others. This chain sees
// every packet, so the first line is for those that are not a connection's first.
func guard(s Spec) Chain {
	rules := []Rule{
		{Matches: []Match{FirstPacket{Not: true}}, Verdict: Verdict{Kind: Return}},
		{Matches: []Match{DestPort{proxyPorts(s)}, Untranslated{}}, Counter: GuardPort, Verdict: Verdict{Kind: Reject}},
	}
	rules = append(rules, leaveInterfaces(s, false)...)
	rules = append(rules, leavePorts(s.ExcludeInboundPorts)...)
	last := append([]Match{Loopback{Not: true}, LocalDest{}, FirstPacket{}}, onlyPorts(s.IncludeInboundPorts)...)
	rules = append(rules, Rule{
		Matches: append(last, Untranslated{}),
		Counter: GuardMissed,
		Verdict: Verdict{Kind: Reject},
	})
	return Chain{Name: "guard", Type: "filter", Hook: "input", Priority: guardPriority, Rules: rules}
}

func leavePorts(ports []PortRange) []Rule {
	if len(ports) == 0 {
		return nil
	}
	return []Rule{{Matches: []Match{DestPort{ports}}, Verdict: Verdict{Kind: Return}}}
}

func onlyPorts(ports []PortRange) []Match {
	if len(ports) == 0 {
		return nil
	}
	return []Match{DestPort{ports}}
}

func proxyPorts(s Spec) []PortRange {
	return mergeRanges([]PortRange{{s.OutboundPort, s.OutboundPort}, {s.InboundPort, s.InboundPort}})
}

// families splits prefixes by address family, IPv4 first; a family without any
// is left out.
func families(prefixes []netip.Prefix) [][]netip.Prefix {
	var v4, v6 []netip.Prefix
	for _, p := range prefixes {
		if p.Addr().Is4() {
			v4 = append(v4, p)
		} else {
			v6 = append(v6, p)
		}
	}
	return slices.DeleteFunc([][]netip.Prefix{v4, v6}, func(f []netip.Prefix) bool { return len(f) == 0 })
}
