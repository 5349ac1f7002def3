package nft

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/plugin/capture/nstest"
	"golang.org/x/sys/unix"
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

func ids(t testing.TB, s string) []capture.IDRange {
	t.Helper()
	p, err := capture.ParseIDs(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// specs are Specs that use every kind of rule.
func specs(t testing.TB, b capture.Bypass) map[string]capture.Spec {
	excludes, includes, cidrs, ends, client := spec(b), spec(b), spec(b), spec(b), spec(b)
	client.KeepClient = true
	excludes.ExcludeInboundPorts = ports(t, "22,8000-8010")
	excludes.ExcludeOutboundPorts = ports(t, "5432")
	includes.IncludeInboundPorts = ports(t, "80,443")
	includes.IncludeOutboundPorts = ports(t, "80,8080-8090,8092")
	cidrs.ExcludeOutboundCIDRs = []netip.Prefix{netip.MustParsePrefix("169.254.169.254/32"), netip.MustParsePrefix("10.0.0.0/8")}
	cidrs.IncludeOutboundCIDRs = []netip.Prefix{netip.MustParsePrefix("2001:db8::/32"), netip.MustParsePrefix("10.96.0.0/12"), netip.MustParsePrefix("10.128.0.0/12")}
	ends.ExcludeInboundPorts = ports(t, "60000-65535")
	ends.IncludeOutboundPorts = ports(t, "1-65535")
	ends.IncludeOutboundCIDRs = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	ends.ExcludeOutboundCIDRs = []netip.Prefix{netip.MustParsePrefix("240.0.0.0/4"), netip.MustParsePrefix("ff00::/8")}
	owners, interfaces, quic := spec(b), spec(b), spec(b)
	owners.ExcludeOutboundUIDs = ids(t, "0,1000-1999,2001,4294967294")
	owners.ExcludeOutboundGIDs = ids(t, "1,2,256,65536") // their order differs from byte order to byte order
	interfaces.ExcludeInterfaces = []string{"net1", "eth1.100", "123456789012345", "odd+", "lo"}
	quic.RefuseQUIC = true
	quic.ExcludeOutboundUIDs = ids(t, "0-4294967294")
	quic.ExcludeInterfaces = []string{"net1"}
	quic.IncludeOutboundCIDRs = cidrs.IncludeOutboundCIDRs
	quic.KeepClient = true
	return map[string]capture.Spec{"default": spec(b), "excludes": excludes, "includes": includes, "cidrs": cidrs, "ends": ends,
		"owners": owners, "interfaces": interfaces, "quic": quic, "client": client}
}

// TestKernelHoldsWhatTheTextSays loads the text with nft into one namespace and
// applies the value to another: nft must list both alike.
func TestKernelHoldsWhatTheTextSays(t *testing.T) {
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("no nft binary to compare with")
	}
	cg := nstest.NewCgroup(t)
	for name, s := range specs(t, cg.Bypass) {
		t.Run(name, func(t *testing.T) {
			rules := capture.Rules(s)
			byText, byValue := nstest.New(t), nstest.New(t)
			file := filepath.Join(t.TempDir(), "rules.nft")
			if err := os.WriteFile(file, []byte(rules.String()), 0o600); err != nil {
				t.Fatal(err)
			}
			// nft looks for cgroups in /sys/fs/cgroup only.
			const load = `mount --make-rprivate / && mount --bind "$1" /sys/fs/cgroup && nft -f "$2"`
			byText.Run(t, "unshare", "-m", "sh", "-ec", load, "sh", filepath.Dir(cg.Dir), file)
			if changed, err := (Backend{NS: byValue.FD()}).Apply(rules); err != nil || !changed {
				t.Fatalf("changed %v, error %v", changed, err)
			}
			want := byText.Run(t, "nft", "list", "ruleset")
			// nft makes a comparison of a set of one.
			single := regexp.MustCompile(`\{ ([^, ]+) \}`)
			got := byValue.Run(t, "nft", "list", "ruleset")
			if diff := cmp.Diff(single.ReplaceAllString(want, "$1"), single.ReplaceAllString(got, "$1")); diff != "" {
				t.Errorf("nft lists (-text +value):\n%s", diff)
			}
			if !strings.Contains(got, "redirect to :15006") {
				t.Errorf("no rules in the listing:\n%s", got)
			}
			if single.MatchString(got) {
				return
			}
			// What nft loaded is read back as the value, too.
			if changed, err := (Backend{NS: byText.FD()}).Apply(rules); err != nil || changed {
				t.Errorf("what nft loaded is not equal: changed %v, error %v", changed, err)
			}
		})
	}
}

// generation is the number of transactions that the namespace has seen.
func generation(t *testing.T, ns int) uint32 {
	t.Helper()
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: ns})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	replies, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlink.Request},
		Data:   make([]byte, nfgenmsgLen),
	})
	if err != nil {
		t.Fatal(err)
	}
	ad, err := netlink.NewAttributeDecoder(replies[0].Data[nfgenmsgLen:])
	if err != nil {
		t.Fatal(err)
	}
	ad.ByteOrder = binary.BigEndian
	for ad.Next() {
		if ad.Type() == unix.NFTA_GEN_ID {
			return ad.Uint32()
		}
	}
	t.Fatal("no generation")
	return 0
}

