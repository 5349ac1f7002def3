package main

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestLaunch(t *testing.T) {
	ns, cg := newNamespace(t), newCgroups(t)
	p := start(t, ns, cg, nil)
	t.Logf("start to SERVING: %s", p.took)

	status := p.status(t)
	for key, want := range map[string]string{
		"Name":       "weir-proxy",
		"Uid":        "1700000 1700000 1700000 1700000",
		"Gid":        "1700001 1700001 1700001 1700001",
		"Groups":     "",
		"CapInh":     "0000000000000000",
		"CapPrm":     "0000000000000000",
		"CapEff":     "0000000000000000",
		"CapBnd":     "0000000000000000",
		"CapAmb":     "0000000000000000",
		"NoNewPrivs": "1",
		"Seccomp":    "2",
		"Umask":      "0077",
	} {
		if got := status[key]; got != want {
			t.Errorf("%s is %q, want %q", key, got, want)
		}
	}
	if got := status["NSpid"]; !strings.HasSuffix(got, " 1") {
		t.Errorf("NSpid is %q: it is not the first of a PID namespace", got)
	}
	for _, name := range []string{"pid", "mnt", "net"} {
		if link(t, p.proc("ns/"+name)) == link(t, "/proc/self/ns/"+name) {
			t.Errorf("it shares the %s namespace", name)
		}
	}
	if link(t, p.proc("ns/net")) != link(t, "/proc/self/fd/"+itoa(ns.fd)) {
		t.Error("it is in another network namespace than the pod")
	}
	// Threads, too.
	tasks, err := os.ReadDir(p.proc("task"))
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		b, err := os.ReadFile(filepath.Join(p.proc("task"), task.Name(), "status"))
		if err != nil || !strings.Contains(string(b), "Seccomp:\t2") || !strings.Contains(string(b), "Uid:\t1700000") {
			t.Errorf("thread %s is not confined: %v", task.Name(), err)
		}
	}
	// Non-dumpable: /proc/PID belongs to root, whoever it runs as.
	if uid := owner(t, p.proc("environ")); uid != 0 {
		t.Errorf("/proc/PID/environ belongs to uid %d: it is dumpable", uid)
	}

	entries, err := os.ReadDir(p.proc("root"))
	if err != nil || len(entries) != 0 {
		t.Errorf("its root has %v, %v", entries, err)
	}
	mounts, err := os.ReadFile(p.proc("mounts"))
	if err != nil || strings.Count(string(mounts), "\n") != 1 || !strings.Contains(string(mounts), "ro,nosuid,nodev,noexec") {
		t.Errorf("its mounts are %q, %v", mounts, err)
	}
	env, err := os.ReadFile(p.proc("environ"))
	if err != nil || string(env) != "GOMAXPROCS=2\x00GOMEMLIMIT=60000000\x00" {
		t.Errorf("its environment is %q, %v", env, err)
	}
	cmdline, err := os.ReadFile(p.proc("cmdline"))
	if err != nil || !strings.HasPrefix(string(cmdline), "weir-proxy\x00serve\x00c0ffee\x001\x00shop/front-0\x00") {
		t.Errorf("its command line is %q, %v", cmdline, err)
	}

	groups, err := os.ReadFile(p.proc("cgroup"))
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(groups), "/"+cg.name+"\n"); n != len(cg.paths) {
		t.Errorf("in %d of %d cgroups:\n%s", n, len(cg.paths), groups)
	}

	if len(p.listeners) != 4 {
		t.Fatalf("%d listeners, want 4", len(p.listeners))
	}
	for _, addr := range []string{"127.0.0.1:15001", "127.0.0.1:15006", "[::1]:15001", "[::1]:15006"} {
		ns.do(func() {
			conn, err := net.DialTimeout("tcp", addr, time.Second)
			if err == nil {
				conn.Close()
			} else if !errors.Is(err, unix.ECONNRESET) { // served: nobody was turned aside
				t.Errorf("its port: %v", err)
			}
		})
	}
}

