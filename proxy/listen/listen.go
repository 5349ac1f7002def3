// Package listen accepts what the pod's rules turn aside, and finds out where it
// was going. A Listener wraps a socket that an earlier life of this proxy may
// have opened; closing it leaves the socket to the others that hold it.
//
// What happens with a connection is package relay's business.
package listen

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/poll"
	"github.com/weirmesh/weir/proxy/sock"
	"github.com/weirmesh/weir/proxy/upstream"
)

// Direction is which way a connection crosses the pod's border.
type Direction uint8

// The directions, which are the listeners' names too.
const (
	Outbound Direction = iota + 1 // the pod's application called
	Inbound                       // the pod's application was called
)

// String is the listener's name.
func (d Direction) String() string {
	switch d {
	case Outbound:
		return "outbound"
	case Inbound:
		return "inbound"
	}
	return fmt.Sprintf("direction(%d)", uint8(d))
}

// ParseDirection reads a listener's name.
func ParseDirection(name string) (Direction, error) {
	for _, d := range []Direction{Outbound, Inbound} {
		if d.String() == name {
			return d, nil
		}
	}
	return 0, fmt.Errorf("%q is no listener's name", name)
}

// Conn is an accepted connection.
type Conn struct {
	*net.TCPConn
	Direction Direction
	Peer      netip.AddrPort
	Original  netip.AddrPort // where it was going
	Direct    bool           // it was not turned aside: somebody dialled this listener
	Mark      int            // of the packet that began it, where the pod's kernel is told to keep that
	Shed      bool           // it is to be reset before another one is accepted: see Accept
	Accepted  time.Time

	// Identity is who the peer of an inbound connection has shown to be by its
	// certificate, and ID the same as it stands there. The zero value is nobody's: a peer in
	// plaintext.
	Identity  authz.Identity
	ID        string
	Handshake time.Duration // that it took, or took to fail; 0: there was none
}

// Listener is one listening socket.
type Listener struct {
	Direction Direction

	tcp   *net.TCPListener
	short time.Time // since when descriptors have run out; zero: there are some
	spare spare
}

// New wraps a copy of the listening socket fd.
func New(d Direction, fd int) (*Listener, error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("listener %s: %w", d, err)
	}
	f := os.NewFile(uintptr(dup), d.String())
	defer f.Close()
	if d == Outbound {
		sock.StaysHere(uintptr(dup))
	}
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("listener %s: %w", d, err)
	}
	tcp, ok := l.(*net.TCPListener)
	if !ok {
		l.Close()
		return nil, fmt.Errorf("listener %s: %T is not TCP", d, l)
	}
	poll.Waited(tcp)
	out := &Listener{Direction: d, tcp: tcp}
	out.spare.keep(tcp)
	return out, nil
}

// Addr is where it listens.
func (l *Listener) Addr() netip.AddrPort { return unmap(l.tcp.Addr()) }

// Close stops accepting. Connections in the backlog stay there as long as
// somebody else holds the socket.
func (l *Listener) Close() error {
	l.spare.end()
	return l.tcp.Close()
}

// Backoff between attempts to accept when descriptors or memory have run out.
const (
	minBackoff = 5 * time.Millisecond
	maxBackoff = time.Second
)

// patience is how long clients wait for a descriptor.
const patience = time.Second

// Accept returns the next connection, or an error once the listener is closed or
// ctx is done. When descriptors have run out it waits: the clients do, too, in the
// backlog. Once that has lasted for patience it takes them in the place of its spare
// descriptor: what leaves none to spare is to be shed.
func (l *Listener) Accept(ctx context.Context) (Conn, error) {
	backoff := minBackoff
	for {
		tcp, err := l.tcp.AcceptTCP()
		if errors.Is(err, unix.EMFILE) && l.impatient(time.Now()) {
			tcp, err = l.acceptSpare()
		}
		switch {
		case err == nil:
			c, err := l.examine(tcp)
			if c.Shed = !l.spare.keep(l.tcp); !c.Shed {
				l.short = time.Time{}
			}
			if err == nil {
				return c, nil
			}
			tcp.Close() // it is gone already
		case errors.Is(err, unix.ECONNABORTED), errors.Is(err, unix.EINTR):
		case exhausted(err):
			l.spare.keep(l.tcp)
			select {
			case <-ctx.Done():
				return Conn{}, ctx.Err()
			case <-time.After(backoff):
			}
			backoff = min(2*backoff, maxBackoff)
		default:
			return Conn{}, fmt.Errorf("listener %s: %w", l.Direction, err)
		}
	}
}

