package main

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/attachpb"
	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/plugin/capture/nft"
	"github.com/weirmesh/weir/plugin/capture/nstest"
)

// clientState is all that keeping the caller's address changes beside the rules.
func clientState(t testing.TB, ns *nstest.NS) string {
	t.Helper()
	return ns.Run(t, "sh", "-ec", `sysctl net.ipv4.tcp_fwmark_accept net.ipv4.fwmark_reflect net.ipv6.fwmark_reflect
		ip -4 rule; ip -6 rule; { ip -4 route show table all; ip -6 route show table all; } | grep "table 711" || true`)
}

const preparedState = `net.ipv4.tcp_fwmark_accept = 1
net.ipv4.fwmark_reflect = 1
net.ipv6.fwmark_reflect = 1
0:	from all lookup local
100:	from all fwmark 0x711 lookup 711
32766:	from all lookup main
32767:	from all lookup default
0:	from all lookup local
100:	from all fwmark 0x711 lookup 711
32766:	from all lookup main
`

// applyTo applies rules as the plugin does.
func applyTo(t testing.TB, ns *nstest.NS, backends []backend, keep bool) (*target, error) {
	t.Helper()
	f, err := os.Open(ns.Path())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	spec, err := newSpec(t).ToSpec()
	if err != nil {
		t.Fatal(err)
	}
	spec.KeepClient = keep
	target := &target{ns: f, backends: backends}
	_, err = target.apply(capture.Rules(spec))
	return target, err
}

func TestClientIsPreparedOnce(t *testing.T) {
	ns := newPod(t)
	ns.Run(t, "ip", "link", "set", "lo", "up")
	before := clientState(t, ns)
	first, err := applyTo(t, ns, []backend{nft.Backend{}}, true)
	if err != nil {
		t.Fatal(err)
	}
	prepared := clientState(t, ns)
	if !strings.HasPrefix(prepared, preparedState) {
		t.Errorf("prepared:\n%s", cmp.Diff(preparedState, prepared))
	}
	for _, route := range []string{"local default dev lo table 711 scope host", "local default dev lo table 711 metric"} {
		if !strings.Contains(prepared, route) {
			t.Errorf("no route %q in\n%s", route, prepared)
		}
	}
	second, err := applyTo(t, ns, []backend{nft.Backend{}}, true)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(prepared, clientState(t, ns)); diff != "" {
		t.Errorf("a second apply changes it:\n%s", diff)
	}
	// What the second found there it leaves there.
	if err := second.undo(); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(prepared, clientState(t, ns)); diff != "" {
		t.Errorf("the second apply undoes what the first did:\n%s", diff)
	}
	if err := first.undo(); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(before, clientState(t, ns)); diff != "" {
		t.Errorf("not undone:\n%s", diff)
	}
	if rules := ruleset(t, ns); rules != "" {
		t.Errorf("rules are left:\n%s", rules)
	}
}

func TestClientIsUndoneWhereRulesFail(t *testing.T) {
	ns := newPod(t)
	ns.Run(t, "ip", "link", "set", "lo", "up")
	before := clientState(t, ns)
	var calls []string
	if _, err := applyTo(t, ns, []backend{fakeBackend{"a", errors.New("broken"), &calls}}, true); err == nil {
		t.Error("no error")
	}
	if diff := cmp.Diff(before, clientState(t, ns)); diff != "" {
		t.Errorf("not undone:\n%s", diff)
	}
}

// TestClientIsUndoneHalfway: a step that fails takes back those before it.
func TestClientIsUndoneHalfway(t *testing.T) {
	ns := newPod(t)
	// Without lo no route can lead to it.
	before := clientState(t, ns)
	err := errors.New("not run")
	ns.Do(func() {
		var done clientChanges
		if done, err = prepareClient(); err != nil {
			err = errors.Join(err, done.revert())
		}
	})
	if err == nil || !strings.Contains(err.Error(), "keepClientAddress: false") {
		t.Errorf("%v", err)
	}
	if diff := cmp.Diff(before, clientState(t, ns)); diff != "" {
		t.Errorf("not undone:\n%s", diff)
	}
}

func TestWithoutKeepingNothingIsPrepared(t *testing.T) {
	ns := newPod(t)
	ns.Run(t, "ip", "link", "set", "lo", "up")
	before := clientState(t, ns)
	if _, err := applyTo(t, ns, []backend{nft.Backend{}}, false); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, clientState(t, ns)); diff != "" {
		t.Error(diff)
	}
	if rules := ruleset(t, ns); strings.Contains(rules, "mark") || strings.Contains(rules, "zone") {
		t.Error(rules)
	}
}

