// Package jail starts a proxy and locks it in.
//
// The agent starts weir-proxy as root inside the pod's network namespace, in new
// PID and mount namespaces. Enter, the first stage, is told by one packet what to
// become: it joins its cgroups, opens the listeners there (a socket keeps the
// cgroup it was created in), hands copies of them to the agent, leaves the file
// system for an empty read-only one, gives up every privilege (but CAP_NET_RAW
// where callers' addresses are kept) and executes the same program again by
// descriptor. Confine, at the start of the second stage,
// makes the process non-dumpable and installs the seccomp filter. From then on
// it can serve the sockets it has, dial TCP, and little else.
//
// Between the stages everything travels in the argument list (Args, ParseArgs),
// which also says in ps which pod a proxy is for.
//
// What the listeners are then used for is none of this package's business, nor
// is the proxy's configuration.
package jail

import (
	"fmt"
	"math"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/agent/proxypb"
)

// Enter is the first stage. It returns only if it did not succeed; launch and
// control are descriptors of the launch socket and the control listener.
func Enter(launch, control int) error {
	// Credentials and no_new_privs belong to a thread; the one that executes the
	// second stage is the one that counts, the others end there.
	runtime.LockOSThread()
	if err := unix.SetNonblock(launch, false); err != nil {
		return fmt.Errorf("launch socket: %w", err)
	}
	msg, inherited, err := receiveLaunch(launch)
	if err != nil {
		return err
	}
	identity := -1
	if msg.GetIdentity() {
		last := len(inherited) - 1
		identity, inherited = inherited[last], inherited[:last]
	}
	for _, file := range msg.GetCgroupFiles() {
		if err := joinCgroup(file); err != nil {
			return err
		}
	}
	exe, err := unix.Open("/proc/self/exe", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open this program: %w", err)
	}
	listeners, err := openListeners(msg.GetListeners(), inherited)
	if err != nil {
		return err
	}
	if err := SendListening(launch, listeners); err != nil {
		return err
	}
	if err := leaveFilesystem(); err != nil {
		return err
	}
	keep := uint32(0)
	if msg.GetKeepNetRaw() {
		keep = capNetRaw
	}
	if err := dropPrivileges(int(msg.GetUid()), int(msg.GetGid()), keep); err != nil {
		return err
	}
	fds := append(descriptors(listeners), launch, control)
	if identity >= 0 {
		fds = append(fds, identity)
	}
	if err := keepOnly(fds); err != nil {
		return err
	}
	return execute(exe, Args(msg, listeners, identity), environment(os.Environ()))
}

// joinCgroup moves this thread, the only one that there will be after the next
// execution. By a v1 "tasks" file that is all it does; to move a whole process
// ("cgroup.procs"), or another thread than the one that asks, takes a lock whose
// first taker waits for an RCU grace period, 10 ms and more (Linux since 5.5).
func joinCgroup(file string) error {
	fd, err := unix.Open(file, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		_, err = unix.Write(fd, []byte("0"))
		unix.Close(fd)
	}
	if err != nil {
		return fmt.Errorf("join cgroup %s: %w", file, err)
	}
	return nil
}

// openListeners opens those that are not inherited. Optional ones that cannot be
// opened are left out.
func openListeners(list []*proxypb.Listener, inherited []int) ([]Listener, error) {
	var open []Listener
	for _, l := range list {
		if l.GetInherited() {
			open = append(open, Listener{Listener: l, FD: inherited[0]})
			inherited = inherited[1:]
			continue
		}
		fd, err := openListener(l)
		switch {
		case err == nil:
			open = append(open, Listener{Listener: l, FD: fd})
		case !l.GetOptional():
			return nil, fmt.Errorf("listen on %s %s: %w", l.GetNetwork(), l.GetAddress(), err)
		}
	}
	return open, nil
}

// backlog is how many connections may wait while a crashed proxy is replaced;
// net.core.somaxconn, 4096 since Linux 5.4, is the upper bound.
const backlog = 4096

// openListener makes the socket by hand: the net package would ask the kernel for
// MPTCP (5–8 % slower) and register it with the poller.
func openListener(l *proxypb.Listener) (int, error) {
	addr, err := listenAddress(l)
	if err != nil {
		return -1, err
	}
	family, sa := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()})
	if addr.Addr().Is4() {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
	if err != nil {
		return -1, err
	}
	err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err == nil && family == unix.AF_INET6 {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if err == nil {
		err = unix.Bind(fd, sa)
	}
	if err == nil {
		err = unix.Listen(fd, backlog)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func descriptors(listeners []Listener) []int {
	var fds []int
	for _, l := range listeners {
		fds = append(fds, l.FD)
	}
	return fds
}

// keepOnly lets stdio and fds through the next execution, and nothing else, so
// that what the agent may have leaked does not come along.
func keepOnly(fds []int) error {
	err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC)
	// Before Linux 5.11 there is no such call or flag; all of ours are marked.
	if err != nil && err != unix.ENOSYS && err != unix.EINVAL {
		return fmt.Errorf("close_range: %w", err)
	}
	for _, fd := range fds {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0); err != nil {
			return fmt.Errorf("keep descriptor %d: %w", fd, err)
		}
	}
	return nil
}

// execute is execveat(2) by descriptor: there is no path and no /proc any more.
func execute(fd int, argv, env []string) error {
	path, err := unix.BytePtrFromString("")
	if err != nil {
		return err
	}
	argvp, err := pointers(argv)
	if err != nil {
		return err
	}
	envp, err := pointers(env)
	if err != nil {
		return err
	}
	_, _, errno := unix.Syscall6(unix.SYS_EXECVEAT, uintptr(fd), uintptr(unsafe.Pointer(path)),
		uintptr(unsafe.Pointer(&argvp[0])), uintptr(unsafe.Pointer(&envp[0])), unix.AT_EMPTY_PATH, 0)
	return fmt.Errorf("execute the second stage: %w", errno)
}

// pointers is a NULL-terminated list of C strings.
func pointers(list []string) ([]*byte, error) {
	out := make([]*byte, len(list)+1)
	for i, s := range list {
		p, err := unix.BytePtrFromString(s)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", s, err)
		}
		out[i] = p
	}
	return out, nil
}