// impatient reports whether descriptors have been short for long.
func (l *Listener) impatient(now time.Time) bool {
	if l.short.IsZero() {
		l.short = now
	}
	return now.Sub(l.short) >= patience
}

// acceptSpare accepts in the place of the spare descriptor. Without one, and with
// nobody there, it is EMFILE: that is what accept(2) says before it looks who is there.
func (l *Listener) acceptSpare() (*net.TCPConn, error) {
	if !l.spare.release() {
		return nil, unix.EMFILE
	}
	_ = l.tcp.SetDeadline(time.Now().Add(minBackoff))
	tcp, err := l.tcp.AcceptTCP()
	_ = l.tcp.SetDeadline(time.Time{})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = unix.EMFILE
	}
	return tcp, err
}

func exhausted(err error) bool {
	return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) ||
		errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.ENOMEM)
}

func (l *Listener) examine(tcp *net.TCPConn) (Conn, error) {
	poll.Waited(tcp)
	c := Conn{TCPConn: tcp, Direction: l.Direction, Peer: unmap(tcp.RemoteAddr()), Accepted: time.Now()}
	local := unmap(tcp.LocalAddr())
	var err error
	c.Original, err = originalDestination(tcp, local.Addr().Is4())
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOPROTOOPT), err == nil && c.Original == local:
		// No conntrack entry, no conntrack, or one without NAT.
		c.Original, c.Direct = local, true
	case err != nil:
		return Conn{}, err
	}
	if err := tcp.SetKeepAliveConfig(upstream.KeepAlive); err != nil {
		return Conn{}, err
	}
	if c.Mark, err = mark(tcp); err != nil {
		return Conn{}, err
	}
	return c, nil
}

// mark reads SO_MARK, which a listener's sockets have from the packet that began
// them if net.ipv4.tcp_fwmark_accept is 1.
func mark(tcp *net.TCPConn) (int, error) {
	raw, err := tcp.SyscallConn()
	if err != nil {
		return 0, err
	}
	var value int
	var failed error
	err = raw.Control(func(fd uintptr) {
		value, failed = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK)
	})
	return value, errors.Join(err, failed)
}

// ip6tOriginalDst is IP6T_SO_ORIGINAL_DST of linux/netfilter_ipv6/ip6_tables.h.
const ip6tOriginalDst = 80

// originalDestination asks conntrack where a redirected connection was going.
func originalDestination(tcp *net.TCPConn, is4 bool) (netip.AddrPort, error) {
	raw, err := tcp.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	var out netip.AddrPort
	var failed error
	err = raw.Control(func(fd uintptr) {
		if is4 {
			// The answer is a sockaddr_in; of the structs that x/sys can fetch,
			// this one is long enough (20 bytes, of which 16 are filled).
			var m *unix.IPv6Mreq
			if m, failed = unix.GetsockoptIPv6Mreq(int(fd), unix.IPPROTO_IP, unix.SO_ORIGINAL_DST); failed == nil {
				b := m.Multiaddr
				out = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[2])<<8|uint16(b[3]))
			}
			return
		}
		// Likewise: an ip6_mtuinfo begins with a sockaddr_in6.
		var m *unix.IPv6MTUInfo
		if m, failed = unix.GetsockoptIPv6MTUInfo(int(fd), unix.IPPROTO_IPV6, ip6tOriginalDst); failed == nil {
			var port [2]byte // in network order, whatever this machine's is
			binary.NativeEndian.PutUint16(port[:], m.Addr.Port)
			out = netip.AddrPortFrom(netip.AddrFrom16(m.Addr.Addr), binary.BigEndian.Uint16(port[:]))
		}
	})
	return out, errors.Join(err, failed)
}

// unmap reads an address of the net package. Zones are dropped: the kernel's
// conntrack knows none.
func unmap(a net.Addr) netip.AddrPort {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := tcp.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}
