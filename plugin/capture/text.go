package capture

import (
	"fmt"
	"strconv"
	"strings"
)

// String renders the rules as text that `nft -f` loads, from the host's cgroup
// namespace and with the v2 hierarchy at /sys/fs/cgroup.
func (r Ruleset) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "table inet %s {\n", TableName)
	if r.Dormant {
		b.WriteString("\tflags dormant;\n\n")
	}
	for _, c := range r.Counters {
		fmt.Fprintf(&b, "\tcounter %s {\n\t}\n\n", c)
	}
	for i, c := range r.Chains {
		if i > 0 {
			b.WriteString("\n")
		}
		policy := "accept"
		if c.Drop {
			policy = "drop"
		}
		fmt.Fprintf(&b, "\tchain %s {\n\t\ttype %s hook %s priority %d; policy %s;\n", c.Name, c.Type, c.Hook, c.Priority, policy)
		for _, rule := range c.Rules {
			fmt.Fprintf(&b, "\t\t%s\n", rule)
		}
		b.WriteString("\t}\n")
	}
	b.WriteString("}\n")
	return b.String()
}

// String renders one rule, as in an nft chain.
func (r Rule) String() string {
	var words []string
	for _, m := range r.Matches {
		words = append(words, fmt.Sprint(m))
	}
	if r.Counter != "" {
		words = append(words, "counter name "+strconv.Quote(r.Counter))
	}
	return strings.Join(append(words, r.Verdict.String()), " ")
}

func (v Verdict) String() string {
	switch v.Kind {
	case Return:
		return "return"
	case Redirect:
		return fmt.Sprintf("redirect to :%d", v.Port)
	case Reject:
		return "reject with tcp reset"
	case Unreachable:
		return "reject with icmpx port-unreachable"
	case MarkClient:
		return fmt.Sprintf("meta mark set %#x", ClientMark)
	case Untrack:
		return "notrack"
	}
	return fmt.Sprintf("verdict(%d)", v.Kind)
}

func not(b bool) string {
	if b {
		return "!= "
	}
	return ""
}

func (m Loopback) String() string {
	if m.Out {
		return "oif " + not(m.Not) + `"lo"`
	}
	return "iif " + not(m.Not) + `"lo"`
}

func (m LocalDest) String() string { return "fib daddr type " + not(m.Not) + "local" }

func (TCP) String() string { return "meta l4proto tcp" }

func (m FirstPacket) String() string {
	if m.Not {
		return "tcp flags & (fin | syn | rst | ack) != syn"
	}
	return "tcp flags & (fin | syn | rst | ack) == syn"
}

func (m DestPort) String() string { return "tcp dport { " + join(m.Ports) + " }" }

func (m DestAddr) String() string {
	family := "ip"
	if m.Prefixes[0].Addr().Is6() {
		family = "ip6"
	}
	return family + " daddr { " + join(m.Prefixes) + " }"
}

func (m OwnSocket) String() string {
	return fmt.Sprintf("socket cgroupv2 level %d %q", m.Cgroup.Level, m.Cgroup.Path)
}

func (AnySocket) String() string { return "socket transparent <= 1" }

func (Untranslated) String() string { return "ct status & dnat == 0" }

func (m Interface) String() string {
	if m.Out {
		return "oifname " + strconv.Quote(m.Name)
	}
	return "iifname " + strconv.Quote(m.Name)
}

func (m SocketOwner) String() string {
	if m.Group {
		return "meta skgid { " + join(m.IDs) + " }"
	}
	return "meta skuid { " + join(m.IDs) + " }"
}

func (m UDPDestPort) String() string { return "udp dport { " + join(m.Ports) + " }" }

func join[T fmt.Stringer](items []T) string {
	var words []string
	for _, i := range items {
		words = append(words, i.String())
	}
	return strings.Join(words, ", ")
}
