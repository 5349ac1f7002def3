package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/attachpb"
	"github.com/weirmesh/weir/plugin/capture/nstest"
	"google.golang.org/protobuf/testing/protocmp"
)

// passedOn checks that the result is prevResult, in the configuration's version.
func passedOn(t *testing.T, o outcome, version string) {
	t.Helper()
	o.succeeded(t)
	var got map[string]any
	if err := json.Unmarshal([]byte(o.stdout), &got); err != nil {
		t.Fatalf("%v: %q", err, o.stdout)
	}
	raw, err := json.Marshal(prevResult(version))
	if err != nil {
		t.Fatal(err)
	}
	var want map[string]any
	if err := json.Unmarshal(raw, &want); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("result (-prevResult +printed):\n%s", diff)
	}
}

func TestAddPassesTheResultOn(t *testing.T) {
	for _, version := range []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		t.Run("exempt "+version, func(t *testing.T) {
			// No agent, no namespace: neither is asked for.
			a := &agent{socket: filepath.Join(t.TempDir(), "none.sock")}
			for _, namespace := range []string{"kube-system", "weir-system"} {
				passedOn(t, invocation{command: "ADD", version: version, args: "K8S_POD_NAMESPACE=" + namespace + ";K8S_POD_NAME=x"}.run(t, a), version)
			}
		})
		t.Run("not captured "+version, func(t *testing.T) {
			a, pod := newAgent(t), newPod(t)
			a.add = skipReply
			passedOn(t, invocation{command: "ADD", version: version, netns: pod.Path()}.run(t, a), version)
			if out := ruleset(t, pod); out != "" {
				t.Errorf("rules:\n%s", out)
			}
		})
		t.Run("captured "+version, func(t *testing.T) {
			a, pod := newAgent(t), newPod(t)
			a.captureWith(newSpec(t), committed)
			passedOn(t, invocation{command: "ADD", version: version, netns: pod.Path()}.run(t, a), version)
			if out := ruleset(t, pod); !strings.Contains(out, "redirect to :15006") {
				t.Errorf("rules:\n%s", out)
			}
		})
	}
}

// TestAddCaptured looks at everything that one ADD does.
func TestAddCaptured(t *testing.T) {
	a, pod := newAgent(t), newPod(t)
	spec := newSpec(t)
	spec.ExcludeInboundPorts = []*attachpb.PortRange{{First: 22, Last: 22}}
	a.captureWith(spec, committed)
	if out := pod.Run(t, "ip", "link", "show", "lo"); strings.Contains(out, "UP") {
		t.Fatalf("lo is up already: %s", out)
	}
	// What a runtime adds to a configuration is no business of ours.
	o := invocation{command: "ADD", netns: pod.Path(), conf: map[string]any{
		"runtimeConfig": map[string]any{"io.kubernetes.cri.pod-annotations": map[string]any{"a": "b"}},
		"cni.dev/x":     1, "args": map[string]any{"cni": map[string]any{}}, "capabilities": map[string]any{},
	}}.run(t, a)
	passedOn(t, o, "1.1.0")

	want := &attachpb.Begin{
		ContainerId: "c-1", Ifname: "eth0", Netns: pod.Path(), PodNamespace: "shop", PodName: "front-0", PodUid: "u-1",
		Addresses: []string{"10.88.0.2", "fd00:88::2"}, CanKeepClient: true,
	}
	if diff := cmp.Diff(want, a.begin, protocmp.Transform()); diff != "" {
		t.Errorf("Begin (-want +got):\n%s", diff)
	}
	if a.applied.GetBackend() != "nftables" || a.applied.GetTookMicros() <= 0 || !strings.Contains(a.applied.GetRules(), "tcp dport { 22 } return") {
		t.Errorf("Applied: %v", a.applied)
	}
	if out := pod.Run(t, "ip", "link", "show", "lo"); !strings.Contains(out, "UP") {
		t.Errorf("lo is down: %s", out)
	}
	for _, state := range []string{"close_wait", "fin_wait"} {
		if got := strings.TrimSpace(pod.Run(t, "cat", "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_"+state)); got != "3600" {
			t.Errorf("timeout of %s is %s s", state, got)
		}
	}
	if out := ruleset(t, pod); !strings.Contains(out, "tcp dport { 22 } return") || !strings.Contains(out, "socket cgroupv2") {
		t.Errorf("rules:\n%s", out)
	}
	if o.stderr != "" {
		t.Errorf("standard error: %s", o.stderr)
	}
}

