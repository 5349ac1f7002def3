// Package upstream dials where connections go, and knows its own connections
// again when a broken bypass rule turns them back to the proxy.
//
// Such a loop is recognised by the whole of both addresses: the accepted
// connection's peer and original destination are the local and remote address of
// a socket that is being, or was, dialled here. By port alone one or two of a
// thousand innocent connections would be cut, since conntrack rewrites a reused
// source port now and then onto one that the proxy dials from.
//
// A connection from a caller's address (client.go) may have the addresses of one
// that the caller itself makes later. It is known by its packets' mark as well.
//
// It does not choose where to (balance) and carries no data (relay).
package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/mtls"
	"github.com/weirmesh/weir/proxy/mux"
	"github.com/weirmesh/weir/proxy/poll"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/sock"
)

// Timeout bounds one attempt to connect.
const Timeout = 5 * time.Second

// KeepAlive notices a peer that vanished within 54 s, and keeps conntrack's entry
// of a half-closed connection alive.
var KeepAlive = net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 8 * time.Second, Count: 3}

// Dialer dials, and keeps the addresses of what it dialled. The zero value is
// ready for use.
type Dialer struct {
	Timeout time.Duration // of one attempt; 0: Timeout

	mu    sync.Mutex // held over connect(2), so that Own cannot look in between
	conns map[ends]*Conn
}

type ends struct{ local, remote netip.AddrPort }

// Conn is a connection to an upstream. TCPConn is bare, for splice, which only a
// connection without Secure may have; close the Conn, not the TCPConn.
type Conn struct {
	*net.TCPConn
	Local, Remote netip.AddrPort
	// Secure is what its bytes go through, in place of the TCPConn; nil: they go as they
	// are. Trust is the number of the roots under which it was made. Set them before
	// anybody else has the Conn.
	Secure    *mtls.Conn
	Handshake time.Duration // Secure's
	Trust     uint64
	// Stream is the one that this is, of those that Secure carries; nil: it is the whole
	// connection.
	Stream *mux.Stream
	// OnClose is called once, when it is closed; nil: nobody is interested. Set it
	// before anybody else has the Conn.
	OnClose func()

	dialer *Dialer
	client netip.Addr // the caller's address that it is made from; zero: the pod's own
	looped atomic.Bool
	closed sync.Once
}

// Of is one of the streams that the connection carries.
func (c *Conn) Of(stream *mux.Stream) *Conn {
	return &Conn{TCPConn: c.TCPConn, Local: c.Local, Remote: c.Remote, Secure: c.Secure, Trust: c.Trust, Stream: stream}
}

// Close closes the connection and forgets its addresses; of a stream only that.
func (c *Conn) Close() error {
	var err error
	c.closed.Do(func() {
		if c.Stream != nil {
			err = c.Stream.Close()
		} else {
			err = c.TCPConn.Close()
			c.dialer.forget(c)
		}
		if c.OnClose != nil {
			c.OnClose()
		}
	})
	return err
}

// Looped reports that the connection led back to this proxy.
func (c *Conn) Looped() bool { return c.looped.Load() }

// Own reports whether an accepted connection is one that this proxy dialled, and
// if so, resets the dialling end. mark is that of the accepted connection.
func (d *Dialer) Own(peer, original netip.AddrPort, mark int) bool {
	d.mu.Lock()
	c := d.conns[ends{peer, original}]
	d.mu.Unlock()
	if c == nil || c.client.IsValid() && mark != ClientMark {
		return false
	}
	c.looped.Store(true)
	_ = c.SetLinger(0)
	// Its owner, woken by this, closes it.
	_ = c.SetDeadline(time.Unix(1, 0))
	return true
}

func (d *Dialer) forget(c *Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if key := (ends{c.Local, c.Remote}); d.conns[key] == c {
		delete(d.conns, key)
	}
}

// Dial connects to addr. Errors are *reason.Error: connect_refused,
// connect_timeout, upstream_closed when it was reset as soon as it was accepted,
// connect_failed, or overload when descriptors or local ports
// have run out. Several attempts are the caller's business.
func (d *Dialer) Dial(ctx context.Context, addr netip.AddrPort) (*Conn, error) {
	return d.dial(ctx, netip.Addr{}, addr, false)
}

