package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/agent/journal"
	"github.com/weirmesh/weir/agent/proxypb"
)

// This file is the agent's half of a launch, as small as it can be.

const (
	proxyUID = 1_700_000
	proxyGID = 1_700_001
)

var binary struct {
	once sync.Once
	path string
	err  error
}

// proxyBinary builds weir-proxy once.
func proxyBinary(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes network namespaces and cgroups")
	}
	binary.once.Do(func() {
		dir, err := os.MkdirTemp("", "weir-proxy-test")
		if err != nil {
			binary.err = err
			return
		}
		if err := os.Chmod(dir, 0o755); err != nil {
			binary.err = err
			return
		}
		binary.path = filepath.Join(dir, "weir-proxy")
		cmd := exec.Command("go", "build", "-tags", "grpcnotrace", "-ldflags", "-s -w", "-o", binary.path, ".")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			binary.err = fmt.Errorf("%w: %s", err, out)
		}
	})
	if binary.err != nil {
		t.Fatal(binary.err)
	}
	return binary.path
}

func TestMain(m *testing.M) {
	// A namespace's thread must not be the main one, which speaks for the process.
	runtime.LockOSThread()
	code := m.Run()
	if binary.path != "" {
		os.RemoveAll(filepath.Dir(binary.path))
	}
	os.Exit(code)
}

// namespace is a network namespace with a thread in it.
type namespace struct {
	work chan func()
	fd   int
}

func newNamespace(t testing.TB) *namespace {
	t.Helper()
	n := &namespace{work: make(chan func())}
	started := make(chan error)
	go n.thread(started)
	if err := <-started; err != nil {
		t.Fatalf("network namespace: %v", err)
	}
	t.Cleanup(func() {
		close(n.work)
		unix.Close(n.fd)
	})
	return n
}

