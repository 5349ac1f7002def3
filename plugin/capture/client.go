package capture

import "fmt"

// ClientMark is the mark of packets between the proxy and the application whose
// addresses are the caller's.
//
// Conntrack does not see them: they have the tuple of the connection that came in, and
// it would take them for that one. Nothing is lost by it, as nothing translates them,
// and two of a request's eight passes through conntrack are saved.
const ClientMark = 0x711

// The two things that a rule does without ending its chain; what follows it is
// looked at still. Their numbers are apart from those of the verdicts that end it.
const (
	MarkClient VerdictKind = iota + 101 // sets the packet's mark to ClientMark
	Untrack                             // has conntrack pass the packet over
)

type (
	// TransparentSocket: the sending socket may have an address that is not this namespace's
	// (IP_TRANSPARENT of ip(7)).
	TransparentSocket struct{}
	// ClientMarked: the packet has the mark ClientMark.
	ClientMarked struct{}
)

func (TransparentSocket) isMatch() {}
func (ClientMarked) isMatch()      {}

func (TransparentSocket) String() string { return "socket transparent 1" }

func (ClientMarked) String() string { return fmt.Sprintf("meta mark %#x", ClientMark) }

// rawPriority is before conntrack looks (-200).
const rawPriority = -300

// client is the chain by which the proxy's connections to the application may
// carry the caller's address. What the proxy sends by a socket that has such an address
// is marked: only those are transparent. Every packet on lo is asked that first; whether
// its source is the pod's own would cost as much as all other rules. The application's
// socket takes the mark over (net.ipv4.tcp_fwmark_accept), so its answers are marked too,
// and a routing rule keeps what is marked in the namespace. What is untracked on its way
// out stays so where lo brings it in. No chain of type route is needed: what the proxy
// sends to the application goes by lo anyway, and answers are routed by their mark to
// begin with.
func client(s Spec) Chain {
	return Chain{Name: "raw", Type: "filter", Hook: "output", Priority: rawPriority, Rules: []Rule{
		{Matches: []Match{Loopback{Out: true}, TransparentSocket{}, OwnSocket{s.Bypass}}, Verdict: Verdict{Kind: MarkClient}},
		{Matches: []Match{ClientMarked{}}, Verdict: Verdict{Kind: Untrack}},
	}}
}

// KeepsClient says whether the rules let the proxy use the caller's address.
func (r Ruleset) KeepsClient() bool {
	for _, c := range r.Chains {
		for _, rule := range c.Rules {
			if rule.Verdict.Kind == Untrack {
				return true
			}
		}
	}
	return false
}
