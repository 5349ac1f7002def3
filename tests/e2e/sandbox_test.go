package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/tests/cluster"
)

// sandbox is a running pod as its node's kernel has it.
type sandbox struct {
	node  *cluster.Node
	id    string // of the sandbox's container
	pause process
	// proxies are the weir-proxy processes in the pod's network namespace.
	proxies []process
}

// lowestProxyUID is where the range of the proxies' uids starts.
const lowestProxyUID = 1879048192

// findSandbox finds a pod by its UID, which is in its processes' cgroups, and
// what runs in the network namespace of its pause container.
func findSandbox(all []process, pod *corev1.Pod) (sandbox, error) {
	s := sandbox{node: bed.node(pod.Spec.NodeName)}
	group := "/pod" + string(pod.UID) + "/"
	for _, p := range all {
		for _, path := range p.cgroups {
			if _, id, ok := strings.Cut(path, group); ok && p.isPause() {
				s.id, s.pause = id, p
			}
		}
	}
	if s.id == "" {
		return s, fmt.Errorf("pod %s has no sandbox", pod.Name)
	}
	for _, p := range all {
		if p.netns == s.pause.netns && p.isProxy() {
			s.proxies = append(s.proxies, p)
		}
	}
	return s, nil
}

func sandboxOf(t *testing.T, pod *corev1.Pod) sandbox {
	t.Helper()
	all, err := processes()
	must(t, err)
	s, err := findSandbox(all, pod)
	must(t, err)
	return s
}

// proxyOf finds a captured pod's one proxy.
func proxyOf(t *testing.T, pod *corev1.Pod) process {
	t.Helper()
	var found process
	// For a moment, a new one and its first stage can both be seen.
	eventually(t, soon, "one proxy of pod "+pod.Name, func() error {
		all, err := processes()
		if err != nil {
			return err
		}
		s, err := findSandbox(all, pod)
		if err != nil {
			return err
		}
		if len(s.proxies) != 1 {
			return fmt.Errorf("%d proxies run", len(s.proxies))
		}
		found = s.proxies[0]
		return nil
	})
	return found
}

// shown is what weir-cni shows of a namespace.
type shown struct {
	Backend  string
	Rules    string
	Counters map[string]struct{ Packets uint64 }
}

// rules reads the rules in a pod's network namespace, from the kernel.
func (s sandbox) rules() (shown, error) {
	var out shown
	program := filepath.Join(repository(), "out", "bin", pluginName)
	text, err := output(exec.Command(program, "show", "--netns", s.pause.path("ns", "net"), "--json"))
	if err != nil {
		return out, err
	}
	return out, json.Unmarshal([]byte(text), &out)
}

// isCaptured says how a pod falls short of: rules are in its network namespace,
// and one proxy serves there, confined.
func isCaptured(all []process, pod *corev1.Pod) error {
	s, err := findSandbox(all, pod)
	if err != nil {
		return err
	}
	shown, err := s.rules()
	if err != nil {
		return err
	}
	if shown.Backend == "none" || !strings.Contains(shown.Rules, "15001") || !strings.Contains(shown.Rules, "15006") {
		return fmt.Errorf("pod %s: the rules in its namespace are %q", pod.Name, shown.Rules)
	}
	if len(s.proxies) != 1 {
		return fmt.Errorf("pod %s: %d proxies run in its namespace, want one", pod.Name, len(s.proxies))
	}
	if err := s.confined(s.proxies[0]); err != nil {
		return fmt.Errorf("pod %s: the proxy (pid %d) %w", pod.Name, s.proxies[0].pid, err)
	}
	return nil
}