func TestApplyTwiceSendsNothing(t *testing.T) {
	cg := nstest.NewCgroup(t)
	for name, s := range specs(t, cg.Bypass) {
		t.Run(name, func(t *testing.T) {
			fd := nstest.New(t).FD()
			b, rules := Backend{NS: fd}, capture.Rules(s)
			if changed, err := b.Apply(rules); err != nil || !changed {
				t.Fatalf("first: changed %v, error %v", changed, err)
			}
			before := generation(t, fd)
			if changed, err := b.Apply(rules); err != nil || changed {
				t.Errorf("second: changed %v, error %v", changed, err)
			}
			if after := generation(t, fd); after != before {
				t.Errorf("generation %d became %d", before, after)
			}
			other := s
			other.OutboundPort++
			if changed, err := b.Apply(capture.Rules(other)); err != nil || !changed {
				t.Errorf("another spec: changed %v, error %v", changed, err)
			}
			if after := generation(t, fd); after != before+1 {
				t.Errorf("a replacement is %d transactions", after-before)
			}
			st, err := b.Read()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(capture.Rules(other).String(), st.Text); diff != "" {
				t.Errorf("read back (-want +got):\n%s", diff)
			}
		})
	}
}

// TestDriftIsSeen: whatever is changed by hand, an apply puts it right.
func TestDriftIsSeen(t *testing.T) {
	cg := nstest.NewCgroup(t)
	for name, script := range map[string]string{
		"a rule gone":         "nft flush chain inet weir out",
		"bypass gone":         `nft delete rule inet weir out handle $(nft -a list chain inet weir out | sed -n 's/.*cgroupv2.*handle //p')`,
		"a rule more":         "nft add rule inet weir in accept",
		"a rule in front":     "nft insert rule inet weir in tcp dport 22 return",
		"a chain more":        "nft add chain inet weir extra",
		"a chain gone":        "nft flush chain inet weir guard; nft delete chain inet weir guard",
		"another port":        `nft replace rule inet weir out handle $(nft -a list chain inet weir out | sed -n 's/.*redirect.*handle //p') tcp flags '& (fin|syn|rst|ack) == syn' counter name out_turned redirect to :15002`,
		"a counter less":      `nft replace rule inet weir out handle $(nft -a list chain inet weir out | sed -n 's/.*redirect.*handle //p') tcp flags '& (fin|syn|rst|ack) == syn' redirect to :15001`,
		"dropped":             "nft insert rule inet weir guard drop",
		"everything gone":     "nft flush ruleset",
		"another flags match": `nft replace rule inet weir out handle $(nft -a list chain inet weir out | sed -n 's/.*redirect.*handle //p') tcp flags '& (fin|syn|rst) == syn' counter name out_turned redirect to :15001`,
		"policy stays, no lo": `nft delete rule inet weir out handle $(nft -a list chain inet weir out | sed -n 's/.*oif.*handle //p')`,
		"policy is drop":      `nft chain inet weir guard '{ policy drop; }'`,
		"table is dormant":    `nft add table inet weir '{ flags dormant; }'`,
	} {
		t.Run(name, func(t *testing.T) {
			ns := nstest.New(t)
			b, rules := Backend{NS: ns.FD()}, capture.Rules(spec(cg.Bypass))
			if _, err := b.Apply(rules); err != nil {
				t.Fatal(err)
			}
			want := ns.Run(t, "nft", "list", "ruleset")
			ns.Run(t, "sh", "-ec", script)
			if st, err := b.Read(); err != nil {
				t.Errorf("read: %v", err)
			} else {
				t.Logf("%s", st.Text)
			}
			if changed, err := b.Apply(rules); err != nil || !changed {
				t.Errorf("changed %v, error %v", changed, err)
			}
			if diff := cmp.Diff(want, ns.Run(t, "nft", "list", "ruleset")); diff != "" {
				t.Errorf("after the repair (-want +got):\n%s", diff)
			}
		})
	}
}