func TestAddRefused(t *testing.T) {
	for _, code := range attachpb.Codes() {
		t.Run(code.ID, func(t *testing.T) {
			a, pod := newAgent(t), newPod(t)
			f := code.Fail("something\nparticular")
			a.add = func(s addStream) error { return refuse(s, code.ID, f.Error()) }
			invocation{command: "ADD", netns: pod.Path()}.run(t, a).failed(t, code.CNI, code, "something particular")
			a.add = func(s addStream) error { return refuse(s, code.ID, "") }
			invocation{command: "ADD", netns: pod.Path()}.run(t, a).failed(t, code.CNI, code, code.Cause)
		})
	}
	t.Run("by a newer agent", func(t *testing.T) {
		a, pod := newAgent(t), newPod(t)
		newer := attachpb.Code{ID: "WEIR-C099"}
		a.add = func(s addStream) error { return refuse(s, newer.ID, "weir: new; words. here [WEIR-C099]") }
		invocation{command: "ADD", netns: pod.Path()}.run(t, a).failed(t, 11, newer, "new; words")
	})
}

// TestAddBadInput: no agent is needed for any of these.
func TestAddBadInput(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		in    invocation
		cni   uint
		code  attachpb.Code
		words string
	}{
		"malformed JSON":       {invocation{stdin: `{"cniVersion": "1.1.0",`}, 6, attachpb.BadInput, "unexpected end of JSON"},
		"not an object":        {invocation{stdin: `[]`}, 6, attachpb.BadInput, "cannot unmarshal array"},
		"nothing":              {invocation{stdin: " "}, 6, attachpb.BadInput, ""},
		"no name":              {invocation{conf: map[string]any{"name": nil}}, 7, attachpb.BadConfig, "missing network name"},
		"unknown key":          {invocation{conf: map[string]any{"sokcet": "/x"}}, 7, attachpb.BadConfig, `unknown key "sokcet"`},
		"key in other case":    {invocation{conf: map[string]any{"Socket": "/x"}}, 7, attachpb.BadConfig, `unknown key "Socket"`},
		"bad value":            {invocation{conf: map[string]any{"timeout": "soon"}}, 7, attachpb.BadConfig, `"soon"`},
		"no prevResult":        {invocation{conf: map[string]any{"prevResult": nil}}, 7, attachpb.NoPrevResult, "prevResult"},
		"prevResult nonsense":  {invocation{conf: map[string]any{"prevResult": map[string]any{"ips": "none"}}}, 6, attachpb.BadInput, "prevResult"},
		"IP without address":   {invocation{conf: map[string]any{"prevResult": map[string]any{"cniVersion": "1.1.0", "ips": []any{map[string]any{}}}}}, 6, attachpb.BadInput, "prevResult"},
		"unknown version":      {invocation{conf: map[string]any{"cniVersion": "9.9.9"}}, 1, attachpb.BadConfig, "9.9.9"},
		"old version":          {invocation{conf: map[string]any{"cniVersion": "0.2.0"}}, 1, attachpb.BadConfig, "0.2.0"},
		"no container ID":      {invocation{env: map[string]string{"CNI_CONTAINERID": ""}}, 4, attachpb.BadArgs, "CNI_CONTAINERID"},
		"bad container ID":     {invocation{env: map[string]string{"CNI_CONTAINERID": "../x"}}, 4, attachpb.BadArgs, "../x"},
		"no interface name":    {invocation{env: map[string]string{"CNI_IFNAME": ""}}, 4, attachpb.BadArgs, "CNI_IFNAME"},
		"no namespace path":    {invocation{env: map[string]string{"CNI_NETNS": ""}}, 4, attachpb.BadArgs, "CNI_NETNS"},
		"no CNI_ARGS":          {invocation{env: map[string]string{"CNI_ARGS": ""}}, 4, attachpb.BadArgs, "K8S_POD_NAMESPACE"},
		"no pod namespace":     {invocation{args: "K8S_POD_NAME=x"}, 4, attachpb.BadArgs, "K8S_POD_NAMESPACE"},
		"empty pod namespace":  {invocation{args: "K8S_POD_NAMESPACE=;K8S_POD_NAME=x"}, 4, attachpb.BadArgs, "K8S_POD_NAMESPACE"},
		"no pod name":          {invocation{args: "K8S_POD_NAMESPACE=shop"}, 4, attachpb.BadArgs, "K8S_POD_NAME"},
		"args without sense":   {invocation{args: "K8S_POD_NAMESPACE"}, 4, attachpb.BadArgs, "K8S_POD_NAMESPACE"},
		"unknown command":      {invocation{command: "FROB"}, 4, attachpb.BadArgs, "FROB"},
		"namespace gone":       {invocation{}, 3, attachpb.WrongNamespace, "gone"},
		"not a namespace":      {invocation{netns: file}, 3, attachpb.WrongNamespace, "not a network namespace"},
		"another kind":         {invocation{netns: "/proc/self/ns/mnt"}, 3, attachpb.WrongNamespace, "not a network namespace"},
		"the node's namespace": {invocation{netns: "/proc/self/ns/net"}, 3, attachpb.WrongNamespace, "node's own"},
	} {
		t.Run(name, func(t *testing.T) {
			if strings.Contains(name, "namespace") && os.Geteuid() != 0 {
				t.Skip("the plugin looks at namespaces as root only")
			}
			if c.in.command == "" {
				c.in.command = "ADD"
			}
			a := &agent{socket: filepath.Join(t.TempDir(), "none.sock")}
			c.in.run(t, a).failed(t, c.cni, c.code, c.words)
		})
	}
}