// TestIPTablesCannotKeepTheClient: it refuses, and nothing is left.
func TestIPTablesCannotKeepTheClient(t *testing.T) {
	ns := newPod(t)
	ns.Run(t, "ip", "link", "set", "lo", "up")
	before := clientState(t, ns)
	_, err := applyTo(t, ns, []backend{newIPTables(t.TempDir(), "c")}, true)
	if err == nil || !strings.Contains(err.Error(), "keepClientAddress: false") {
		t.Errorf("%v", err)
	}
	if diff := cmp.Diff(before, clientState(t, ns)); diff != "" {
		t.Errorf("not undone:\n%s", diff)
	}
}

// TestBeginSaysWhetherTheClientCanBeKept: the agent is to ask for it only then.
func TestBeginSaysWhetherTheClientCanBeKept(t *testing.T) {
	for backend, want := range map[string]bool{"auto": true, "nftables": true, "iptables": false} {
		a := newAgent(t)
		a.add = skipReply
		ns := newPod(t)
		invocation{command: "ADD", netns: ns.Path(), conf: map[string]any{"backend": backend}}.run(t, a).succeeded(t)
		if got := a.begin.GetCanKeepClient(); got != want {
			t.Errorf("%s: %v", backend, got)
		}
	}
}

func TestShowAndCheckTellOfTheClient(t *testing.T) {
	a := newAgent(t)
	spec := newSpec(t)
	spec.KeepClient = true
	a.captureWith(spec, committed)
	a.checked = &attachpb.CheckReply{Spec: spec}
	ns := newPod(t)
	invocation{command: "ADD", netns: ns.Path()}.run(t, a).succeeded(t)
	shows := func(want string, args ...string) {
		t.Helper()
		var out, errs strings.Builder
		if err := show(append([]string{"--netns", ns.Path()}, args...), &out, &errs); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in %s", want, out.String())
		}
	}
	shows("\nthe application sees the caller's address\n")
	shows(`"client":{"missing":[]}`, "--json")
	invocation{command: "CHECK", netns: ns.Path()}.run(t, a).succeeded(t)

	ns.Run(t, "sh", "-ec", "ip -4 rule del pref 100; ip -6 route flush table 711; sysctl -qw net.ipv4.tcp_fwmark_accept=0")
	shows("inbound connections hang: keeping the caller's address needs net.ipv4.tcp_fwmark_accept=1, " +
		"IPv4 rule pref 100 fwmark 0x711 lookup 711, IPv6 route local default dev lo table 711\n")
	shows(`"client":{"missing":["net.ipv4.tcp_fwmark_accept=1",`, "--json")
	invocation{command: "CHECK", netns: ns.Path()}.run(t, a).failed(t, attachpb.Drifted.CNI, attachpb.Drifted, "net.ipv4.tcp_fwmark_accept=1")
}

// TestRepairOfTheClient: what is missing beside the rules is drift like theirs, a
// release keeps it, and with the rules all goes that could lead a packet astray.
func TestRepairOfTheClient(t *testing.T) {
	ns := newPod(t)
	spec, err := newSpec(t).ToSpec()
	if err != nil {
		t.Fatal(err)
	}
	spec.KeepClient = true
	does := func(what, difference string) {
		t.Helper()
		got, err := task{Netns: ns.Path(), Do: what, Spec: spec}.run(conf{Backend: backendAuto, LockDir: t.TempDir()}, "c")
		if err != nil || got.Difference != difference {
			t.Errorf("%s: %v, %v; want difference %q", what, got, err, difference)
		}
	}
	does(doApply, "lo is down")
	prepared := clientState(t, ns)
	ns.Run(t, "ip", "-6", "rule", "del", "pref", "100")
	drift := "keeping the caller's address needs IPv6 rule pref 100 fwmark 0x711 lookup 711, which is not there"
	does(doCompare, drift)
	does(doApply, drift)
	does(doCompare, "")
	if diff := cmp.Diff(prepared, clientState(t, ns)); diff != "" {
		t.Errorf("not put right:\n%s", diff)
	}
	does(doRelease, "")
	if diff := cmp.Diff(prepared, clientState(t, ns)); diff != "" {
		t.Errorf("a release changes it:\n%s", diff)
	}
	if rules := ruleset(t, ns); !strings.Contains(rules, "notrack") {
		t.Errorf("connections that the proxy has are cut by the release:\n%s", rules)
	}
	for range 2 {
		does(doDelete, "")
		if left := ns.Run(t, "sh", "-c", "ip -4 rule; ip -6 rule; ip -4 route show table all; ip -6 route show table all"); strings.Contains(left, "711") {
			t.Errorf("left:\n%s", left)
		}
	}
}