// thread never unlocks: its thread ends with it.
func (n *namespace) thread(started chan<- error) {
	runtime.LockOSThread()
	err := unix.Unshare(unix.CLONE_NEWNET)
	if err == nil {
		n.fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
	if err == nil {
		var lo netlink.Link
		if lo, err = netlink.LinkByName("lo"); err == nil {
			err = netlink.LinkSetUp(lo)
		}
	}
	started <- err
	for f := range n.work {
		f()
	}
}

// do runs f in the namespace. What it starts or opens belongs there.
func (n *namespace) do(f func()) {
	done := make(chan struct{})
	n.work <- func() { defer close(done); f() }
	<-done
}

// cgroups is one cgroup in every hierarchy of this machine.
type cgroups struct {
	name  string // relative to the root of each
	paths []string
}

func newCgroups(t testing.TB) *cgroups {
	t.Helper()
	c := &cgroups{name: fmt.Sprintf("weir-proxy-test-%d-%d", os.Getpid(), time.Now().UnixNano())}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if f[2] != "cgroup" && f[2] != "cgroup2" {
			continue
		}
		dir := filepath.Join(f[1], c.name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { removeCgroup(t, dir) })
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			// v1's cpuset takes no process before these are set.
			if b, err := os.ReadFile(filepath.Join(f[1], file)); err == nil && f[2] == "cgroup" {
				if err := os.WriteFile(filepath.Join(dir, file), b, 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
		file := "cgroup.procs" // the agent starts it in there instead
		if f[2] == "cgroup" {
			file = "tasks"
		}
		c.paths = append(c.paths, filepath.Join(dir, file))
	}
	return c
}

func removeCgroup(t testing.TB, dir string) {
	var err error
	for range 100 {
		if err = os.Remove(dir); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("left behind: %v", err)
}

// launched is a running proxy.
type launched struct {
	cmd       *exec.Cmd
	control   string // path
	listeners []kept
	took      time.Duration // start to SERVING
}

// kept is the agent's copy of a listener.
type kept struct {
	*proxypb.Listener
	fd int
}

// identityOf asks a proxy for the memory file of its identity; -1: it has none.
func identityOf(t testing.TB, control string) int {
	t.Helper()
	fd := memoryOf(t, control, "I", proxypb.LaunchReply_IDENTITY)
	if fd >= 0 {
		t.Cleanup(func() { unix.Close(fd) })
	}
	return fd
}

// journalOf asks a proxy for its journal.
func journalOf(t testing.TB, control string) *journal.Reader {
	t.Helper()
	r, err := journal.Open(os.NewFile(uintptr(memoryOf(t, control, "J", proxypb.LaunchReply_JOURNAL)), "journal"))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// memoryOf asks a proxy for a memory file; -1: it has none.
func memoryOf(t testing.TB, control, ask string, want proxypb.LaunchReply_Stage) int {
	t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: control, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte(ask)); err != nil {
		t.Fatal(err)
	}
	f, err := conn.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	reply, fds, err := readReply(int(f.Fd()))
	if err != nil || reply.GetStage() != want || len(fds) > 1 {
		t.Fatalf("%v with %d descriptors, %v", reply, len(fds), err)
	}
	if len(fds) == 0 {
		return -1
	}
	return fds[0]
}

func defaultListeners() []*proxypb.Listener {
	return []*proxypb.Listener{
		{Name: "outbound", Network: "tcp4", Address: "0.0.0.0:15001"},
		{Name: "outbound", Network: "tcp6", Address: "[::]:15001", Optional: true},
		{Name: "inbound", Network: "tcp4", Address: "0.0.0.0:15006"},
		{Name: "inbound", Network: "tcp6", Address: "[::]:15006", Optional: true},
	}
}

func launchOf(procs []string) *proxypb.Launch {
	return &proxypb.Launch{
		ContainerId: "c0ffee", Generation: 1, PodNamespace: "shop", PodName: "front-0",
		CgroupFiles: procs, Uid: proxyUID, Gid: proxyGID, Listeners: defaultListeners(),
	}
}

// start starts a proxy in ns, on inherited listeners if there are any.
func start(t testing.TB, ns *namespace, cg *cgroups, inherited []kept) *launched {
	t.Helper()
	msg := launchOf(cg.paths)
	if inherited != nil {
		msg.Listeners = nil
		for _, k := range inherited {
			l := proto.CloneOf(k.Listener)
			l.Inherited = true
			msg.Listeners = append(msg.Listeners, l)
		}
	}
	p, err := launch(t, ns, msg, inherited)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// launch is what the agent does: it sends msg and hears how it goes.
func launch(t testing.TB, ns *namespace, msg *proxypb.Launch, inherited []kept) (*launched, error) {
	t.Helper()
	return launchAs(t, ns, msg, inherited, -1)
}

// launchAs is launch with the memory file of an identity.
func launchAs(t testing.TB, ns *namespace, msg *proxypb.Launch, inherited []kept, identity int) (*launched, error) {
	t.Helper()
	msg.Identity = identity >= 0
	path := proxyBinary(t)
	p := &launched{control: filepath.Join(t.TempDir(), "control.sock")}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: p.control, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	control, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	defer control.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := pair[0], os.NewFile(uintptr(pair[1]), "launch")
	defer unix.Close(ours)
	tv := unix.NsecToTimeval((10 * time.Second).Nanoseconds())
	if err := unix.SetsockoptTimeval(ours, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatal(err)
	}

	p.cmd = &exec.Cmd{
		Path: path, Args: []string{"weir-proxy"}, Dir: "/",
		Env:         []string{"GOMAXPROCS=2", "GOMEMLIMIT=60000000", "SECRET=leaks"},
		ExtraFiles:  []*os.File{theirs, control},
		SysProcAttr: &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS, Setsid: true},
	}
	if os.Getenv("WEIR_TEST_STDERR") != "" {
		p.cmd.Stderr = os.Stderr
	}
	began := time.Now()
	ns.do(func() { err = p.cmd.Start() })
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.kill() })

	b, err := proto.Marshal(msg)
	if err != nil {
		t.Fatal(err)
	}
	var fds []int
	for _, k := range inherited {
		fds = append(fds, k.fd)
	}
	if msg.GetIdentity() {
		fds = append(fds, identity)
	}
	if err := unix.Sendmsg(ours, b, unix.UnixRights(fds...), nil, 0); err != nil {
		t.Fatal(err)
	}
	listening, got, err := readReply(ours)
	if err != nil {
		return nil, err
	}
	if listening.GetStage() != proxypb.LaunchReply_LISTENING || len(got) != len(listening.GetListeners()) {
		return nil, fmt.Errorf("%v with %d descriptors where LISTENING was due", listening, len(got))
	}
	for i, l := range listening.GetListeners() {
		p.listeners = append(p.listeners, kept{l, got[i]})
	}
	t.Cleanup(func() {
		for _, fd := range got {
			unix.Close(fd)
		}
	})
	serving, _, err := readReply(ours)
	if err != nil {
		return nil, err
	}
	p.took = time.Since(began)
	if serving.GetStage() != proxypb.LaunchReply_SERVING {
		return nil, fmt.Errorf("%v where SERVING was due", serving)
	}
	if n, err := uninterrupted(func() (int, error) { return unix.Read(ours, make([]byte, 1)) }); err != nil {
		return nil, fmt.Errorf("launch socket: %w", err)
	} else if n != 0 {
		return nil, fmt.Errorf("launch socket not closed: %d bytes", n)
	}
	return p, nil
}

// uninterrupted repeats a call on a socket with a timeout, which a signal
// interrupts in spite of SA_RESTART: signal(7).
func uninterrupted(call func() (int, error)) (int, error) {
	for {
		if n, err := call(); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// readReply reads one packet, or all of a stream.
func readReply(fd int) (*proxypb.LaunchReply, []int, error) {
	buf, oob := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(16*4))
	var oobn int
	n, err := uninterrupted(func() (int, error) {
		n, forOOB, _, _, err := unix.Recvmsg(fd, buf, oob, unix.MSG_CMSG_CLOEXEC)
		oobn = forOOB
		return n, err
	})
	if err != nil {
		return nil, nil, err
	}
	if n == 0 {
		return nil, nil, errors.New("the proxy hung up")
	}
	reply := &proxypb.LaunchReply{}
	if err := proto.Unmarshal(buf[:n], reply); err != nil {
		return nil, nil, err
	}
	if reply.GetError() != "" {
		return nil, nil, errors.New(reply.GetError())
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, nil, err
	}
	var fds []int
	for i := range messages {
		got, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return nil, nil, err
		}
		fds = append(fds, got...)
	}
	return reply, fds, nil
}

func (p *launched) kill() {
	if p.cmd.ProcessState == nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	}
}

// status is /proc/PID/status as a map.
func (p *launched) status(t testing.TB) map[string]string {
	t.Helper()
	b, err := os.ReadFile(p.proc("status"))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for line := range strings.Lines(string(b)) {
		k, v, _ := strings.Cut(line, ":")
		out[k] = strings.Join(strings.Fields(v), " ")
	}
	return out
}

func (p *launched) proc(name string) string {
	return filepath.Join("/proc", strconv.Itoa(p.cmd.Process.Pid), name)
}