func (d *Dialer) dial(ctx context.Context, client netip.Addr, addr netip.AddrPort, local bool) (*Conn, error) {
	tcp, err := newSocket(addr.Addr(), client, local)
	if err != nil {
		return nil, dialError(addr, err)
	}
	c := &Conn{TCPConn: tcp, Remote: addr, dialer: d, client: client}
	err = d.connect(ctx, c)
	if err != nil {
		c.Close()
		return nil, dialError(addr, err)
	}
	return c, nil
}

// newSocket makes a socket that is not connected yet, in the shape in which
// splice and the poller want it: a bare *net.TCPConn. Not MPTCP, which is 5–8 %
// slower. It is bound to client, if there is one. local: it is for the pod's own
// application.
func newSocket(addr, client netip.Addr, local bool) (*net.TCPConn, error) {
	family := unix.AF_INET6
	if addr.Is4() {
		family = unix.AF_INET
	}
	// Blocking, so that os.NewFile does not register it; FileConn's copy is
	// registered and makes it non-blocking.
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "upstream")
	defer f.Close()
	if local {
		sock.StaysHere(uintptr(fd))
	}
	if client.IsValid() {
		if err := bindTo(fd, client); err != nil {
			return nil, err
		}
	}
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	tcp := conn.(*net.TCPConn)
	if err := tcp.SetKeepAliveConfig(KeepAlive); err != nil {
		tcp.Close()
		return nil, err
	}
	poll.Waited(tcp)
	return tcp, nil
}

func (d *Dialer) connect(ctx context.Context, c *Conn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	if err := d.begin(raw, c); err != nil {
		return err
	}
	timeout := d.Timeout
	if timeout == 0 {
		timeout = Timeout
	}
	if err := c.SetWriteDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetWriteDeadline(time.Unix(1, 0)) })
	var failed error
	err = raw.Write(func(fd uintptr) bool {
		var done bool
		done, failed = connected(int(fd))
		return done
	})
	if !stop() && ctx.Err() != nil {
		return ctx.Err()
	}
	if c.Looped() {
		// Own has seen the other end of it, so it is connected; err may be the
		// deadline that Own has set, which stays.
		return nil
	}
	if err != nil {
		return err
	}
	if failed != nil {
		return failed
	}
	return c.SetWriteDeadline(time.Time{})
}

// begin sends the SYN and notes the socket's addresses. Over loopback, or a
// redirect, the handshake is complete when connect returns: another goroutine
// could have accepted it, hence the lock.
func (d *Dialer) begin(raw interface{ Control(func(uintptr)) error }, c *Conn) error {
	var failed error
	err := raw.Control(func(fd uintptr) {
		d.mu.Lock()
		defer d.mu.Unlock()
		err := unix.Connect(int(fd), sockaddr(c.Remote))
		if err != nil && err != unix.EINPROGRESS && err != unix.EINTR {
			failed = os.NewSyscallError("connect", err)
			return
		}
		sa, err := unix.Getsockname(int(fd))
		if err != nil {
			failed = os.NewSyscallError("getsockname", err)
			return
		}
		c.Local = addrPort(sa)
		if d.conns == nil {
			d.conns = map[ends]*Conn{}
		}
		d.conns[ends{c.Local, c.Remote}] = c
	})
	return errors.Join(err, failed)
}

// connected reports whether connecting is over, and how it ended.
func connected(fd int) (bool, error) {
	errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return true, os.NewSyscallError("getsockopt", err)
	}
	if errno != 0 {
		return true, os.NewSyscallError("connect", unix.Errno(errno))
	}
	// The poller may wake us early: a fresh socket counts as hung up.
	_, err = unix.Getpeername(fd)
	return err == nil, nil
}

func dialError(addr netip.AddrPort, err error) error {
	r := reason.ConnectFailed
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		r = reason.ConnectRefused
	case errors.Is(err, unix.ECONNRESET):
		// A reset before the handshake reads as ECONNREFUSED: it had connected.
		r = reason.UpstreamClosed
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, unix.ETIMEDOUT):
		r = reason.ConnectTimeout
	case errors.Is(err, context.Canceled):
		r = reason.Shutdown
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOBUFS),
		errors.Is(err, unix.ENOMEM), errors.Is(err, unix.EADDRNOTAVAIL):
		r = reason.Overload
	}
	return &reason.Error{Reason: r, Err: fmt.Errorf("dial %s: %w", addr, err)}
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}
