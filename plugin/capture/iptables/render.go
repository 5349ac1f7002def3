package iptables

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"

	"github.com/weirmesh/weir/plugin/capture"
)

// marker begins the comments of rules that are Weir's: "weir:in_turned" on a rule
// that counts, "weir:<digest>" on a jump.
const marker = "weir:"

// chain is one of our chains in one address family: where it hangs, and its rules
// as arguments.
type chain struct {
	table   string // "nat" or "filter"
	builtin string // "PREROUTING", "OUTPUT", "INPUT"
	name    string // "WEIR_IN"
	rules   [][]string
}

// fresh is the name under which a chain is built while an older one is in force.
func (c chain) fresh() string { return c.name + "_NEW" }

// maxPorts is how many a multiport match holds; a range is two.
const maxPorts = 15

// render says a Ruleset in iptables' words, for one address family. A rule is
// several where it names more ports or prefixes than iptables takes at once; all
// conditions are positive lists and all verdicts final, so that means the same.
func render(r capture.Ruleset, v6 bool) ([]chain, error) {
	var out []chain
	for _, c := range r.Chains {
		one := chain{table: c.Type, builtin: strings.ToUpper(c.Hook), name: "WEIR_" + strings.ToUpper(c.Name)}
		for _, rule := range c.Rules {
			args, err := renderRule(rule, v6)
			if err != nil {
				return nil, fmt.Errorf("iptables: chain %s: %w", c.Name, err)
			}
			one.rules = append(one.rules, args...)
		}
		out = append(out, one)
	}
	return out, nil
}

// renderRule starts with one list of arguments and multiplies it by the chunks of
// each list that it meets. A rule of the other family comes to none.
func renderRule(r capture.Rule, v6 bool) ([][]string, error) {
	lists := [][]string{nil}
	if p := protocol(r); p != "" {
		lists = [][]string{{"-p", p}}
	}
	for _, m := range r.Matches {
		choices, err := renderMatch(m, v6)
		if err != nil {
			return nil, err
		}
		var next [][]string
		for _, l := range lists {
			for _, c := range choices {
				next = append(next, join(l, c))
			}
		}
		lists = next
	}
	end, err := renderEnd(r, v6)
	if err != nil {
		return nil, err
	}
	for i, l := range lists {
		lists[i] = join(l, end)
	}
	return lists, nil
}

func join(a, b []string) []string { return append(append([]string(nil), a...), b...) }

// protocol is the one that a rule's matches imply, or empty.
func protocol(r capture.Rule) string {
	for _, m := range r.Matches {
		switch m.(type) {
		case capture.TCP, capture.FirstPacket, capture.DestPort:
			return "tcp"
		case capture.UDPDestPort:
			return "udp"
		}
	}
	return ""
}

func renderMatch(m capture.Match, v6 bool) ([][]string, error) {
	one := func(args ...string) ([][]string, error) { return [][]string{args}, nil }
	switch m := m.(type) {
	case capture.TCP:
		return one()
	case capture.Loopback:
		if m.Out {
			return one(not(m.Not, "-o", "lo")...)
		}
		return one(not(m.Not, "-i", "lo")...)
	case capture.LocalDest:
		return one(join([]string{"-m", "addrtype"}, not(m.Not, "--dst-type", "LOCAL"))...)
	case capture.FirstPacket:
		return one(join([]string{"-m", "tcp"}, not(m.Not, "--tcp-flags", "FIN,SYN,RST,ACK", "SYN"))...)
	case capture.DestPort:
		return renderPorts(m.Ports), nil
	case capture.UDPDestPort:
		return renderPorts(m.Ports), nil
	case capture.Interface:
		return renderInterface(m)
	case capture.SocketOwner:
		return renderOwner(m), nil
	case capture.DestAddr:
		return renderPrefixes(m.Prefixes, v6), nil
	case capture.OwnSocket:
		return one("-m", "cgroup", "--path", m.Cgroup.Path)
	case capture.AnySocket:
		return one("-m", "socket", "--nowildcard")
	case capture.Untranslated:
		return one("-m", "conntrack", "!", "--ctstate", "DNAT")
	}
	return nil, fmt.Errorf("no words for %v", m)
}

func not(b bool, args ...string) []string {
	if b {
		return append([]string{"!"}, args...)
	}
	return args
}

func renderPorts(ports []capture.PortRange) [][]string {
	var out [][]string
	var words []string
	used := 0
	flush := func() {
		if len(words) > 0 {
			out = append(out, []string{"-m", "multiport", "--dports", strings.Join(words, ",")})
		}
		words, used = nil, 0
	}
	for _, p := range ports {
		word, need := fmt.Sprint(p.First), 1
		if p.First != p.Last {
			word, need = fmt.Sprintf("%d:%d", p.First, p.Last), 2
		}
		if used+need > maxPorts {
			flush()
		}
		words, used = append(words, word), used+need
	}
	flush()
	return out
}

func renderPrefixes(prefixes []netip.Prefix, v6 bool) [][]string {
	var out [][]string
	for _, p := range prefixes {
		if p.Addr().Is6() == v6 {
			out = append(out, []string{"-d", p.String()})
		}
	}
	return out
}

// renderOwner is one choice for each range: an owner match takes one.
func renderOwner(m capture.SocketOwner) [][]string {
	option := "--uid-owner"
	if m.Group {
		option = "--gid-owner"
	}
	var out [][]string
	for _, r := range m.IDs {
		out = append(out, []string{"-m", "owner", option, r.String()})
	}
	return out
}

func renderInterface(m capture.Interface) ([][]string, error) {
	if strings.HasSuffix(m.Name, "+") {
		return nil, &RefusedError{Option: plusInterface, Value: m.Name}
	}
	option := "-i"
	if m.Out {
		option = "-o"
	}
	return [][]string{{option, m.Name}}, nil
}

func renderEnd(r capture.Rule, v6 bool) ([]string, error) {
	var args []string
	if r.Counter != "" {
		args = append(args, "-m", "comment", "--comment", marker+r.Counter)
	}
	switch r.Verdict.Kind {
	case capture.Return:
		return append(args, "-j", "RETURN"), nil
	case capture.Redirect:
		return append(args, "-j", "REDIRECT", "--to-ports", fmt.Sprint(r.Verdict.Port)), nil
	case capture.Reject:
		return append(args, "-j", "REJECT", "--reject-with", "tcp-reset"), nil
	case capture.Unreachable:
		with := "icmp-port-unreachable"
		if v6 {
			with = "icmp6-port-unreachable"
		}
		return append(args, "-j", "REJECT", "--reject-with", with), nil
	}
	return nil, fmt.Errorf("no words for %v", r.Verdict)
}

// digest stands for the rules in the comment of a jump. The bypass's ID is in it:
// the path alone may be of a cgroup made anew, which the loaded rule does not
// match.
func digest(r capture.Ruleset) string {
	h := sha256.New()
	fmt.Fprint(h, r.String())
	for _, c := range r.Chains {
		for _, rule := range c.Rules {
			for _, m := range rule.Matches {
				if own, ok := m.(capture.OwnSocket); ok {
					fmt.Fprintf(h, "%+v", own.Cgroup)
				}
			}
		}
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// jump is the first rule of a builtin chain.
func jump(to, digest string) []string {
	return []string{"-m", "comment", "--comment", marker + digest, "-j", to}
}