// TestAddAgentAway: 11, within the timeout, and no rules.
func TestAddAgentAway(t *testing.T) {
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	hang := func(s addStream) error {
		<-s.Context().Done()
		return s.Context().Err()
	}
	spec := newSpec(t)
	for name, c := range map[string]struct {
		prepare func(t *testing.T, a *agent)
		words   string
		least   time.Duration // it takes that long at least
	}{
		"no socket": {func(t *testing.T, a *agent) { a.socket = filepath.Join(t.TempDir(), "none.sock") }, "no such file", 0},
		"no folder": {func(t *testing.T, a *agent) { a.socket = filepath.Join(t.TempDir(), "run", "weir", "attach.sock") }, "no such file", 0},
		"nobody listens": {func(t *testing.T, a *agent) {
			a.socket = filepath.Join(t.TempDir(), "stale.sock")
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: a.socket})
			if err != nil {
				t.Fatal(err)
			}
			l.SetUnlinkOnClose(false)
			l.Close()
		}, "refused", 0},
		"accepts and says nothing": {func(t *testing.T, a *agent) {
			a.socket = filepath.Join(t.TempDir(), "mute.sock")
			l, err := net.Listen("unix", a.socket)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
		}, "for 700ms", 650 * time.Millisecond},
		"hangs up at once": {func(t *testing.T, a *agent) {
			a.socket = filepath.Join(t.TempDir(), "rude.sock")
			l, err := net.Listen("unix", a.socket)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					c.Close()
				}
			}()
		}, "", 0},
		"silent":                 {func(_ *testing.T, a *agent) { a.add = hang }, "silent for 700ms", 650 * time.Millisecond},
		"ends the stream":        {func(_ *testing.T, a *agent) { a.add = func(addStream) error { return nil } }, "ended the call", 0},
		"breaks off":             {func(_ *testing.T, a *agent) { a.add = func(addStream) error { return errors.New("boom") } }, "boom", 0},
		"silent after Applied":   {func(_ *testing.T, a *agent) { a.captureWith(spec, hang) }, "silent for 700ms", 650 * time.Millisecond},
		"ends after Applied":     {func(_ *testing.T, a *agent) { a.captureWith(spec, func(addStream) error { return nil }) }, "ended the call", 0},
		"nonsense after Applied": {func(_ *testing.T, a *agent) { a.captureWith(spec, skipReply) }, "Skip", 0},
		"nonsense first":         {func(_ *testing.T, a *agent) { a.add = committed }, "Committed", 0},
	} {
		t.Run(name, func(t *testing.T) {
			a, pod := newAgent(t), newPod(t)
			c.prepare(t, a)
			o := invocation{command: "ADD", netns: pod.Path(), conf: map[string]any{"timeout": "700ms"}}.run(t, a)
			o.failed(t, 11, attachpb.AgentAway, "agent on "+host, c.words)
			if o.took > 1500*time.Millisecond || o.took < c.least {
				t.Errorf("took %s", o.took)
			}
			if out := ruleset(t, pod); out != "" {
				t.Errorf("rules left behind:\n%s", out)
			}
		})
	}
}

