package launch

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/agent/proxypb"
)

// launchTimeout bounds the time from the start of a proxy's first stage until it
// serves: it takes some 8 ms; a node that swaps or starts 110 pods at once takes
// longer.
const launchTimeout = 4 * time.Second

// maxPacket bounds one packet of the launch socket.
const maxPacket = 64 << 10

// process is one running weir-proxy.
type process struct {
	pidfd *os.File
	cmd   *exec.Cmd // nil: adopted, somebody else's child
}

// listener is the agent's copy of a proxy's listening socket. It is a bare
// descriptor: os.File.Fd may make a socket blocking, for the proxy too.
type listener struct {
	*proxypb.Listener
	fd int
}

// socketPath is where generation g of a sandbox's proxy serves its control API.
// Every generation has its own: two on one socket would answer at random.
func (m *Manager) socketPath(id string, g uint32) string {
	return filepath.Join(socketDir(m.opts.RunDir), fmt.Sprintf("%s.%d.sock", id, g))
}

// socketGlob matches the sockets of all generations. A container ID holds no
// character that means something to Glob.
func (m *Manager) socketGlob(id string) string {
	return filepath.Join(socketDir(m.opts.RunDir), id+".*.sock")
}

func (m *Manager) removeSockets(id string) error {
	paths, err := filepath.Glob(m.socketGlob(id))
	for _, path := range paths {
		err = errors.Join(err, os.Remove(path))
	}
	return err
}

// spawn starts a proxy for a in ns and waits until it serves. Listeners in kept
// are handed to it; without any, it opens its own, in its own cgroup. So is identity,
// unless that is nil. It returns the process and the agent's copies of all listeners.
func (m *Manager) spawn(ns namespace, a Attachment, kept []listener, identity *os.File) (*process, []listener, error) {
	cgroups := m.cgroups.begin(a.ContainerID, a.Limits, m.opts.Limits)
	cgroup, err := cgroups.v2()
	if err != nil {
		return nil, nil, err
	}
	defer cgroup.Close()
	control, err := listenControl(m.socketPath(a.ContainerID, a.Generation))
	if err != nil {
		return nil, nil, err
	}
	defer control.Close()
	ours, theirs, err := launchSockets()
	if err != nil {
		return nil, nil, err
	}
	defer ours.Close()
	defer theirs.Close()

	cmd := &exec.Cmd{
		Path: m.opts.Proxy,
		Args: []string{"weir-proxy"},
		// An empty root blinds the Go runtime to its cgroup's limits.
		Env: []string{
			"GOMAXPROCS=" + strconv.Itoa(m.opts.MaxProcs),
			"GOMEMLIMIT=" + strconv.FormatInt(a.Limits.or(m.opts.Limits).Memory*9/10, 10),
		},
		Dir:        "/",
		ExtraFiles: []*os.File{theirs, control}, // descriptors 3 and 4
	}
	var pidfd int
	cmd.SysProcAttr = &syscall.SysProcAttr{
		// No Pdeathsig: it follows the thread, and this one ends at once.
		Cloneflags:  syscall.CLONE_NEWPID | syscall.CLONE_NEWNS,
		Setsid:      true,
		PidFD:       &pidfd,
		UseCgroupFD: true,
		CgroupFD:    int(cgroup.Fd()),
	}
	start := func() error {
		// From a cgroup namespace of its own a process is not started in the cgroups of
		// the host, where v2 is mounted with nsdelegate: ENOENT.
		if err := enterCgroupNS(m.opts.HostCgroupNS); err != nil {
			return err
		}
		return cmd.Start()
	}
	if err := ns.do(start); err != nil {
		return nil, nil, fmt.Errorf("start %s: %w", m.opts.Proxy, err)
	}
	theirs.Close()
	if pidfd < 0 {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, nil, errors.New("this kernel has no pidfd (Linux 5.4)")
	}
	if err := unix.SetNonblock(pidfd, true); err != nil {
		return nil, nil, err
	}
	p := &process{pidfd: os.NewFile(uintptr(pidfd), "pidfd"), cmd: cmd}

	// It joins these only when it is told to: they are made while it executes.
	tasks, err := cgroups.v1()
	var launched []listener
	if err == nil {
		msg := launchMessage(a, tasks, kept)
		msg.Identity = identity != nil
		launched, err = handshake(ours, msg, inheritance(kept, identity))
	}
	if err != nil {
		p.kill()
		return nil, nil, fmt.Errorf("proxy of %s/%s: %w", a.PodNamespace, a.PodName, err)
	}
	if len(kept) > 0 {
		// Copies of copies: the ones at hand are the same sockets.
		closeListeners(launched)
		launched = kept
	}
	return p, launched, nil
}