// TestLaunchKeepsNoDescriptors: nothing the agent has open may reach a pod.
func TestLaunchKeepsNoDescriptors(t *testing.T) {
	leak, err := unix.Open("/etc/passwd", unix.O_RDONLY, 0) // inheritable
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(leak)
	p := start(t, newNamespace(t), newCgroups(t), nil)
	fds, err := os.ReadDir(p.proc("fd"))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		target, err := os.Readlink(filepath.Join(p.proc("fd"), fd.Name()))
		if os.IsNotExist(err) {
			continue // closed meanwhile
		}
		ok := target == "/dev/null" || target == "/memfd:weir-journal (deleted)" || strings.HasPrefix(target, "socket:") || strings.HasPrefix(target, "anon_inode:[event")
		if !ok {
			t.Errorf("descriptor %s is %s", fd.Name(), target)
		}
	}
}

func TestLaunchErrors(t *testing.T) {
	ns, cg := newNamespace(t), newCgroups(t)
	first := start(t, ns, cg, nil)

	msg := launchOf(cg.paths)
	if _, err := launch(t, ns, msg, nil); err == nil || !strings.Contains(err.Error(), "listen on tcp4 0.0.0.0:15001: address already in use") {
		t.Errorf("port in use: %v", err)
	}
	msg = launchOf(cg.paths)
	msg.CgroupFiles = []string{"/sys/fs/cgroup/none/cgroup.procs"}
	if _, err := launch(t, ns, msg, nil); err == nil || !strings.Contains(err.Error(), "join cgroup") {
		t.Errorf("no such cgroup: %v", err)
	}
	msg = launchOf(cg.paths)
	msg.Uid = 0
	if _, err := launch(t, ns, msg, nil); err == nil || !strings.Contains(err.Error(), "does not run as root") {
		t.Errorf("as root: %v", err)
	}
	first.kill()
}

// TestHandover: a connection that came while no proxy was there is served by the
// next one, on the same socket.
func TestHandover(t *testing.T) {
	ns, cg := newNamespace(t), newCgroups(t)
	first := start(t, ns, cg, nil)
	first.kill()
	var waiting net.Conn
	var err error
	ns.do(func() { waiting, err = net.DialTimeout("tcp", "127.0.0.1:15006", time.Second) })
	if err != nil {
		t.Fatalf("refused while the proxy was away: %v", err)
	}
	defer waiting.Close()
	second := start(t, ns, cg, first.listeners)
	if len(second.listeners) != len(first.listeners) {
		t.Errorf("%d listeners, want %d", len(second.listeners), len(first.listeners))
	}
	// It was not turned aside, so what it is served with is a reset.
	_ = waiting.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := waiting.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Errorf("not served: %v", err)
	}

	// An agent that was restarted asks for its copies.
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: second.control, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("L")); err != nil {
		t.Fatal(err)
	}
	f, err := conn.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	reply, fds, err := readReply(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	if len(fds) != 4 || len(reply.GetListeners()) != 4 {
		t.Fatalf("%d descriptors for %v", len(fds), reply)
	}
	for i, fd := range fds {
		if inode(t, fd) != inode(t, first.listeners[i].fd) {
			t.Errorf("listener %d is another socket", i)
		}
		unix.Close(fd)
	}
	if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("not closed: %d, %v", n, err)
	}
}

func TestRunByHand(t *testing.T) {
	var out, errs strings.Builder
	if code := run([]string{"weir-proxy", "--version"}, &out, &errs); code != 0 || !strings.HasPrefix(out.String(), "weir-proxy ") {
		t.Errorf("--version: %d, %q", code, out.String())
	}
	for _, args := range [][]string{{"weir-proxy"}, {"weir-proxy", "-h"}, {"weir-proxy", "serve", "x"}} {
		errs.Reset()
		if code := run(args, &out, &errs); code != 2 || !strings.Contains(errs.String(), "started by weir-agent") {
			t.Errorf("%q: %d, %q", args, code, errs.String())
		}
	}
}

// BenchmarkLaunch is the time from start to SERVING.
func BenchmarkLaunch(b *testing.B) {
	cg := newCgroups(b)
	var all []time.Duration
	for b.Loop() {
		p := start(b, newNamespace(b), cg, nil)
		all = append(all, p.took)
		p.kill()
	}
	slices.Sort(all)
	b.ReportMetric(float64(all[len(all)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(all[len(all)*99/100].Microseconds())/1000, "p99-ms")
}