// TestAddRollsBack: what fails after the rules are in takes them out again.
func TestAddRollsBack(t *testing.T) {
	t.Run("refused after Applied", func(t *testing.T) {
		a, pod := newAgent(t), newPod(t)
		a.captureWith(newSpec(t), func(s addStream) error {
			if out := ruleset(t, pod); !strings.Contains(out, "table inet weir") {
				t.Errorf("no rules at Applied")
			}
			return refuse(s, attachpb.ProxyFailed.ID, attachpb.ProxyFailed.Fail("it died").Error())
		})
		invocation{command: "ADD", netns: pod.Path()}.run(t, a).failed(t, 11, attachpb.ProxyFailed, "it died")
		if out := ruleset(t, pod); out != "" {
			t.Errorf("rules left behind:\n%s", out)
		}
	})
	t.Run("the kernel refuses", func(t *testing.T) {
		a, pod := newAgent(t), newPod(t)
		spec := newSpec(t)
		spec.BypassLevel = 300
		a.captureWith(spec, committed)
		invocation{command: "ADD", netns: pod.Path()}.run(t, a).failed(t, 5, attachpb.RulesFailed, "load rules")
		if a.applied != nil {
			t.Error("Applied was sent")
		}
		if out := ruleset(t, pod); out != "" {
			t.Errorf("rules left behind:\n%s", out)
		}
	})
	t.Run("iptables cannot do it", func(t *testing.T) {
		a, pod := newAgent(t), newPod(t)
		spec := newSpec(t)
		spec.ExcludeInterfaces = []string{"odd+"}
		a.captureWith(spec, committed)
		o := invocation{command: "ADD", netns: pod.Path(), conf: map[string]any{
			"backend": "iptables", "lockDir": filepath.Join(t.TempDir(), "lock"), "timeout": "10s"}}.run(t, a)
		if strings.Contains(o.stdout, "not found") {
			t.Skip("no iptables here")
		}
		o.failed(t, 100, attachpb.Unsupported, "exclude-interfaces", "odd+")
		if a.applied != nil {
			t.Error("Applied was sent")
		}
	})
	t.Run("a spec without a bypass", func(t *testing.T) {
		a, pod := newAgent(t), newPod(t)
		spec := newSpec(t)
		spec.BypassId = 0
		a.captureWith(spec, committed)
		invocation{command: "ADD", netns: pod.Path()}.run(t, a).failed(t, 5, attachpb.RulesFailed, "bypass")
		if out := ruleset(t, pod); out != "" {
			t.Errorf("rules left behind:\n%s", out)
		}
	})
	t.Run("IPv6 but not on lo", func(t *testing.T) {
		a, pod := newAgent(t), newPod(t)
		a.captureWith(newSpec(t), committed)
		pod.Run(t, "sysctl", "-qw", "net.ipv6.conf.lo.disable_ipv6=1")
		invocation{command: "ADD", netns: pod.Path()}.run(t, a).failed(t, 100, attachpb.Unsupported, "fd00:88::2")
		if out := ruleset(t, pod); out != "" {
			t.Errorf("rules left behind:\n%s", out)
		}
	})
}