// confined says how a proxy falls short of what a proxy may have.
func (s sandbox) confined(proxy process) error {
	status, err := proxy.status()
	if err != nil {
		return err
	}
	for name, want := range map[string]string{
		// CAP_NET_RAW alone, to connect to the application from the caller's address.
		"CapInh": "0000000000002000", "CapPrm": "0000000000002000", "CapEff": "0000000000002000", "CapAmb": "0000000000002000",
		"CapBnd":     "0000000000002000",
		"NoNewPrivs": "1", "Seccomp": "2",
	} {
		if got := strings.Join(status[name], " "); got != want {
			return fmt.Errorf("has %s %s, want %s", name, got, want)
		}
	}
	for _, name := range []string{"Uid", "Gid"} {
		for _, text := range status[name] {
			if id, err := strconv.Atoi(text); err != nil || id < lowestProxyUID {
				return fmt.Errorf("has %s %v, want one from %d", name, status[name], lowestProxyUID)
			}
		}
	}
	if len(status["Groups"]) > 0 {
		return fmt.Errorf("is in groups %v", status["Groups"])
	}
	want := "/" + s.node.Name + "/weir/" + s.id
	// One that was captured in place is named after its network namespace.
	inPlace := "/" + s.node.Name + "/weir/netns-"
	for _, path := range proxy.cgroups {
		if path != want && !strings.HasPrefix(path, inPlace) {
			return fmt.Errorf("is in cgroup %s, want %s in every hierarchy", path, want)
		}
	}
	for _, kind := range []string{"pid", "mnt"} {
		own, err := inode(proxy.path("ns", kind))
		if err != nil {
			return err
		}
		for _, other := range []string{"/proc/self", s.pause.path(), fmt.Sprintf("/proc/%d", s.node.PID())} {
			theirs, err := inode(filepath.Join(other, "ns", kind))
			if err != nil {
				return err
			}
			if own == theirs {
				return fmt.Errorf("shares its %s namespace with %s", kind, other)
			}
		}
	}
	root, err := os.ReadDir(proxy.path("root") + "/")
	if err != nil {
		return err
	}
	if len(root) > 0 {
		return fmt.Errorf("has %v in its root", root)
	}
	return nil
}

// isNotCaptured says what of Weir is in a pod that should have nothing of it.
func isNotCaptured(all []process, pod *corev1.Pod) error {
	s, err := findSandbox(all, pod)
	if err != nil {
		return err
	}
	shown, err := s.rules()
	if err != nil {
		return err
	}
	if shown.Backend != "none" || len(s.proxies) > 0 {
		return fmt.Errorf("pod %s: it has %d proxies and the rules %q, want none", pod.Name, len(s.proxies), shown.Rules)
	}
	return nil
}

// expectCaptured fails the test unless every one of pods is captured.
func expectCaptured(t *testing.T, pods ...*corev1.Pod) { t.Helper(); expect(t, isCaptured, pods) }

// expectNotCaptured fails the test unless every one of pods is left alone.
func expectNotCaptured(t *testing.T, pods ...*corev1.Pod) { t.Helper(); expect(t, isNotCaptured, pods) }

func expect(t *testing.T, is func([]process, *corev1.Pod) error, pods []*corev1.Pod) {
	t.Helper()
	if len(pods) == 0 {
		t.Fatal("there is no pod to look at")
	}
	all, err := processes()
	must(t, err)
	for _, pod := range pods {
		if err := is(all, pod); err != nil {
			t.Error(err)
		}
	}
}

// halt has a process stand still until what it returns has it go on, or the test has ended.
// SIGSTOP is taken by one of its threads, in its turn, and until then the others go
// on: all are waited for.
func halt(t *testing.T, pid int) func() error {
	t.Helper()
	must(t, unix.Kill(pid, unix.SIGSTOP))
	goOn := func() error { return unix.Kill(pid, unix.SIGCONT) }
	t.Cleanup(func() { _ = goOn() }) // it may have ended
	eventually(t, soon, fmt.Sprintf("process %d to stand still", pid), func() error {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		if err != nil || len(threads) == 0 {
			return fmt.Errorf("it has no threads: %w", err)
		}
		for _, thread := range threads {
			stat, err := os.ReadFile(thread)
			if err != nil {
				return err
			}
			// Its name, in parentheses, may be anything (proc_pid_stat(5)).
			if !bytes.HasPrefix(stat[bytes.LastIndexByte(stat, ')')+1:], []byte(" T ")) {
				return fmt.Errorf("%s", stat)
			}
		}
		return nil
	})
	return goOn
}
