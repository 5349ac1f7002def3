package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/weirmesh/weir/tests/pod"
)

// limit is how long a demo may take once everything is built.
const limit = 15 * time.Second

// TestDemo runs the demo as a user does. It is one test, so that what it runs is
// built once.
func TestDemo(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("the demo needs root")
	}
	if _, err := pod.Build(t.Context()); err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(t.TempDir(), "demo")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Run("all steps are seen", func(t *testing.T) { perform(t, binary).wantOK(t) })
	t.Run("all steps are seen over IPv6", func(t *testing.T) { perform(t, binary, "-6").wantOK(t) })
	t.Run("two at once do not meet", func(t *testing.T) {
		var group errgroup.Group
		runs := make([]*ran, 2)
		for i := range runs {
			group.Go(func() error {
				runs[i] = perform(t, binary)
				return nil
			})
		}
		_ = group.Wait()
		for _, r := range runs {
			r.wantOK(t)
		}
	})
	t.Run("a deleted rule fails its step", func(t *testing.T) { testDeletedRules(t, binary) })
	t.Run("a signal leaves nothing behind", func(t *testing.T) { testSignals(t, binary) })
	t.Run("an unknown flag is answered with the usage", func(t *testing.T) {
		r := perform(t, binary, "-nonsense")
		if r.code != 2 || !strings.Contains(r.stderr, "-delete-rule") {
			t.Errorf("exit code %d: %s", r.code, r.stderr)
		}
	})
}

func testDeletedRules(t *testing.T, binary string) {
	for _, test := range []struct {
		rule string
		step int
	}{
		{"ingress/in_turned", 1},
		{"ingress/out_turned", 2},
		{"ingress/out_own", 3},
		{"front/in_turned", 3},
		{"front/out_turned", 5},
		{"front/out_own", 6},
		{"back/in_turned", 6},
	} {
		t.Run(test.rule, func(t *testing.T) {
			r := perform(t, binary, "-delete-rule", test.rule)
			_, counter, _ := strings.Cut(test.rule, "/")
			if r.code != 1 || !strings.Contains(r.stderr, fmt.Sprintf("failed at step %d,", test.step)) || !strings.Contains(r.stderr, counter) {
				t.Errorf("exit code %d, want a failure at step %d that names %s:\n%s%s", r.code, test.step, counter, r.stdout, r.stderr)
			}
		})
	}
}

// testSignals interrupts demos at different moments.
func testSignals(t *testing.T, binary string) {
	for _, test := range []struct {
		moment string
		signal syscall.Signal
		after  time.Duration // after its start
		want   int           // exit code; -1: it was killed by the signal
	}{
		{"while it makes the node", syscall.SIGINT, 30 * time.Millisecond, pod.Interrupted},
		{"while it makes pods", syscall.SIGINT, 200 * time.Millisecond, pod.Interrupted},
		{"by SIGTERM", syscall.SIGTERM, 300 * time.Millisecond, pod.Interrupted},
		{"by SIGKILL", syscall.SIGKILL, 250 * time.Millisecond, -1},
	} {
		t.Run(test.moment, func(t *testing.T) {
			r := start(t, binary)
			time.Sleep(test.after)
			if err := r.cmd.Process.Signal(test.signal); err != nil {
				t.Fatal(err)
			}
			r.wait(t)
			if r.code != test.want {
				t.Errorf("exit code %d, want %d:\n%s%s", r.code, test.want, r.stdout, r.stderr)
			}
		})
	}
}

// ran is a demo that runs or ran.
type ran struct {
	cmd            *exec.Cmd
	out, err       bytes.Buffer
	began          time.Time
	code           int
	stdout, stderr string
}

func start(t *testing.T, binary string, args ...string) *ran {
	t.Helper()
	r := &ran{cmd: exec.Command(binary, args...), began: time.Now()}
	r.cmd.Stdout, r.cmd.Stderr = &r.out, &r.err
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return r
}

// wait waits for the demo's end and looks for what it left behind.
func (r *ran) wait(t *testing.T) {
	t.Helper()
	_ = r.cmd.Wait()
	r.code, r.stdout, r.stderr = r.cmd.ProcessState.ExitCode(), r.out.String(), r.err.String()
	if took := time.Since(r.began); took > limit {
		t.Errorf("it took %s", took)
	}
	node := fmt.Sprintf("weir-demo-%d", r.cmd.Process.Pid)
	left := leftovers(t, node)
	// A killed demo cannot wait for its node's end.
	for deadline := time.Now().Add(5 * time.Second); r.code == -1 && len(left) > 0 && time.Now().Before(deadline); left = leftovers(t, node) {
		time.Sleep(20 * time.Millisecond)
	}
	if len(left) > 0 {
		t.Errorf("left behind: %s", strings.Join(left, ", "))
	}
}

func perform(t *testing.T, binary string, args ...string) *ran {
	t.Helper()
	r := start(t, binary, args...)
	r.wait(t)
	return r
}

func (r *ran) wantOK(t *testing.T) {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(r.stdout), "\n")
	if r.code != 0 || !strings.HasPrefix(lines[len(lines)-1], "ok: 7 of 7 steps") {
		t.Errorf("exit code %d:\n%s%s", r.code, r.stdout, r.stderr)
	}
}

// leftovers finds what a demo whose node has this name left on the machine.
func leftovers(t *testing.T, node string) []string {
	t.Helper()
	var left []string
	note := func(what, detail string) { left = append(left, what+" "+detail) }
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, node) {
			note("mount", line)
		}
		if fields := strings.Fields(line); strings.Contains(line, " - cgroup") {
			if _, err := os.Stat(filepath.Join(fields[4], node)); err == nil {
				note("cgroup", filepath.Join(fields[4], node))
			}
		}
	}
	for _, file := range []string{"environ", "cgroup"} { // applications and agent; proxies
		processes, err := filepath.Glob("/proc/[0-9]*/" + file)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range processes {
			if content, err := os.ReadFile(path); err == nil && bytes.Contains(content, []byte(node)) {
				note("process", path)
			}
		}
	}
	for _, folder := range []string{"/run", "/run/netns", "/run/weir", "/tmp", "/var/tmp", "/var/lib/cni", "/dev/shm"} {
		entries, err := os.ReadDir(folder)
		if err != nil {
			continue // it need not exist
		}
		for _, e := range entries {
			if strings.Contains(e.Name(), node) {
				note("file", filepath.Join(folder, e.Name()))
			}
		}
	}
	if _, err := os.Stat("/sys/class/net/pods0"); err == nil {
		note("interface", "pods0")
	}
	return left
}
