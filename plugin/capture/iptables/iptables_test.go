package iptables

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/plugin/capture/nstest"
)

func spec(b capture.Bypass) capture.Spec {
	return capture.Spec{OutboundPort: capture.DefaultOutboundPort, InboundPort: capture.DefaultInboundPort, Bypass: b}
}

func ports(t testing.TB, s string) []capture.PortRange {
	t.Helper()
	p, err := capture.ParsePorts(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// lines says a Ruleset in one family as one line per rule.
func lines(t *testing.T, s capture.Spec, v6 bool) string {
	t.Helper()
	chains, err := render(capture.Rules(s), v6)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, c := range chains {
		for _, r := range c.rules {
			b.WriteString("-t " + c.table + " -A " + c.name + " " + strings.Join(r, " ") + "\n")
		}
	}
	return b.String()
}

func TestRender(t *testing.T) {
	got := lines(t, spec(capture.Bypass{Path: "weir", ID: 1, Level: 1}), false)
	want := strings.TrimLeft(`
-t filter -A WEIR_GUARD_OUT -o lo -j RETURN
-t filter -A WEIR_GUARD_OUT -p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -j RETURN
-t filter -A WEIR_GUARD_OUT -m cgroup --path weir -j RETURN
-t filter -A WEIR_GUARD_OUT -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m conntrack ! --ctstate DNAT -m comment --comment weir:guard_out -j REJECT --reject-with tcp-reset
-t nat -A WEIR_IN -i lo -j RETURN
-t nat -A WEIR_IN -m addrtype ! --dst-type LOCAL -j RETURN
-t nat -A WEIR_IN -p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -j RETURN
-t nat -A WEIR_IN -p tcp -m multiport --dports 15001,15006 -j RETURN
-t nat -A WEIR_IN -p tcp -m socket --nowildcard -m comment --comment weir:in_turned -j REDIRECT --to-ports 15006
-t nat -A WEIR_OUT -o lo -j RETURN
-t nat -A WEIR_OUT -m cgroup --path weir -m comment --comment weir:out_own -j RETURN
-t nat -A WEIR_OUT -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m comment --comment weir:out_turned -j REDIRECT --to-ports 15001
-t filter -A WEIR_GUARD -p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -j RETURN
-t filter -A WEIR_GUARD -p tcp -m multiport --dports 15001,15006 -m conntrack ! --ctstate DNAT -m comment --comment weir:guard_port -j REJECT --reject-with tcp-reset
-t filter -A WEIR_GUARD -p tcp ! -i lo -m addrtype --dst-type LOCAL -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m conntrack ! --ctstate DNAT -m comment --comment weir:guard_missed -j REJECT --reject-with tcp-reset
`, "\n")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// TestRenderSplits: 15 ports a rule, ranges counting twice; one prefix a rule,
// each family its own.
func TestRenderSplits(t *testing.T) {
	s := spec(capture.Bypass{Path: "weir", ID: 1, Level: 1})
	s.IncludeOutboundPorts = ports(t, "1,3,5,7,9,11,13,15,17,19,21,23,25,27-28,31")
	s.IncludeOutboundCIDRs = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("192.168.0.0/16"), netip.MustParsePrefix("fd00::/8")}
	var turned []string
	for line := range strings.Lines(lines(t, s, false)) {
		if strings.Contains(line, capture.OutTurned) {
			_, line, _ = strings.Cut(line, "SYN -m multiport --dports ")
			line, _, _ = strings.Cut(line, " -m comment")
			turned = append(turned, line)
		}
	}
	want := []string{
		"1,3,5,7,9,11,13,15,17,19,21,23,25,27:28 -d 10.0.0.0/8",
		"1,3,5,7,9,11,13,15,17,19,21,23,25,27:28 -d 192.168.0.0/16",
		"31 -d 10.0.0.0/8",
		"31 -d 192.168.0.0/16",
	}
	if diff := cmp.Diff(want, turned); diff != "" {
		t.Error(diff)
	}
	v6 := lines(t, s, true)
	if strings.Contains(v6, "10.0.0.0/8") || !strings.Contains(v6, "-d fd00::/8") {
		t.Errorf("IPv6 has the wrong prefixes:\n%s", v6)
	}
}

func TestRenderExclusions(t *testing.T) {
	s := spec(capture.Bypass{Path: "weir", ID: 1, Level: 1})
	s.ExcludeOutboundUIDs = []capture.IDRange{{First: 0, Last: 0}, {First: 1000, Last: 1999}}
	s.ExcludeOutboundGIDs = []capture.IDRange{{First: 7, Last: capture.MaxID}}
	s.ExcludeInterfaces, s.RefuseQUIC = []string{"net1", "net2"}, true
	s.IncludeOutboundCIDRs = []netip.Prefix{netip.MustParsePrefix("fd00::/8")}
	had := lines(t, spec(capture.Bypass{Path: "weir", ID: 1, Level: 1}), true)
	var more strings.Builder
	for line := range strings.Lines(lines(t, s, true)) {
		if !strings.Contains(had, line) {
			more.WriteString(line)
		}
	}
	want := strings.TrimLeft(`
-t filter -A WEIR_GUARD_OUT -o net1 -j RETURN
-t filter -A WEIR_GUARD_OUT -o net2 -j RETURN
-t filter -A WEIR_GUARD_OUT -m owner --uid-owner 0 -j RETURN
-t filter -A WEIR_GUARD_OUT -m owner --uid-owner 1000-1999 -j RETURN
-t filter -A WEIR_GUARD_OUT -m owner --gid-owner 7-4294967294 -j RETURN
-t filter -A WEIR_GUARD_OUT -p udp -m multiport --dports 443 -d fd00::/8 -m comment --comment weir:quic_refused -j REJECT --reject-with icmp6-port-unreachable
-t filter -A WEIR_GUARD_OUT -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -d fd00::/8 -m conntrack ! --ctstate DNAT -m comment --comment weir:guard_out -j REJECT --reject-with tcp-reset
-t nat -A WEIR_IN -i net1 -j RETURN
-t nat -A WEIR_IN -i net2 -j RETURN
-t nat -A WEIR_OUT -o net1 -j RETURN
-t nat -A WEIR_OUT -o net2 -j RETURN
-t nat -A WEIR_OUT -m owner --uid-owner 0 -j RETURN
-t nat -A WEIR_OUT -m owner --uid-owner 1000-1999 -j RETURN
-t nat -A WEIR_OUT -m owner --gid-owner 7-4294967294 -j RETURN
-t nat -A WEIR_OUT -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -d fd00::/8 -m comment --comment weir:out_turned -j REDIRECT --to-ports 15001
-t filter -A WEIR_GUARD -i net1 -j RETURN
-t filter -A WEIR_GUARD -i net2 -j RETURN
`, "\n")
	if diff := cmp.Diff(want, more.String()); diff != "" {
		t.Error(diff)
	}
	if v4 := lines(t, s, false); strings.Contains(v4, "quic_refused") || strings.Contains(v4, "icmp6") {
		t.Errorf("IPv4 has IPv6's:\n%s", v4)
	}
}

// TestRefusals: what iptables cannot do is refused, and nothing is left of it.
func TestRefusals(t *testing.T) {
	s := spec(capture.Bypass{Path: "weir", ID: 1, Level: 1})
	s.ExcludeInterfaces = []string{"net1", "odd+"}
	for _, v6 := range []bool{false, true} {
		_, err := render(capture.Rules(s), v6)
		refused, ok := errors.AsType[*RefusedError](err)
		if !ok || refused.Option != Refusals()[0] || !strings.Contains(err.Error(), `exclude-interfaces: "odd+"`) {
			t.Errorf("%v", err)
		}
	}
	each(t, func(t *testing.T, ns *nstest.NS, b Backend) {
		before := b.save(t, ns)
		changed, err := apply(ns, b, s)
		if _, ok := errors.AsType[*RefusedError](err); !ok || changed {
			t.Errorf("changed %v, error %v", changed, err)
		}
		if diff := cmp.Diff(before, b.save(t, ns)); diff != "" {
			t.Errorf("left behind:\n%s", diff)
		}
	})
}

// TestApplyExclusions: the optional rules come, are seen to be there and go.
func TestApplyExclusions(t *testing.T) {
	cg := nstest.NewCgroup(t)
	s := spec(cg.Bypass)
	s.ExcludeOutboundUIDs = []capture.IDRange{{First: 0, Last: 0}, {First: 1000, Last: 1999}}
	s.ExcludeOutboundGIDs = []capture.IDRange{{First: 7, Last: capture.MaxID}}
	s.ExcludeInterfaces, s.RefuseQUIC = []string{"net1"}, true
	each(t, func(t *testing.T, ns *nstest.NS, b Backend) {
		if _, err := apply(ns, b, spec(cg.Bypass)); err != nil {
			t.Fatal(err)
		}
		plain := b.save(t, ns)
		for _, want := range []bool{true, false} {
			if changed, err := apply(ns, b, s); err != nil || changed != want {
				t.Fatalf("changed %v, want %v, error %v", changed, want, err)
			}
		}
		with := b.save(t, ns)
		for _, want := range []string{"weir:quic_refused", "--uid-owner 1000-1999", "--gid-owner 7-4294967294", "-A WEIR_GUARD -i net1 -j RETURN"} {
			if !strings.Contains(with, want) {
				t.Errorf("no %q in\n%s", want, with)
			}
		}
		ns.Run(t, "ip6tables"+b.Variant, "-F", "WEIR_GUARD_OUT")
		if changed, err := apply(ns, b, s); err != nil || !changed {
			t.Errorf("flushed: changed %v, error %v", changed, err)
		}
		if changed, err := apply(ns, b, spec(cg.Bypass)); err != nil || !changed {
			t.Errorf("without: changed %v, error %v", changed, err)
		}
		if diff := cmp.Diff(plain, b.save(t, ns)); diff != "" {
			t.Errorf("there and back:\n%s", diff)
		}
		if _, err := apply(ns, b, s); err != nil {
			t.Fatal(err)
		}
		var err error
		ns.Do(func() { err = b.Delete() })
		if left := b.save(t, ns); err != nil || strings.Contains(left, "WEIR") {
			t.Errorf("%v, left:\n%s", err, left)
		}
	})
}

func TestDigestKnowsTheCgroup(t *testing.T) {
	a := digest(capture.Rules(spec(capture.Bypass{Path: "weir", ID: 1, Level: 1})))
	b := digest(capture.Rules(spec(capture.Bypass{Path: "weir", ID: 2, Level: 1})))
	if a == b {
		t.Error("a cgroup made anew has the same digest")
	}
}

// variants are the iptables of this machine that work.
func variants(t *testing.T) []string {
	t.Helper()
	var out []string
	for _, v := range []string{"-nft", "-legacy"} {
		var err error
		nstest.New(t).Do(func() { _, err = Backend{Variant: v}.families() })
		if err != nil {
			t.Logf("not tested: %v", err)
			continue
		}
		out = append(out, v)
	}
	if len(out) == 0 {
		t.Skip("no iptables works here")
	}
	return out
}

func each(t *testing.T, f func(t *testing.T, ns *nstest.NS, b Backend)) {
	for _, v := range variants(t) {
		t.Run("iptables"+v, func(t *testing.T) {
			f(t, nstest.New(t), Backend{Variant: v, LockFile: filepath.Join(t.TempDir(), "locks", "container.lock")})
		})
	}
}

func (b Backend) save(t *testing.T, ns *nstest.NS) string {
	t.Helper()
	var out strings.Builder
	for _, c := range []string{"iptables", "ip6tables"} {
		for _, table := range []string{"nat", "filter"} {
			out.WriteString(ns.Run(t, c+b.Variant, "-t", table, "-S"))
		}
	}
	return out.String()
}

func apply(ns *nstest.NS, b Backend, s capture.Spec) (bool, error) {
	var changed bool
	var err error
	ns.Do(func() { changed, err = b.Apply(capture.Rules(s)) })
	return changed, err
}

func TestApply(t *testing.T) {
	cg := nstest.NewCgroup(t)
	each(t, func(t *testing.T, ns *nstest.NS, b Backend) {
		foreign := func(c string) {
			ns.Run(t, c+b.Variant, "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "81", "-j", "REDIRECT", "--to-ports", "8081")
		}
		foreign("iptables")
		foreign("ip6tables")
		before := b.save(t, ns)

		if changed, err := apply(ns, b, spec(cg.Bypass)); err != nil || !changed {
			t.Fatalf("first: changed %v, error %v", changed, err)
		}
		first := b.save(t, ns)
		for _, want := range []string{"-A PREROUTING -p tcp -m tcp --dport 81", "-j WEIR_IN", "-j WEIR_OUT", "-j WEIR_GUARD\n", "-j WEIR_GUARD_OUT\n", "--to-ports 15006"} {
			if strings.Count(first, want) != 2 {
				t.Errorf("not in both families: %q\n%s", want, first)
			}
		}
		if strings.Contains(first, "_NEW") {
			t.Errorf("left from building:\n%s", first)
		}
		if changed, err := apply(ns, b, spec(cg.Bypass)); err != nil || changed {
			t.Errorf("second: changed %v, error %v", changed, err)
		}

		other := spec(cg.Bypass)
		other.ExcludeInboundPorts = ports(t, "22,8000-8010")
		if changed, err := apply(ns, b, other); err != nil || !changed {
			t.Errorf("another spec: changed %v, error %v", changed, err)
		}
		if got := b.save(t, ns); strings.Count(got, "-j WEIR_IN") != 2 || !strings.Contains(got, "--dports 22,8000:8010") || strings.Contains(got, "_NEW") {
			t.Errorf("after another spec:\n%s", got)
		}
		if _, err := apply(ns, b, spec(cg.Bypass)); err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(first, b.save(t, ns)); diff != "" {
			t.Errorf("there and back:\n%s", diff)
		}

		var err error
		ns.Do(func() { err = b.Delete() })
		if err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(before, b.save(t, ns)); diff != "" {
			t.Errorf("after Delete (-before +after):\n%s", diff)
		}
		if _, err := os.Stat(b.LockFile); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the lock file was left: %v", err)
		}
	})
}

func TestDriftIsSeen(t *testing.T) {
	cg := nstest.NewCgroup(t)
	for name, args := range map[string][]string{
		"a rule gone":     {"-t", "nat", "-D", "WEIR_OUT", "2"},
		"a rule more":     {"-t", "nat", "-A", "WEIR_IN", "-j", "ACCEPT"},
		"a jump gone":     {"-D", "INPUT", "1"},
		"not first":       {"-t", "nat", "-I", "OUTPUT", "1", "-p", "tcp", "-j", "ACCEPT"},
		"jumped to twice": {"-t", "nat", "-A", "OUTPUT", "-j", "WEIR_OUT"},
	} {
		t.Run(name, func(t *testing.T) {
			each(t, func(t *testing.T, ns *nstest.NS, b Backend) {
				if _, err := apply(ns, b, spec(cg.Bypass)); err != nil {
					t.Fatal(err)
				}
				ns.Run(t, "ip6tables"+b.Variant, args...)
				if changed, err := apply(ns, b, spec(cg.Bypass)); err != nil || !changed {
					t.Errorf("changed %v, error %v", changed, err)
				}
				if changed, err := apply(ns, b, spec(cg.Bypass)); err != nil || changed {
					t.Errorf("and again: changed %v, error %v", changed, err)
				}
			})
		})
	}
}

// TestFailedApplyLeavesWhatWas: there is no cgroup of that name.
func TestFailedApplyLeavesWhatWas(t *testing.T) {
	cg := nstest.NewCgroup(t)
	each(t, func(t *testing.T, ns *nstest.NS, b Backend) {
		bad := spec(capture.Bypass{Path: "no/such/cgroup", ID: 1, Level: 3})
		empty := b.save(t, ns)
		if changed, err := apply(ns, b, bad); err == nil || changed {
			t.Fatalf("changed %v, error %v", changed, err)
		}
		if diff := cmp.Diff(empty, b.save(t, ns)); diff != "" {
			t.Errorf("left in an empty namespace:\n%s", diff)
		}
		if _, err := apply(ns, b, spec(cg.Bypass)); err != nil {
			t.Fatal(err)
		}
		want := b.save(t, ns)
		if _, err := apply(ns, b, bad); err == nil {
			t.Fatal("accepted")
		}
		if diff := cmp.Diff(want, b.save(t, ns)); diff != "" {
			t.Errorf("(-before +after):\n%s", diff)
		}
	})
}

func TestRead(t *testing.T) {
	cg := nstest.NewCgroup(t)
	each(t, func(t *testing.T, ns *nstest.NS, b Backend) {
		read := func() capture.State {
			var st capture.State
			var err error
			ns.Do(func() { st, err = b.Read() })
			if err != nil {
				t.Fatal(err)
			}
			return st
		}
		if st := read(); st.Text != "" || st.Counters != nil {
			t.Errorf("in an empty namespace: %+v", st)
		}
		if _, err := apply(ns, b, spec(cg.Bypass)); err != nil {
			t.Fatal(err)
		}
		st := read()
		for _, name := range capture.Rules(spec(cg.Bypass)).Counters {
			if n, ok := st.Counters[name]; !ok || n != (capture.Counter{}) {
				t.Errorf("%s: %v, %v", name, n, ok)
			}
		}
		if !strings.Contains(st.Text, "ip6tables -t nat -A WEIR_OUT") || strings.Contains(st.Text, " -c ") {
			t.Errorf("text:\n%s", st.Text)
		}
	})
}

func TestSplitCounter(t *testing.T) {
	for in, want := range map[string]capture.Counter{
		`-A WEIR_IN -i lo -c 3 180 -j RETURN`: {Packets: 3, Bytes: 180},
		`-A WEIR_IN -i lo -j RETURN -c 3 180`: {Packets: 3, Bytes: 180},
		`-A WEIR_IN -i lo -j RETURN`:          {},
	} {
		plain, got := splitCounter(in)
		if got != want || plain != `-A WEIR_IN -i lo -j RETURN` {
			t.Errorf("%q: %v, %q", in, got, plain)
		}
	}
}

// TestNoBinary: a node without iptables is told so, by name.
func TestNoBinary(t *testing.T) {
	_, err := apply(nstest.New(t), Backend{Variant: "-none"}, spec(capture.Bypass{Path: "weir", ID: 1, Level: 1}))
	if err == nil || !strings.Contains(err.Error(), "iptables-none") {
		t.Error(err)
	}
}