// TestDriftOfExclusionsIsSeen: each of the expressions that only some Specs need is
// read back for what it is.
func TestDriftOfExclusionsIsSeen(t *testing.T) {
	cg := nstest.NewCgroup(t)
	s := spec(cg.Bypass)
	s.ExcludeOutboundUIDs, s.ExcludeOutboundGIDs = ids(t, "1000-1999"), ids(t, "7,9")
	s.ExcludeInterfaces, s.RefuseQUIC = []string{"net1"}, true
	replace := func(chain, words, by string) string {
		return fmt.Sprintf(`nft replace rule inet weir %s handle $(nft -a list chain inet weir %[1]s | sed -n 's/.*%s.*handle //p' | head -1) %s`, chain, words, by)
	}
	for name, script := range map[string]string{
		"other users":           replace("out", "skuid", "meta skuid '{ 1000-2000 }' return"),
		"one user, compared":    replace("out", "skuid", "meta skuid 1000 return"),
		"users not in order":    replace("out", "skuid", "meta skuid '{ 1000, 1999 }' return"),
		"all other users":       replace("out", "skuid", "meta skuid != '{ 1000-1999 }' return"),
		"users by their range":  replace("out", "skuid", "meta skuid 1000-1999 return"),
		"group for user":        replace("out", "skuid", "meta skgid '{ 1000-1999 }' return"),
		"one group less":        replace("out", "skgid", "meta skgid '{ 7 }' return"),
		"another interface":     replace("out", "oifname", "oifname net2 return"),
		"interfaces' beginning": replace("out", "oifname", "oifname 'net1*' return"),
		"all other interfaces":  replace("in", "iifname", "iifname != net1 return"),
		"in for out":            replace("out", "oifname", "meta oifkind net1 return"),
		"TCP for UDP":           replace("guard_out", "dport", "tcp dport 443 counter name quic_refused reject with icmpx port-unreachable"),
		"source for dest":       replace("guard_out", "dport", "udp sport 443 counter name quic_refused reject with icmpx port-unreachable"),
		"all of UDP":            replace("guard_out", "dport", "meta l4proto udp counter name quic_refused reject with icmpx port-unreachable"),
		"another error":         replace("guard_out", "dport", "udp dport '{ 443 }' counter name quic_refused reject with icmpx admin-prohibited"),
		"IPv4's error":          replace("guard_out", "dport", "udp dport '{ 443 }' counter name quic_refused reject with icmp port-unreachable"),
		"no outgoing guard":     "nft flush chain inet weir guard_out; nft delete chain inet weir guard_out",
	} {
		t.Run(name, func(t *testing.T) {
			ns := nstest.New(t)
			b, rules := Backend{NS: ns.FD()}, capture.Rules(s)
			if _, err := b.Apply(rules); err != nil {
				t.Fatal(err)
			}
			want := ns.Run(t, "nft", "list", "ruleset")
			ns.Run(t, "sh", "-ec", script)
			if changed, err := b.Apply(rules); err != nil || !changed {
				t.Errorf("changed %v, error %v, after\n%s", changed, err, ns.Run(t, "nft", "list", "ruleset"))
			}
			if diff := cmp.Diff(want, ns.Run(t, "nft", "list", "ruleset")); diff != "" {
				t.Errorf("after the repair (-want +got):\n%s", diff)
			}
		})
	}
}

func TestBypassMadeAnewIsDrift(t *testing.T) {
	one, two := nstest.NewCgroup(t), nstest.NewCgroup(t)
	b := Backend{NS: nstest.New(t).FD()}
	if _, err := b.Apply(capture.Rules(spec(one.Bypass))); err != nil {
		t.Fatal(err)
	}
	again := one.Bypass
	again.ID = two.Bypass.ID
	if changed, err := b.Apply(capture.Rules(spec(again))); err != nil || !changed {
		t.Errorf("the same path with another inode: changed %v, error %v", changed, err)
	}
}

