package launch

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// probeClient calls in the test of callers' addresses: nobody, of TEST-NET-3.
var probeClient = netip.MustParseAddr("203.0.113.9")

// probeTimeout is how long the test waits for a connection inside the scratch
// namespace. Without what it tests, a connection hangs.
const probeTimeout = 3 * time.Second

// testClient shows that a connection in the thread's namespace, which has the
// rules, may come from an address that is nobody's there.
func (m *Manager) testClient(ctx context.Context, cgroup string) error {
	l, err := net.Listen("tcp4", netip.AddrPortFrom(probeAddr.Addr().Prev(), 0).String())
	if err != nil {
		return err
	}
	defer l.Close() // nobody need accept: the kernel shakes hands
	if err := m.dialInCgroup(ctx, cgroup, l.Addr().String(), probeClient.String()); err != nil {
		return fmt.Errorf("from a caller's address: %w", err)
	}
	return nil
}

// RunDial is DialCommand: ADDRESS:PORT to dial, and perhaps an address to do it
// from (unspecified: any), in which case it waits until it is connected.
func RunDial(args []string) error {
	addr, err := netip.ParseAddrPort(args[0])
	switch {
	case err != nil:
		return err
	case len(args) == 1:
		return Dial(addr)
	}
	client, err := netip.ParseAddr(args[1])
	if err != nil {
		return err
	}
	return dialAs(client, addr)
}

// dialAs connects as a proxy does that keeps its callers' addresses. Those of
// IPv6 it cannot keep.
func dialAs(client netip.Addr, addr netip.AddrPort) error {
	family, to := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()})
	if addr.Addr().Is4() {
		family, to = unix.AF_INET, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	timeout := unix.NsecToTimeval(probeTimeout.Nanoseconds())
	err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout)
	if err == nil && !client.IsUnspecified() {
		err = errors.Join(
			unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1),
			unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1),
			unix.Bind(fd, &unix.SockaddrInet4{Addr: client.As4()}),
		)
	}
	if err != nil {
		return err
	}
	if err := unix.Connect(fd, to); err != nil {
		return fmt.Errorf("connect from %s to %s: %w", client, addr, err)
	}
	return nil
}
