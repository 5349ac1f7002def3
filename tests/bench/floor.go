package main

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/sock"
	"github.com/weirmesh/weir/tests/pod"
)

// floorCommand starts the relay that does nothing.
const floorCommand = "floor"

// startFloor starts a relay that parses, chooses, counts and logs nothing: an event loop
// that passes on what it reads. It makes the system calls that no proxy can do without, so
// what it takes is what kernel and capture cost everybody.
func (d *dataplane) startFloor(ctx context.Context, p *pod.Pod, port uint16, to nexts) (int, error) {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "dataplane", floorCommand, netip.AddrPortFrom(netip.IPv4Unspecified(), port).String(), to.requests.String())
	if err := d.startProxy(p, cmd); err != nil {
		return 0, err
	}
	go func() { _ = cmd.Wait() }()
	return cmd.Process.Pid, nil
}

// floor relays until it is killed.
func floor(args []string) error {
	if len(args) != 2 {
		return errors.New("floor LISTEN TO")
	}
	listen, err := netip.ParseAddrPort(args[0])
	if err != nil {
		return err
	}
	to, err := netip.ParseAddrPort(args[1])
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	f := &floorLoop{to: inet4(to), peers: map[int32]int32{}}
	if f.listener, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
		return err
	}
	if err := errors.Join(unix.SetsockoptInt(f.listener, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.Bind(f.listener, inet4(listen)), unix.Listen(f.listener, 1024)); err != nil {
		return err
	}
	if f.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return err
	}
	if err := f.watch(f.listener); err != nil {
		return err
	}
	return f.run()
}

func inet4(a netip.AddrPort) *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
}

type floorLoop struct {
	epoll, listener int
	to              unix.Sockaddr
	peers           map[int32]int32 // by descriptor, both ways
	buf             [64 << 10]byte
}

func (f *floorLoop) watch(fd int) error {
	return unix.EpollCtl(f.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})
}

func (f *floorLoop) run() error {
	var events [256]unix.EpollEvent
	for {
		// Raw: the runtime need not know that the thread waits.
		n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(f.epoll), uintptr(unsafe.Pointer(&events[0])), uintptr(len(events)), ^uintptr(0), 0, 0)
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return os.NewSyscallError("epoll_pwait", errno)
		}
		for _, e := range events[:n] {
			if int(e.Fd) == f.listener {
				if err := f.accept(); err != nil {
					return err
				}
				continue
			}
			f.pass(e.Fd)
		}
	}
}

// accept makes a pair: each client has an upstream connection of its own.
func (f *floorLoop) accept() error {
	client, _, err := unix.Accept4(f.listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("accept4", err)
	}
	upstream, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	if err := unix.Connect(upstream, f.to); err != nil { // it is not up yet
		unix.Close(upstream)
		return unix.Close(client)
	}
	for _, fd := range []int{client, upstream} {
		if err := errors.Join(unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1), unix.SetNonblock(fd, true), f.watch(fd)); err != nil {
			return err
		}
	}
	f.peers[int32(client)], f.peers[int32(upstream)] = int32(upstream), int32(client)
	return nil
}

// pass passes on what has come. Heads and answers fit into any socket's buffer.
func (f *floorLoop) pass(fd int32) {
	peer, ok := f.peers[fd]
	if !ok {
		return // it was closed in this round
	}
	n, err := sock.Read(uintptr(fd), f.buf[:])
	if err == nil && n > 0 {
		_, err = sock.Write(uintptr(peer), f.buf[:n])
	}
	if n == 0 && err == nil || err != nil && !errors.Is(err, unix.EAGAIN) {
		delete(f.peers, fd)
		delete(f.peers, peer)
		unix.Close(int(fd))
		unix.Close(int(peer))
	}
}
