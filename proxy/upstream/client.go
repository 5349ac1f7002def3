package upstream

import (
	"context"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// ClientMark is the mark that the pod's rules give to packets which this proxy
// sends from an address that is not the pod's. Package capture of the plugin,
// which makes those rules, calls it by the same name.
const ClientMark = 0x711

// DialLocal is Dial to the pod's own application, from the address of a caller, so that
// the application sees who calls. That needs CAP_NET_RAW, and the pod's rules and routes to
// be made for it; the zero Addr is the pod's own.
//
// The port is one that connect(2) chooses, not the caller's own. A port that is
// bound by its number is taken from connect(2) for every destination, as long as
// the connection lasts and a minute more: some 28,000 callers' ports would leave
// the pod's own connections without any. And it may be any port, one on which the
// application means to listen next among them. Chosen by connect, there are 28,000
// for each caller and port of the application, shared with everything else.
func (d *Dialer) DialLocal(ctx context.Context, client netip.Addr, addr netip.AddrPort) (*Conn, error) {
	return d.dial(ctx, client, addr, true)
}

// bindTo binds a socket to an address that need not be this host's, without a port.
func bindTo(fd int, client netip.Addr) error {
	level, transparent := unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT
	if client.Is4() {
		level, transparent = unix.IPPROTO_IP, unix.IP_TRANSPARENT
	}
	if err := unix.SetsockoptInt(fd, level, transparent, 1); err != nil {
		return os.NewSyscallError("setsockopt transparent", err)
	}
	// The option of both families.
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
		return os.NewSyscallError("setsockopt bind_address_no_port", err)
	}
	return os.NewSyscallError("bind", unix.Bind(fd, sockaddr(netip.AddrPortFrom(client, 0))))
}
