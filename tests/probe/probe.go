// Package probe looks for packets that get away from a captured pod. A process in
// the pod floods connections from its first instruction, from source ports that
// only it uses; what arrives somewhere from one of these was not made by the pod's
// proxy.
package probe

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// The source ports, from first to last. They are below the kernel's range for
// sockets that did not choose one, so a proxy's never are among them.
const (
	FirstPort = 20000
	LastPort  = 20039
)

// Connections is how many are started to each address.
const Connections = LastPort - FirstPort + 1

// Uncaptured reports whether a connection from there is the probe's own.
func Uncaptured(from netip.AddrPort) bool {
	return from.Port() >= FirstPort && from.Port() <= LastPort
}

// Flood starts all connections from the calling thread's network namespace,
// without waiting for any, and then counts those that bring a byte within the time
// given. It is made of bare system calls: nothing comes before the first.
func Flood(within time.Duration, addresses ...netip.AddrPort) (int, error) {
	var fds []int
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	for port := FirstPort; port <= LastPort; port++ {
		for _, to := range addresses {
			fd, err := connect(port, to)
			if err != nil {
				return 0, fmt.Errorf("probe: from port %d to %s: %w", port, to, err)
			}
			fds = append(fds, fd)
		}
	}
	answered, deadline := 0, time.Now().Add(within)
	for _, fd := range fds {
		if readable(fd, deadline) {
			answered++
		}
	}
	return answered, nil
}

// connect starts one connection. That it is refused is none of the probe's errors:
// it asks what left, not what came.
func connect(port int, to netip.AddrPort) (int, error) {
	family, from, sa := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: port}),
		unix.Sockaddr(&unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()})
	if to.Addr().Is4() {
		family, from, sa = unix.AF_INET, &unix.SockaddrInet4{Port: port},
			&unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if family == unix.AF_INET6 { // the port is the other family's too
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if err == nil {
		err = unix.Bind(fd, from)
	}
	if err == nil {
		err = unix.Connect(fd, sa)
	}
	if err != nil && !errors.Is(err, unix.EINPROGRESS) && !errors.Is(err, unix.ECONNREFUSED) {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// readable reports whether a byte comes.
func readable(fd int, deadline time.Time) bool {
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		left := max(time.Until(deadline), 0)
		if _, err := unix.Poll(poll, int(left.Milliseconds())); errors.Is(err, unix.EINTR) {
			continue
		}
		n, err := unix.Read(fd, make([]byte, 1))
		return err == nil && n == 1
	}
}