// IsAddressInUse reports whether Start failed because somebody listens on the
// proxy's ports in that namespace.
func IsAddressInUse(err error) bool {
	// From another process, as text.
	return err != nil && strings.Contains(err.Error(), unix.EADDRINUSE.Error())
}

// launchMessage is what a proxy's first stage is told.
func launchMessage(a Attachment, tasks []string, kept []listener) *proxypb.Launch {
	msg := &proxypb.Launch{
		ContainerId:  a.ContainerID,
		Generation:   a.Generation,
		PodNamespace: a.PodNamespace,
		PodName:      a.PodName,
		CgroupFiles:  tasks,
		Uid:          a.ProxyUID,
		Gid:          a.ProxyUID,
		KeepNetRaw:   a.Spec.KeepClient,
	}
	for _, l := range kept {
		inherited := proto.CloneOf(l.Listener)
		inherited.Inherited = true
		msg.Listeners = append(msg.Listeners, inherited)
	}
	if len(kept) > 0 {
		return msg
	}
	v6 := false
	for _, addr := range a.Addresses {
		v6 = v6 || addr.Is6() && !addr.Is4In6()
	}
	add := func(name string, port uint16) {
		msg.Listeners = append(msg.Listeners,
			&proxypb.Listener{Name: name, Network: "tcp4", Address: netip.AddrPortFrom(netip.IPv4Unspecified(), port).String()},
			&proxypb.Listener{Name: name, Network: "tcp6", Address: netip.AddrPortFrom(netip.IPv6Unspecified(), port).String(),
				// A pod without an IPv6 address may be on a node without IPv6.
				Optional: !v6})
	}
	add("outbound", a.Spec.OutboundPort)
	add("inbound", a.Spec.InboundPort)
	return msg
}

// inheritance are the descriptors that go with a launch message.
func inheritance(kept []listener, identity *os.File) []int {
	var fds []int
	for _, l := range kept {
		fds = append(fds, l.fd)
	}
	if identity != nil {
		fds = append(fds, int(identity.Fd()))
	}
	return fds
}

// handshake sends msg, with descriptors, and waits for LISTENING, with the listeners, and
// SERVING.
func handshake(conn *net.UnixConn, msg *proxypb.Launch, fds []int) ([]listener, error) {
	if err := conn.SetDeadline(time.Now().Add(launchTimeout)); err != nil {
		return nil, err
	}
	b, err := proto.Marshal(msg)
	if err != nil {
		return nil, err
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	if _, _, err := conn.WriteMsgUnix(b, rights, nil); err != nil {
		return nil, fmt.Errorf("launch socket: %w", err)
	}
	listeners, err := receive(conn, proxypb.LaunchReply_LISTENING)
	if err != nil {
		return nil, err
	}
	if _, err := receive(conn, proxypb.LaunchReply_SERVING); err != nil {
		closeListeners(listeners)
		return nil, err
	}
	return listeners, nil
}

// receive reads one reply, which must be of the given stage, and the listeners
// that come with it.
func receive(conn *net.UnixConn, want proxypb.LaunchReply_Stage) ([]listener, error) {
	reply, fds, err := receiveReply(conn, want)
	if err != nil {
		return nil, err
	}
	if len(fds) != len(reply.GetListeners()) {
		closeAll(fds)
		return nil, fmt.Errorf("launch socket: %d descriptors for %d listeners", len(fds), len(reply.GetListeners()))
	}
	listeners := make([]listener, len(fds))
	for i, fd := range fds {
		listeners[i] = listener{Listener: reply.GetListeners()[i], fd: fd}
	}
	return listeners, nil
}

// receiveReply reads one reply, which must be of the given stage, and the descriptors
// that come with it.
func receiveReply(conn *net.UnixConn, want proxypb.LaunchReply_Stage) (*proxypb.LaunchReply, []int, error) {
	buf, oob := make([]byte, maxPacket), make([]byte, unix.CmsgSpace(16*4))
	n, oobn, flags, _, err := conn.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, nil, fmt.Errorf("launch socket, waiting for %s: %w", want, err)
	}
	fds, err := parseRights(oob[:oobn])
	if err != nil {
		return nil, nil, err
	}
	var reply proxypb.LaunchReply
	err = proto.Unmarshal(buf[:n], &reply)
	switch {
	case err != nil:
	case n == 0:
		err = fmt.Errorf("it ended before it was %s", want)
	case reply.GetError() != "":
		err = errors.New(reply.GetError())
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		err = errors.New("launch socket: packet truncated")
	case reply.GetStage() != want:
		err = fmt.Errorf("launch socket: %s where %s was due", reply.GetStage(), want)
	}
	if err != nil {
		closeAll(fds)
		return nil, nil, err
	}
	return &reply, fds, nil
}

