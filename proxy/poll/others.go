package poll

import (
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// others is an epoll of what goroutines wait for by the runtime, which has it in an epoll
// of its own that it shows nobody. Nobody looks into this one: a Poller that keeps the
// processor while it waits has it in its own, and hears that it is to give way.
var others = sync.OnceValue(func() int {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return -1 // no Poller keeps the processor
	}
	return fd
})

// Waited says, once for its life, that goroutines wait for a connection or a listener of
// package net: a Poller that keeps the processor gives way as soon as something comes for
// it. For what nobody says so of, that is once the Poller has waited in vain, or when the
// runtime's monitor looks, which is every 10 ms.
func Waited(c syscall.Conn) {
	if raw, err := c.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { waited(int(fd)) })
	}
}

func waited(fd int) {
	event := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET, Fd: int32(fd)}
	_ = unix.EpollCtl(others(), unix.EPOLL_CTL_ADD, fd, &event) // if it fails, that is later
}

func unwaited(fd int) { _ = unix.EpollCtl(others(), unix.EPOLL_CTL_DEL, fd, nil) }
