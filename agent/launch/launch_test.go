package launch_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/agent/push"
	"github.com/weirmesh/weir/agent/telemetry"
	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/plugin/capture/nstest"
	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/route"
)

// These tests start real proxies in namespaces of their own, and need root.

const podAddr = "10.9.0.2"

// buildDir holds weir-proxy and weir-cni, once a test has needed them.
var buildDir string

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == launch.DialCommand {
		if err := launch.RunDial(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	code := m.Run()
	os.RemoveAll(buildDir)
	os.Exit(code)
}

// build builds weir-proxy and weir-cni, once, and returns their folder.
var build = sync.OnceValues(func() (string, error) {
	var err error
	if buildDir, err = os.MkdirTemp("", "weir-launch-test-"); err != nil {
		return "", err
	}
	for name, source := range map[string]string{"weir-proxy": "proxy", "weir-cni": "plugin"} {
		cmd := exec.Command("go", "build", "-o", filepath.Join(buildDir, name), "github.com/weirmesh/weir/"+source)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("%w: %s", err, out)
		}
	}
	return buildDir, nil
})

// node is a node's worth of folders and cgroups, and the agent's parts on it.
type node struct {
	*testing.T
	opts    launch.Options
	manager *launch.Manager
	pusher  *push.Pusher
	kept    chan time.Time // when certificates end that proxies say they have
}

// nobody wants to know metrics, but for certificates.
type nobody struct{ kept chan<- time.Time }

func (nobody) Report(*launch.Instance, *proxypb.Metrics) {}
func (nobody) Forget(*launch.Instance)                   {}
func (nobody) Converged(string, time.Duration)           {}
func (nobody) Rejected(string)                           {}
func (n nobody) Certificate(_ *launch.Instance, end time.Time) {
	n.kept <- end
}

type nowhere struct{}

func (nowhere) Revision(netip.AddrPort) uint64 { return 1 }
func (nowhere) Known() map[string]int64        { return nil }
func (nowhere) Authorization(string, string, string, map[string]string) ([]authz.Policy, []model.Governing) {
	return nil, nil
}

func (nowhere) Peers(string, string, string, map[string]string) (route.PeerMode, map[uint16]route.PeerMode, []model.Governing) {
	return route.Permissive, nil, nil
}

func (nowhere) Probes(string, string, string) ([]route.Probe, []netip.Addr) { return nil, nil }

func (nowhere) Inbound([]netip.Addr) (map[uint16]*route.Policy, []model.Governing) {
	return nil, nil
}
func (nowhere) Destination(netip.AddrPort, string) (route.Destination, []model.Governing) {
	return route.Destination{}, nil
}