// parseRights takes descriptors out of a control message.
func parseRights(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("launch socket: %w", err)
	}
	var out []int
	for _, msg := range messages {
		fds, err := unix.ParseUnixRights(&msg)
		if err != nil {
			continue // not descriptors
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			out = append(out, fd)
		}
	}
	return out, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

func closeListeners(ls []listener) {
	for _, l := range ls {
		unix.Close(l.fd)
	}
}

// listenControl makes a proxy's control socket. The path stays when this
// process closes its copy.
func listenControl(path string) (*os.File, error) {
	if err := os.RemoveAll(path); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	return l.File()
}

// launchSockets makes the two ends of a launch socket.
func launchSockets() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("launch socket: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "launch"), os.NewFile(uintptr(fds[1]), "launch")
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("launch socket: %w", err)
	}
	return conn.(*net.UnixConn), theirs, nil
}

// openProcess is a process that somebody else has started.
func openProcess(pid int) (*process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, err
	}
	return &process{pidfd: os.NewFile(uintptr(fd), "pidfd")}, nil
}

// adopt takes over a proxy that runs, by its pid, and asks it for copies of its
// listeners.
func (m *Manager) adopt(a Attachment, pid int) (*process, []listener, error) {
	p, err := openProcess(pid)
	if err != nil {
		return nil, nil, fmt.Errorf("adopt pid %d: %w", pid, err)
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: m.socketPath(a.ContainerID, a.Generation), Net: "unix"})
	if err != nil {
		p.pidfd.Close()
		return nil, nil, err
	}
	defer conn.Close()
	err = conn.SetDeadline(time.Now().Add(launchTimeout))
	if err == nil {
		_, err = conn.Write([]byte{'L'})
	}
	var listeners []listener
	if err == nil {
		listeners, err = receive(conn, proxypb.LaunchReply_LISTENING)
	}
	if err != nil {
		p.pidfd.Close()
		return nil, nil, fmt.Errorf("adopt pid %d: %w", pid, err)
	}
	return p, listeners, nil
}

// wait returns when the process has ended, or when release was called.
func (p *process) wait() error {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	// A pidfd is readable once its process has ended (pidfd_open(2)).
	err = raw.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		return err == nil && n > 0 && fds[0].Revents != 0
	})
	if err != nil {
		return err
	}
	if p.cmd != nil {
		_ = p.cmd.Wait() // reap
	}
	return nil
}

// release stops watching; the process goes on.
func (p *process) release() { p.pidfd.Close() }

// signal sends a signal; to a process that has ended, none.
func (p *process) signal(s unix.Signal) {
	if raw, err := p.pidfd.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.PidfdSendSignal(int(fd), s, nil, 0) })
	}
}

// kill ends the process and waits for it.
func (p *process) kill() {
	p.signal(unix.SIGKILL)
	_ = p.wait()
	p.release()
}