// TestFailedApplyLeavesWhatWas: the kernel takes no level above 255.
func TestFailedApplyLeavesWhatWas(t *testing.T) {
	cg := nstest.NewCgroup(t)
	ns := nstest.New(t)
	b := Backend{NS: ns.FD()}
	bad := cg.Bypass
	bad.Level = 300

	if _, err := b.Apply(capture.Rules(spec(bad))); err == nil {
		t.Fatal("level 300 was accepted")
	}
	if out := ns.Run(t, "nft", "list", "ruleset"); out != "" {
		t.Errorf("left behind in an empty namespace:\n%s", out)
	}

	if _, err := b.Apply(capture.Rules(spec(cg.Bypass))); err != nil {
		t.Fatal(err)
	}
	want := ns.Run(t, "nft", "list", "ruleset")
	if _, err := b.Apply(capture.Rules(spec(bad))); err == nil {
		t.Fatal("level 300 was accepted")
	}
	if diff := cmp.Diff(want, ns.Run(t, "nft", "list", "ruleset")); diff != "" {
		t.Errorf("(-before +after):\n%s", diff)
	}
}

func TestForeignTablesSurvive(t *testing.T) {
	cg := nstest.NewCgroup(t)
	ns := nstest.New(t)
	b := Backend{NS: ns.FD()}
	ns.Run(t, "sh", "-ec", `nft add table inet theirs; nft add chain inet theirs in '{ type nat hook prerouting priority -100; }'
		nft add rule inet theirs in tcp dport 81 redirect to :8081; nft add table ip weir; nft add chain ip weir in`)
	want := ns.Run(t, "nft", "list", "ruleset")
	for range 2 {
		if _, err := b.Apply(capture.Rules(spec(cg.Bypass))); err != nil {
			t.Fatal(err)
		}
	}
	if got := ns.Run(t, "nft", "list", "ruleset"); !strings.Contains(got, "table inet weir") {
		t.Errorf("no rules:\n%s", got)
	}
	if err := b.Delete(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, ns.Run(t, "nft", "list", "ruleset")); diff != "" {
		t.Errorf("(-before +after):\n%s", diff)
	}
}

func TestDeleteAndReadWithoutRules(t *testing.T) {
	b := Backend{NS: nstest.New(t).FD()}
	if err := b.Delete(); err != nil {
		t.Error(err)
	}
	st, err := b.Read()
	if err != nil || st.Text != "" {
		t.Errorf("%q, %v", st.Text, err)
	}
}

func TestCallingThreadsNamespace(t *testing.T) {
	cg := nstest.NewCgroup(t)
	ns := nstest.New(t)
	var err error
	ns.Do(func() { _, err = Backend{}.Apply(capture.Rules(spec(cg.Bypass))) })
	if err != nil {
		t.Fatal(err)
	}
	if out := ns.Run(t, "nft", "list", "ruleset"); !strings.Contains(out, "table inet weir") {
		t.Errorf("not there:\n%s", out)
	}
}

func TestIsUnsupported(t *testing.T) {
	for err, want := range map[error]bool{
		unix.EOPNOTSUPP: true, unix.EPROTONOSUPPORT: true, unix.EAFNOSUPPORT: true, unix.ENOENT: true,
		unix.EPERM: false, unix.EEXIST: false, unix.EINVAL: false, unix.ENOBUFS: false,
	} {
		if got := IsUnsupported(&netlink.OpError{Op: "receive", Err: err}); got != want {
			t.Errorf("%v: %v", err, got)
		}
	}
}

// BenchmarkApply is a first apply in a fresh namespace.
func BenchmarkApply(b *testing.B) {
	cg := nstest.NewCgroup(b)
	rules := capture.Rules(spec(cg.Bypass))
	for b.Loop() {
		b.StopTimer()
		fd := nstest.New(b).FD()
		b.StartTimer()
		if _, err := (Backend{NS: fd}).Apply(rules); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkApplyEqual is an apply of what is there.
func BenchmarkApplyEqual(b *testing.B) {
	cg := nstest.NewCgroup(b)
	rules := capture.Rules(spec(cg.Bypass))
	be := Backend{NS: nstest.New(b).FD()}
	if _, err := be.Apply(rules); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if changed, err := be.Apply(rules); err != nil || changed {
			b.Fatal(changed, err)
		}
	}
}
