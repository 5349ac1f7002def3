package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/attachpb"
	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/plugin/capture/nft"
	"github.com/weirmesh/weir/plugin/capture/nstest"
	"google.golang.org/protobuf/testing/protocmp"
)

// TestDel: success within a second, whatever.
func TestDel(t *testing.T) {
	for name, c := range map[string]struct {
		in      invocation
		prepare func(t *testing.T, a *agent)
		told    bool // the agent was told
	}{
		"known":         {told: true},
		"0.3.1":         {in: invocation{version: "0.3.1"}, told: true},
		"no namespace":  {in: invocation{env: map[string]string{"CNI_NETNS": ""}}, told: true},
		"no pod":        {in: invocation{env: map[string]string{"CNI_ARGS": ""}}, told: true},
		"no prevResult": {in: invocation{conf: map[string]any{"prevResult": nil}}, told: true},
		"exempt":        {in: invocation{args: "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=x"}},
		"agent fails":   {prepare: func(_ *testing.T, a *agent) { a.del = func() error { return errors.New("boom") } }, told: true},
		"agent silent":  {prepare: func(_ *testing.T, a *agent) { a.del = func() error { time.Sleep(2 * time.Second); return nil } }, told: true},
		"agent away":    {prepare: func(t *testing.T, a *agent) { a.socket = filepath.Join(t.TempDir(), "none.sock") }},
		"bad conf":      {in: invocation{conf: map[string]any{"timeout": "soon", "socket": "relative"}}},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAgent(t)
			if c.prepare != nil {
				c.prepare(t, a)
			}
			c.in.command = "DEL"
			c.in.netns = "/run/netns/weir-no-such"
			for range 2 { // it may be repeated
				o := c.in.run(t, a)
				o.succeeded(t)
				if o.stdout != "" || o.took > time.Second {
					t.Errorf("took %s, printed %q", o.took, o.stdout)
				}
			}
			var want []*attachpb.DelRequest
			if c.told {
				one := &attachpb.DelRequest{ContainerId: "c-1", Ifname: "eth0", Netns: c.in.netns}
				if _, set := c.in.env["CNI_NETNS"]; set {
					one.Netns = ""
				}
				want = []*attachpb.DelRequest{one, one}
			}
			a.mu.Lock()
			defer a.mu.Unlock()
			if diff := cmp.Diff(want, a.dels, protocmp.Transform()); diff != "" {
				t.Errorf("the agent was told (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDelLeavesRules(t *testing.T) {
	a, pod := newAgent(t), newPod(t)
	a.captureWith(newSpec(t), committed)
	invocation{command: "ADD", netns: pod.Path()}.run(t, a).succeeded(t)
	before := ruleset(t, pod)
	invocation{command: "DEL", netns: pod.Path()}.run(t, a).succeeded(t)
	if diff := cmp.Diff(before, ruleset(t, pod)); diff != "" {
		t.Error(diff)
	}
}

func TestStatus(t *testing.T) {
	a := newAgent(t)
	status := invocation{command: "STATUS", conf: map[string]any{"prevResult": nil}}
	status.run(t, a).failed(t, 50, attachpb.NotReady, "has not been ready")
	if err := os.WriteFile(filepath.Join(a.dir, "ready"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	status.run(t, a).succeeded(t)
	// Whether the agent is there now does not matter.
	if err := os.Remove(a.socket); err != nil {
		t.Fatal(err)
	}
	status.run(t, a).succeeded(t)
	status.conf["backend"] = "ebpf"
	status.run(t, a).failed(t, 7, attachpb.BadConfig, `"ebpf"`)
	invocation{command: "STATUS", version: "1.0.0"}.run(t, a).failed(t, 1, attachpb.BadConfig, "does not allow STATUS")
}

func TestGC(t *testing.T) {
	a := newAgent(t)
	in := invocation{command: "GC", conf: map[string]any{"cni.dev/valid-attachments": []any{
		map[string]any{"containerID": "c-1", "ifname": "eth0"},
	}}}
	in.run(t, a).succeeded(t)
	want := []*attachpb.GCRequest{{Valid: []*attachpb.Sandbox{{ContainerId: "c-1", Ifname: "eth0"}}}}
	if diff := cmp.Diff(want, a.gcs, protocmp.Transform()); diff != "" {
		t.Errorf("the agent was told (-want +got):\n%s", diff)
	}
	in.run(t, &agent{socket: "/nowhere/none.sock"}).succeeded(t)
}

// TestCheck: the first difference is named, whatever it is.
func TestCheck(t *testing.T) {
	for name, c := range map[string]struct {
		drift func(t *testing.T, a *agent, pod *nstest.NS)
		want  string // empty: nothing is wrong
	}{
		"as it was left": {func(*testing.T, *agent, *nstest.NS) {}, ""},
		"lo is down":     {func(t *testing.T, _ *agent, pod *nstest.NS) { pod.Run(t, "ip", "link", "set", "lo", "down") }, "lo is down"},
		"a sysctl": {func(t *testing.T, _ *agent, pod *nstest.NS) {
			pod.Run(t, "sh", "-c", "echo 60 >/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait")
		}, "nf_conntrack_tcp_timeout_close_wait is 60, not 3600"},
		"no rules": {func(t *testing.T, _ *agent, pod *nstest.NS) { pod.Run(t, "nft", "delete", "table", "inet", "weir") }, "there are no rules"},
		"a chain is empty": {func(t *testing.T, _ *agent, pod *nstest.NS) {
			pod.Run(t, "nft", "flush", "chain", "inet", "weir", "out")
		}, "chain out: rule 1 is missing"},
		"a rule too many": {func(t *testing.T, _ *agent, pod *nstest.NS) {
			pod.Run(t, "nft", "add", "rule", "inet", "weir", "guard", "tcp", "dport", "22", "accept")
		}, "chain guard: rule"},
		"a foreign chain":           {func(t *testing.T, _ *agent, pod *nstest.NS) { pod.Run(t, "nft", "add", "chain", "inet", "weir", "x") }, "chain x is not ours"},
		"a bypass cgroup made anew": {func(_ *testing.T, a *agent, _ *nstest.NS) { a.checked.Spec.BypassId++ }, "chain guard_out: rule 3"},
		"the proxy is gone":         {func(_ *testing.T, a *agent, _ *nstest.NS) { a.checked.Fault = "the proxy does not run" }, "the proxy does not run"},
		"not to be captured":        {func(_ *testing.T, a *agent, _ *nstest.NS) { a.checked = nil }, "there are capture rules"},
	} {
		t.Run(name, func(t *testing.T) {
			a, pod := newAgent(t), newPod(t)
			in := invocation{command: "CHECK", netns: pod.Path()}
			in.run(t, a).succeeded(t) // not captured
			spec := newSpec(t)
			a.captureWith(spec, committed)
			invocation{command: "ADD", netns: pod.Path()}.run(t, a).succeeded(t)
			a.mu.Lock()
			a.checked = &attachpb.CheckReply{Spec: spec}
			a.mu.Unlock()
			c.drift(t, a, pod)
			if c.want == "" {
				in.run(t, a).succeeded(t)
				return
			}
			in.run(t, a).failed(t, 101, attachpb.Drifted, c.want)
		})
	}
}

func TestCheckWithoutWhatItNeeds(t *testing.T) {
	a, pod := newAgent(t), newPod(t)
	in := invocation{command: "CHECK", netns: pod.Path()}
	gone := in
	gone.netns = ""
	gone.run(t, a).failed(t, 3, attachpb.WrongNamespace)
	a.socket = filepath.Join(t.TempDir(), "none.sock")
	in.run(t, a).failed(t, 11, attachpb.AgentAway)
	in.args = "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=x"
	in.run(t, a).succeeded(t)
	invocation{command: "CHECK", version: "0.3.1"}.run(t, a).failed(t, 1, attachpb.BadConfig, "does not allow CHECK")
}

func TestShow(t *testing.T) {
	ns, cg := nstest.New(t), nstest.NewCgroup(t)
	none := func(string) string { return "" }
	show := func(args ...string) (int, string, string) {
		var out, errs bytes.Buffer
		code := run(append([]string{"show"}, args...), none, &out, &errs)
		return code, out.String(), errs.String()
	}

	code, out, _ := show("--netns", ns.Path())
	if code != 0 || !strings.Contains(out, "not captured") {
		t.Errorf("without rules: exit %d, %q", code, out)
	}
	code, out, _ = show("--netns", ns.Path(), "--json")
	if want := `{"backend":"none","rules":"","counters":{}}` + "\n"; code != 0 || out != want {
		t.Errorf("without rules: exit %d, %q", code, out)
	}

	rules := capture.Rules(capture.Spec{OutboundPort: 15001, InboundPort: 15006, Bypass: cg.Bypass})
	if _, err := (nft.Backend{NS: ns.FD()}).Apply(rules); err != nil {
		t.Fatal(err)
	}
	code, out, errs := show("--netns", ns.Path(), "--json")
	if code != 0 {
		t.Fatalf("exit %d: %s", code, errs)
	}
	want := shown{Backend: "nftables", Rules: rules.String(), Counters: map[string]capture.Counter{}}
	for _, name := range rules.Counters {
		want.Counters[name] = capture.Counter{}
	}
	var got shown
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if !strings.Contains(out, `"out_turned":{"packets":0,"bytes":0}`) {
		t.Errorf("not in its form: %s", out)
	}
	code, out, _ = show("--netns", ns.Path())
	if code != 0 || !strings.HasPrefix(out, rules.String()) || !strings.Contains(out, "out_turned              0            0") {
		t.Errorf("exit %d, %q", code, out)
	}

	for _, args := range [][]string{{}, {"--netns", "/no/such"}, {"--netns", "/dev/null"}, {"--frob"}, {"--netns", ns.Path(), "more"}} {
		if code, out, errs := show(args...); code != 1 || out != "" || !strings.Contains(errs, "weir: show: ") {
			t.Errorf("%q: exit %d, %q, %q", args, code, out, errs)
		}
	}
}

// TestShowIPTables: the rules of the other backend are shown alike.
func TestShowIPTables(t *testing.T) {
	a, pod := newAgent(t), newPod(t)
	a.captureWith(newSpec(t), committed)
	o := invocation{command: "ADD", netns: pod.Path(), conf: map[string]any{"backend": "iptables", "lockDir": t.TempDir(), "timeout": "10s"}}.run(t, a)
	if o.exit != 0 && strings.Contains(o.stdout, "not found") {
		t.Skip("no iptables here")
	}
	o.succeeded(t)
	var out, errs bytes.Buffer
	if code := run([]string{"show", "--netns", pod.Path(), "--json"}, func(string) string { return "" }, &out, &errs); code != 0 {
		t.Fatalf("exit %d: %s", code, errs.String())
	}
	var got shown
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if _, ok := got.Counters["out_turned"]; got.Backend != "iptables" || !ok || !strings.Contains(got.Rules, "WEIR_OUT") {
		t.Errorf("%+v", got)
	}
}
