// Package control is the proxy's side of its talk with the agent. It serves
// proxypb.Control on the inherited control socket, so the agent may come and go:
// config comes down the session's stream into the Store, what has yet to be asked
// goes up, and so do metrics; access log records are left in the journal.
//
// A connection whose first byte is 'L' instead of HTTP/2's 'P' is given copies of
// the traffic listeners and closed: an agent that was restarted gets its copies
// back. So is one that begins with 'I', which gets the memory file of the pod's
// identity, or with 'J', which gets that of the journal. Who may connect is decided by
// the socket's folder, not here.
//
// The Store answers where a connection goes; it does not pick endpoints and does
// not dial.
package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/weirmesh/weir/agent/journal"
	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/poll"
	"github.com/weirmesh/weir/proxy/sock"
	"github.com/weirmesh/weir/proxy/telemetry"
)

// peekTimeout is how long a connection may take to say what it is.
const peekTimeout = 2 * time.Second

// Server serves the control socket. All fields are needed, but for Draining.
type Server struct {
	Store   *Store
	Journal *journal.Writer
	Meter   *telemetry.Meter
	Version string // of this program, for the agent
	// Handover writes the listeners to a connection that asked for them, Identity the
	// memory file of the identity, Records that of the journal.
	Handover, Identity, Records func(fd int) error
	// Draining is closed when the proxy takes no new connections any more.
	Draining <-chan struct{}
}

// stopTimeout is how long an agent that does not read may delay the end.
const stopTimeout = time.Second

// Serve takes agents from the listening unix socket fd, of which it uses a copy,
// until ctx is done.
func (s *Server) Serve(ctx context.Context, fd int) error {
	l, err := fileListener(fd)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	rpc := grpc.NewServer(
		// One agent, small messages, now and then: no buffers kept for them.
		grpc.ReadBufferSize(0), grpc.WriteBufferSize(4<<10),
		grpc.MaxConcurrentStreams(8), grpc.ConnectionTimeout(peekTimeout),
		grpc.WaitForHandlers(true),
	)
	proxypb.RegisterControlServer(rpc, &service{store: s.Store, identity: s.Store.identity, journal: s.Journal, meter: s.Meter, version: s.Version, draining: s.Draining, done: ctx.Done()})
	agents := &agents{ctx: ctx, addr: l.Addr(), conns: make(chan net.Conn)}
	served := make(chan error, 1)
	go serveRPC(rpc, agents, served)

	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var peeks sync.WaitGroup
	err = s.accept(ctx, l, agents, &peeks)
	cancel()
	l.Close()
	// Sessions end by themselves now, and what they said is written out first.
	late := time.AfterFunc(stopTimeout, rpc.Stop)
	rpc.GracefulStop()
	late.Stop()
	peeks.Wait()
	<-served
	return err
}

func serveRPC(rpc *grpc.Server, l net.Listener, served chan<- error) {
	served <- rpc.Serve(l)
}

func fileListener(fd int) (*net.UnixListener, error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	f := os.NewFile(uintptr(dup), "control")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		l.Close()
		return nil, fmt.Errorf("control socket: %T is not a unix socket", l)
	}
	u.SetUnlinkOnClose(false) // the path is the agent's
	return u, nil
}

func (s *Server) accept(ctx context.Context, l *net.UnixListener, agents *agents, peeks *sync.WaitGroup) error {
	for {
		conn, err := l.AcceptUnix()
		switch {
		case err == nil:
			poll.Waited(conn)
			peeks.Add(1)
			go s.greet(conn, agents, peeks)
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ECONNABORTED):
			// Traffic has used up the descriptors; the agent tries again as well.
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(100 * time.Millisecond):
			}
		default:
			return fmt.Errorf("control socket: %w", err)
		}
	}
}

// greet finds out what a new connection is for.
func (s *Server) greet(conn *net.UnixConn, agents *agents, done *sync.WaitGroup) {
	defer done.Done()
	raw, err := conn.SyscallConn()
	if err != nil {
		conn.Close()
		return
	}
	_ = conn.SetReadDeadline(time.Now().Add(peekTimeout))
	var first [1]byte
	n := 0
	err = raw.Read(func(fd uintptr) bool {
		n, _, _ = unix.Recvfrom(int(fd), first[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return n >= 0
	})
	_ = conn.SetReadDeadline(time.Time{})
	switch kindOf(first[:max(n, 0)]) {
	case forRPC:
		if err == nil && agents.deliver(conn) {
			return
		}
	case forListeners:
		hand(conn, s.Handover)
	case forIdentity:
		hand(conn, s.Identity)
	case forJournal:
		hand(conn, s.Records)
	}
	conn.Close()
}

// hand writes what a connection asked for by one byte.
func hand(conn *net.UnixConn, write func(fd int) error) {
	// An unread byte would make the close a reset.
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		return
	}
	if raw, err := conn.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = write(int(fd)) })
	}
}

// kind is what a control connection is for.
type kind uint8

const (
	forNothing kind = iota
	forRPC
	forListeners
	forIdentity
	forJournal
)

// kindOf decides by the first byte.
func kindOf(first []byte) kind {
	if len(first) == 0 {
		return forNothing
	}
	switch first[0] {
	case 'P': // PRI * HTTP/2.0, RFC 9113 section 3.4
		return forRPC
	case 'L':
		return forListeners
	case 'I':
		return forIdentity
	case 'J':
		return forJournal
	}
	return forNothing
}

// agents is the net.Listener that gRPC sees.
type agents struct {
	ctx   context.Context
	addr  net.Addr
	conns chan net.Conn
}

func (a *agents) deliver(conn *net.UnixConn) bool {
	// The runtime's monitor is not to look about because of each message.
	quiet, err := sock.NewConn(conn)
	if err != nil {
		return false
	}
	select {
	case a.conns <- quiet:
		return true
	case <-a.ctx.Done():
		return false
	}
}

func (a *agents) Accept() (net.Conn, error) {
	select {
	case conn := <-a.conns:
		return conn, nil
	case <-a.ctx.Done():
		return nil, net.ErrClosed
	}
}

func (a *agents) Close() error   { return nil }
func (a *agents) Addr() net.Addr { return a.addr }