// TestAddStreamEndsWithFailure: the agent sees the stream end when the plugin
// fails, and takes the proxy down.
func TestAddStreamEndsWithFailure(t *testing.T) {
	a, pod := newAgent(t), newPod(t)
	ended := make(chan error, 1)
	spec := newSpec(t)
	spec.BypassLevel = 300
	a.add = func(s addStream) error {
		if err := s.Send(&attachpb.AddReply{Step: &attachpb.AddReply_Spec{Spec: spec}}); err != nil {
			return err
		}
		_, err := s.Recv()
		ended <- err
		return err
	}
	invocation{command: "ADD", netns: pod.Path()}.run(t, a).failed(t, 5, attachpb.RulesFailed)
	select {
	case err := <-ended:
		if err == nil {
			t.Error("the agent was told that the rules are in")
		}
	case <-time.After(5 * time.Second):
		t.Error("the stream did not end")
	}
}

func TestAddBackends(t *testing.T) {
	for backend, want := range map[string]string{"auto": "nftables", "nftables": "nftables", "iptables": "iptables"} {
		t.Run(backend, func(t *testing.T) {
			a, pod := newAgent(t), newPod(t)
			a.captureWith(newSpec(t), committed)
			locks := filepath.Join(t.TempDir(), "lock")
			o := invocation{command: "ADD", netns: pod.Path(), conf: map[string]any{"backend": backend, "lockDir": locks, "timeout": "10s"}}.run(t, a)
			if backend == "iptables" && o.exit != 0 && strings.Contains(o.stdout, "not found") {
				t.Skip("no iptables here")
			}
			passedOn(t, o, "1.1.0")
			if got := a.applied.GetBackend(); got != want {
				t.Errorf("applied by %s", got)
			}
			t.Logf("applied in %d µs", a.applied.GetTookMicros())
			if left, err := filepath.Glob(locks + "/*"); err != nil || left != nil {
				t.Errorf("lock files left: %v, %v", left, err)
			}
			if weir := strings.Contains(ruleset(t, pod), "table inet weir"); weir != (want == "nftables") {
				t.Errorf("nftables table: %v", weir)
			}
		})
	}
}

// TestAddTwice: a runtime may repeat ADD.
func TestAddTwice(t *testing.T) {
	a, pod := newAgent(t), newPod(t)
	a.captureWith(newSpec(t), committed)
	passedOn(t, invocation{command: "ADD", netns: pod.Path()}.run(t, a), "1.1.0")
	before := ruleset(t, pod)
	passedOn(t, invocation{command: "ADD", netns: pod.Path()}.run(t, a), "1.1.0")
	if diff := cmp.Diff(before, ruleset(t, pod)); diff != "" {
		t.Errorf("(-once +twice):\n%s", diff)
	}
}

// TestAddWithoutRoot: exempt pods start, others say what is wrong.
func TestAddWithoutRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to become somebody else")
	}
	a := newAgent(t)
	invocation{command: "ADD", uid: 65534}.run(t, a).failed(t, 100, attachpb.Unsupported, "uid 65534")
	passedOn(t, invocation{command: "ADD", uid: 65534, args: "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=x"}.run(t, a), "1.1.0")
}

// TestAddsTogether: many pods of a node start at once.
func TestAddsTogether(t *testing.T) {
	a := newAgent(t)
	a.captureWith(newSpec(t), committed)
	const n = 8
	pods := make([]*nstest.NS, n)
	for i := range pods {
		pods[i] = newPod(t)
	}
	results := make(chan outcome, n)
	for i := range pods {
		go func() {
			results <- invocation{command: "ADD", netns: pods[i].Path(), env: map[string]string{"CNI_CONTAINERID": fmt.Sprintf("c-%d", i)}}.run(t, a)
		}()
	}
	for range pods {
		if o := <-results; o.exit != 0 {
			t.Errorf("%+v", o)
		}
	}
	for _, p := range pods {
		if !strings.Contains(ruleset(t, p), "table inet weir") {
			t.Error("a pod without rules")
		}
	}
}