func newNode(t *testing.T) *node {
	if os.Geteuid() != 0 {
		t.Skip("starting proxies needs root")
	}
	programs, err := build()
	if err != nil {
		t.Fatal(err)
	}
	kept := make(chan time.Time, 100)
	records := telemetry.NewAccessLog(io.Discard, slog.New(slog.DiscardHandler))
	go records.Run(t.Context())
	pusher := &push.Pusher{
		View:       nowhere{},
		WaitSynced: func(context.Context) error { return nil },
		AccessLog:  records,
		Metrics:    nobody{kept},
		Log:        slog.New(slog.DiscardHandler),
	}
	n := &node{T: t, pusher: pusher, kept: kept, opts: launch.Options{
		RunDir:       t.TempDir(),
		NetnsDir:     "/run/netns",
		CgroupRoot:   "/sys/fs/cgroup",
		CgroupParent: fmt.Sprintf("weir-launch-test-%d", os.Getpid()),
		Proxy:        filepath.Join(programs, "weir-proxy"),
		Plugin:       filepath.Join(programs, "weir-cni"),
		UIDBase:      1879048192,
		MaxProcs:     2,
		Limits:       launch.Limits{Memory: 128 << 20, CPUWeight: 100},
		Log:          slog.New(slog.DiscardHandler),
		Session:      pusher.Session,
	}}
	n.open()
	t.Cleanup(func() {
		for _, a := range n.manager.List() {
			n.manager.End(a.ContainerID, "")
		}
		n.manager.Close()
		if left := n.cgroups(""); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
	return n
}

// open starts the agent's part, as after a restart of the agent.
func (n *node) open() {
	m, err := launch.Open(n.opts)
	if err != nil {
		n.Fatal(err)
	}
	n.manager = m
	if err := m.Recover(); err != nil {
		n.Fatal(err)
	}
}

// cgroups are the folders of a container, or of the parent, in every hierarchy.
func (n *node) cgroups(id string) []string {
	found, err := filepath.Glob(filepath.Join("/sys/fs/cgroup", "*", n.opts.CgroupParent, id))
	if err != nil {
		n.Fatal(err)
	}
	pure, err := filepath.Glob(filepath.Join("/sys/fs/cgroup", n.opts.CgroupParent, id))
	if err != nil {
		n.Fatal(err)
	}
	return append(found, pure...)
}

// sandbox is a pod's namespace with one address.
func (n *node) sandbox(id string) (*nstest.NS, launch.Request) {
	ns := nstest.New(n.T)
	ns.Run(n.T, "ip", "link", "set", "lo", "up")
	ns.Run(n.T, "ip", "address", "add", podAddr+"/32", "dev", "lo")
	return ns, launch.Request{
		ContainerID: id, IfName: "eth0", Netns: ns.Path(), PodNamespace: "shop", PodName: id, PodUID: "uid-" + id,
		Addresses: []netip.Addr{netip.MustParseAddr(podAddr)},
	}
}

func (n *node) start(req launch.Request) launch.Attachment {
	n.Helper()
	ctx, cancel := context.WithTimeout(n.Context(), 10*time.Second)
	defer cancel()
	a, err := n.manager.Start(ctx, req, unclaimed)
	if err != nil {
		n.Fatal(err)
	}
	return a
}

// unclaimed is for tests in which nobody waits for the Spec.
func unclaimed(launch.Attachment) error { return nil }

// pid is the one process of a container's cgroup.
func (n *node) pid(id string) int {
	n.Helper()
	dirs := n.cgroups(id)
	if len(dirs) == 0 {
		n.Fatalf("no cgroup of %s", id)
	}
	var first string
	for _, dir := range dirs {
		b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil {
			n.Fatal(err)
		}
		text := strings.TrimSpace(string(b))
		if first == "" {
			first = text
		}
		if text != first {
			n.Fatalf("%s holds %q, others %q", dir, text, first)
		}
	}
	pid, err := strconv.Atoi(first)
	if err != nil {
		n.Fatalf("processes of %s: %q", id, first)
	}
	return pid
}

func (n *node) gone(pid int) {
	n.Helper()
	for range 100 {
		// The parent of an adopted one is, here, this process, which does not reap it.
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || bytes.Contains(b, []byte(") Z ")) {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	n.Fatalf("process %d lives", pid)
}

// nothingLeft says that no trace of a container is on the node.
func (n *node) nothingLeft(id string) {
	n.Helper()
	if dirs := n.cgroups(id); len(dirs) > 0 {
		n.Errorf("left: %v", dirs)
	}
	for _, pattern := range []string{"attachments/*" + id + "*", "p/*" + id + "*"} {
		files, err := filepath.Glob(filepath.Join(n.opts.RunDir, pattern))
		if err != nil || len(files) > 0 {
			n.Errorf("left: %v, %v", files, err)
		}
	}
}

// served dials the proxy's outbound port in the namespace, from inside. A proxy
// resets what no rule turned aside, which shows that one is there: without it the
// kernel refuses, or, with a listener that nobody serves, nothing comes.
func served(ns *nstest.NS) error {
	var err error
	ns.Do(func() {
		var conn net.Conn
		conn, err = net.DialTimeout("tcp4", podAddr+":15001", 5*time.Second)
		if err != nil {
			return
		}
		defer conn.Close()
		_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		_, err = conn.Read(make([]byte, 1))
	})
	if errors.Is(err, syscall.ECONNRESET) {
		return nil
	}
	return fmt.Errorf("%w, want a reset", err)
}

func TestAProxyServesWhenStartReturnsAndNothingIsLeftAfterEnd(t *testing.T) {
	n := newNode(t)
	ns, req := n.sandbox("c1")
	a := n.start(req)
	pid := n.pid("c1")
	if a.ProxyUID < n.opts.UIDBase || a.Spec.Bypass.ID == 0 || a.Spec.OutboundPort == 0 {
		t.Errorf("attachment %+v", a)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000",
		"NoNewPrivs:\t1", "Seccomp:\t2", fmt.Sprintf("Uid:\t%d\t%d\t%d\t%d", a.ProxyUID, a.ProxyUID, a.ProxyUID, a.ProxyUID),
	} {
		if !strings.Contains(string(status), want) {
			t.Errorf("/proc/PID/status lacks %q", want)
		}
	}
	if err := served(ns); err != nil {
		t.Error(err)
	}
	n.manager.End("c1", "eth0")
	n.gone(pid)
	n.nothingLeft("c1")
	n.manager.End("c1", "eth0") // again: no matter
}

func TestAKilledProxyIsReplacedOnTheSameListeners(t *testing.T) {
	n := newNode(t)
	ns, req := n.sandbox("c1")
	n.start(req)
	old := n.pid("c1")
	if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	// From now on no dial may be refused: callers wait in the queue.
	for range 20 {
		if err := served(ns); err != nil {
			t.Fatal(err)
		}
	}
	if n.pid("c1") == old {
		t.Error("the same process")
	}
}

func TestAnAgentThatStartsAgainAdoptsItsProxies(t *testing.T) {
	n := newNode(t)
	ns, req := n.sandbox("c1")
	n.start(req)
	if err := n.manager.Commit("c1"); err != nil {
		t.Fatal(err)
	}
	pid := n.pid("c1")
	n.manager.Close()
	if err := served(ns); err != nil {
		t.Errorf("while no agent is there: %v", err)
	}
	n.open()
	if n.pid("c1") != pid {
		t.Fatal("another process")
	}
	// The listeners came back with it: it can die now.
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := served(ns); err != nil {
		t.Error(err)
	}
	n.manager.End("c1", "eth0")
	n.nothingLeft("c1")
}

func TestAProxyThatDiedWithoutAnAgentIsStartedAgain(t *testing.T) {
	n := newNode(t)
	ns, req := n.sandbox("c1")
	n.start(req)
	if err := n.manager.Commit("c1"); err != nil {
		t.Fatal(err)
	}
	pid := n.pid("c1")
	n.manager.Close()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	n.open()
	if err := served(ns); err != nil {
		t.Error(err)
	}
}

// TestTheBypassIsThatOfTheProxyThatRuns: rules are compared with the attachment's
// Spec, so a parent cgroup that was made anew must show there.
func TestTheBypassIsThatOfTheProxyThatRuns(t *testing.T) {
	n := newNode(t)
	ns, req := n.sandbox("c1")
	before := n.start(req).Spec.Bypass
	if err := n.manager.Commit("c1"); err != nil {
		t.Fatal(err)
	}
	pid := n.pid("c1")
	n.manager.Close()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	n.gone(pid)
	for _, dir := range n.cgroups("c1") {
		for _, dir := range []string{dir, filepath.Dir(dir)} {
			err := os.Remove(dir)
			for end := time.Now().Add(5 * time.Second); errors.Is(err, syscall.EBUSY) && time.Now().Before(end); err = os.Remove(dir) {
				time.Sleep(time.Millisecond) // a process leaves its cgroups after it has ended
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	n.open()
	if err := served(ns); err != nil {
		t.Error(err)
	}
	now, err := n.manager.Bypass()
	if err != nil {
		t.Fatal(err)
	}
	if got := n.manager.List()[0].Spec.Bypass; got != now || got == before {
		t.Errorf("the attachment has %+v, the cgroup is %+v; before it was %+v", got, now, before)
	}
}

func TestAnAttachmentThatWasNeverCommittedIsUndone(t *testing.T) {
	n := newNode(t)
	_, req := n.sandbox("c1")
	n.start(req)
	pid := n.pid("c1")
	n.manager.Close()
	n.open()
	n.gone(pid)
	n.nothingLeft("c1")
}

func TestItIsToldWhenOthersAreCapturedThanBefore(t *testing.T) {
	n := newNode(t)
	n.manager.Close()
	var told atomic.Bool
	n.opts.Changed = func() { told.Store(true) }
	n.open()
	_, req := n.sandbox("c1")
	n.start(req)
	told.Store(false)
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"committed", func() error { return n.manager.Commit("c1") }},
		{"released", func() error { return n.manager.Release("c1") }},
		{"ended", func() error { n.manager.End("c1", ""); return nil }},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		if !told.Swap(false) && step.name != "ended" { // the proxy may have ended by itself
			t.Errorf("%s, and nobody was told", step.name)
		}
	}
}

func TestTwoStartsOfOneContainerShareAProxy(t *testing.T) {
	n := newNode(t)
	_, req := n.sandbox("c1")
	var all sync.WaitGroup
	for _, ifname := range []string{"eth0", "eth0", "net1"} {
		r := req
		r.IfName = ifname
		all.Go(func() {
			if _, err := n.manager.Start(n.Context(), r, unclaimed); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	pid := n.pid("c1")
	// The proxy ends with the last interface.
	n.manager.End("c1", "eth0")
	if n.pid("c1") != pid {
		t.Error("the proxy ended with the first interface")
	}
	n.manager.End("c1", "net1")
	n.gone(pid)
	n.nothingLeft("c1")
}

func TestANamespaceThatIsNotThePodsIsRefused(t *testing.T) {
	n := newNode(t)
	_, good := n.sandbox("c1")
	n.start(good)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*launch.Request){
		"the host's":                func(r *launch.Request) { r.Netns = "/proc/self/ns/net" },
		"gone":                      func(r *launch.Request) { r.Netns = "/run/netns/weir-no-such" },
		"a file":                    func(r *launch.Request) { r.Netns = file },
		"not a network namespace":   func(r *launch.Request) { r.Netns = "/proc/self/ns/mnt" },
		"another container's":       func(r *launch.Request) { r.ContainerID = "c2" },
		"without the pod's address": func(r *launch.Request) { r.Addresses = []netip.Addr{netip.MustParseAddr("10.9.0.99")} },
	} {
		t.Run(name, func(t *testing.T) {
			req := good
			change(&req)
			_, err := n.manager.Start(t.Context(), req, unclaimed)
			if _, ok := errors.AsType[*launch.NamespaceError](err); !ok {
				t.Errorf("%v, want a NamespaceError", err)
			}
		})
	}
	n.nothingLeft("c2")
}

func TestAProxyThatDoesNotStartLeavesNothing(t *testing.T) {
	n := newNode(t)
	n.manager.Close()
	n.opts.Proxy = "/bin/true"
	n.open()
	_, req := n.sandbox("c1")
	if _, err := n.manager.Start(t.Context(), req, unclaimed); err == nil {
		t.Fatal("started")
	} else {
		t.Log(err)
	}
	n.nothingLeft("c1")
}

// limitsOf are the limits of a container's proxy: its memory and its share of the
// CPU as the cgroups have them, and Go's own limit.
func (n *node) limitsOf(id string) (string, string, string) {
	n.Helper()
	read := func(names ...string) string {
		for _, dir := range n.cgroups(id) {
			for _, name := range names {
				if b, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
					return strings.TrimSpace(string(b))
				}
			}
		}
		n.Skipf("no hierarchy here has any of %v", names)
		return ""
	}
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", n.pid(id)))
	if err != nil {
		n.Fatal(err)
	}
	limit := ""
	for _, v := range strings.Split(string(env), "\x00") {
		if l, ok := strings.CutPrefix(v, "GOMEMLIMIT="); ok {
			limit = l
		}
	}
	return read("memory.max", "memory.limit_in_bytes"), read("cpu.weight", "cpu.shares"), limit
}

func TestAPodsWishesForItsProxyHoldForEachOfItsProxies(t *testing.T) {
	n := newNode(t)
	ns, req := n.sandbox("c1")
	req.Limits = launch.Limits{Memory: 32 << 20, CPUWeight: 10000}
	req.OpaquePorts = []capture.PortRange{{First: 3306, Last: 3306}}
	a := n.start(req)
	if len(a.OpaquePorts) != 1 || a.Limits != req.Limits {
		t.Errorf("attachment %+v", a)
	}
	_, plain := n.sandbox("c2")
	n.start(plain)
	check := func(when, id, memory, limit string, cpu ...string) {
		t.Helper()
		m, c, l := n.limitsOf(id)
		if m != memory || l != limit || !slices.Contains(cpu, c) {
			t.Errorf("%s: memory %s, CPU %s, GOMEMLIMIT %s", when, m, c, l)
		}
	}
	check("asked for", "c1", "33554432", "30198988", "10000", "262144")
	check("not asked for", "c2", "134217728", "120795955", "100", "2597")

	if err := n.manager.Commit("c1"); err != nil {
		t.Fatal(err)
	}
	pid := n.pid("c1")
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	n.gone(pid)
	if err := served(ns); err != nil { // by the next one, in all of its cgroups
		t.Error(err)
	}
	check("started again", "c1", "33554432", "30198988", "10000", "262144")
}

// TestALimitThatTheNodeDoesNotHaveIsRefused: where only a hierarchy without
// controllers is seen, a wish cannot come true; without one the pod starts.
func TestALimitThatTheNodeDoesNotHaveIsRefused(t *testing.T) {
	n := newNode(t)
	const bare = "/sys/fs/cgroup/unified"
	have, err := os.ReadFile(bare + "/cgroup.controllers")
	if err != nil || strings.Contains(string(have), "memory") {
		t.Skip("cgroup v2 has the controller here")
	}
	other := n.opts
	other.RunDir, other.CgroupRoot, other.CgroupParent = t.TempDir(), bare, n.opts.CgroupParent+"-bare"
	m, err := launch.Open(other)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	_, req := n.sandbox("c1")
	req.Limits.Memory = 64 << 20
	_, err = m.Start(t.Context(), req, unclaimed)
	if limit, ok := errors.AsType[*launch.LimitError](err); !ok {
		t.Errorf("%v, %v", limit, err)
	}
	if left := m.List(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if _, err := os.Stat(filepath.Join(bare, other.CgroupParent, "c1")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left: its cgroup, %v", err)
	}
}

func TestOnlySomeProxiesAreStartedAtOnce(t *testing.T) {
	n := newNode(t)
	most := 2 * runtime.NumCPU()
	var working, seen atomic.Int32
	errNotWanted := errors.New("not wanted")
	var starts sync.WaitGroup
	for i := range 2*most + 1 {
		_, req := n.sandbox(fmt.Sprintf("turn-%d", i))
		starts.Go(func() {
			_, err := n.manager.Start(t.Context(), req, func(launch.Attachment) error {
				defer working.Add(-1)
				for now := working.Add(1); ; {
					if before := seen.Load(); before >= now || seen.CompareAndSwap(before, now) {
						break
					}
				}
				time.Sleep(20 * time.Millisecond)
				return errNotWanted
			})
			if !errors.Is(err, errNotWanted) {
				t.Errorf("%s: %v", req.ContainerID, err)
			}
		})
	}
	starts.Wait()
	if got := int(seen.Load()); got < 1 || got > most {
		t.Errorf("%d at once, want at most %d", got, most)
	}
}
