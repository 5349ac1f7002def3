// Package relay carries connections from the listeners to where they belong.
//
// An outbound connection waits until the proxy knows what its original
// destination is; a Service's goes to one of the endpoints, anything else to
// where it was going. An inbound one goes to where it was going, which is the
// pod's own application. Then bytes move both ways inside the kernel (splice),
// and each end sees of the other what it would see without a proxy: data, its
// end, a reset, an urgent byte. A connection that cannot be made is a reset.
//
// Every connection leaves one access log record; one that comes back to its own
// pod is handed over here and leaves two. What a destination is comes from
// package control; nothing here parses a byte of what is carried.
package relay

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/balance"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/route"
	"github.com/weirmesh/weir/proxy/upstream"
)

// maxAttempts is how many endpoints of a Service are tried. Only connecting is
// tried again, so nothing is ever sent twice.
const maxAttempts = 3

// Config is what the proxy must know before it serves a connection. Errors are
// *reason.Error and bounded in time.
type Config interface {
	// Ready returns once the pod's own config is there.
	Ready(context.Context) error
	// Own reports whether an address is the pod's.
	Own(netip.Addr) bool
	// Destination says what an original destination stands for.
	Destination(context.Context, netip.AddrPort) (route.Destination, error)
}

// Server relays connections. Config and Log are needed.
type Server struct {
	Config         Config
	Log            func(*proxypb.AccessLog)
	Drain          time.Duration // how long connections may go on once Serve is to end
	MaxConnections int           // at a time, more are reset; 0: no limit
	KeepClient     bool          // the application sees its callers' addresses

	dialer   upstream.Dialer
	balancer balance.Balancer
	pipes    pipes

	mu       sync.Mutex
	open     int
	pairs    map[*pair]struct{}
	handlers sync.WaitGroup
}

// Serve takes connections from the listeners until ctx is done; then it closes
// them, lets open connections end for at most Drain, resets the rest and returns.
// An error of a listener ends it in the same way and is returned.
func (s *Server) Serve(ctx context.Context, listeners []*listen.Listener) error {
	defer s.pipes.close()
	accepting, stop := context.WithCancel(ctx)
	defer stop()
	// Handlers outlive ctx by the drain time.
	handling, abort := context.WithCancel(context.WithoutCancel(ctx))
	defer abort()

	failures := make(chan error, len(listeners))
	for _, l := range listeners {
		go s.accept(accepting, handling, l, failures)
	}
	var failed error
	running := len(listeners)
	select {
	case <-ctx.Done():
	case failed = <-failures:
		running--
	}
	stop()
	for _, l := range listeners {
		l.Close()
	}
	for range running {
		<-failures
	}

	idle := make(chan struct{})
	go s.waitIdle(idle)
	drained := time.NewTimer(s.Drain)
	defer drained.Stop()
	select {
	case <-idle:
	case <-drained.C:
		abort()
		s.abortAll()
		<-idle
	}
	return failed
}

func (s *Server) waitIdle(idle chan<- struct{}) {
	s.handlers.Wait()
	close(idle)
}

// accept is the loop of one listener. It ends with nil when ctx is done.
func (s *Server) accept(ctx, handling context.Context, l *listen.Listener, ended chan<- error) {
	for {
		c, err := l.Accept(ctx)
		if err != nil {
			if ctx.Err() != nil {
				err = nil
			}
			ended <- err
			return
		}
		s.handlers.Add(1)
		go s.handle(handling, c)
	}
}

// handle serves one connection from beginning to end.
func (s *Server) handle(ctx context.Context, c listen.Conn) {
	defer s.handlers.Done()
	defer c.Close()
	r := newRecord(c)
	if err := s.serve(ctx, c, r); err != nil {
		r.fail(err)
		// Transparent to refusal: the client sees a reset, not an orderly end.
		_ = c.SetLinger(0)
	}
	for _, entry := range r.entries(time.Now()) {
		s.Log(entry)
	}
}

func (s *Server) serve(ctx context.Context, c listen.Conn, r *record) error {
	defer s.leave()
	if !s.enter() {
		return &reason.Error{Reason: reason.Overload}
	}
	switch {
	case c.Direct:
		return &reason.Error{Reason: reason.NotRedirected}
	case s.dialer.Own(c.Peer, c.Original, c.Mark):
		return &reason.Error{Reason: reason.Loop}
	}
	if err := s.Config.Ready(ctx); err != nil {
		return err
	}
	up, err := s.connect(ctx, c, r)
	if err != nil {
		return err
	}
	defer s.balancer.Done(r.endpoint.Addr)
	defer up.Close()
	r.connected(time.Now(), up)
	return s.join(c.TCPConn, up, r)
}

// connect decides where c goes and connects to it. The endpoint in r is counted
// by the balancer once connect has succeeded.
func (s *Server) connect(ctx context.Context, c listen.Conn, r *record) (*upstream.Conn, error) {
	var destination route.Destination
	if c.Direction == listen.Outbound {
		var err error
		if destination, err = s.Config.Destination(ctx, c.Original); err != nil {
			return nil, err
		}
	}
	r.decided(time.Now(), destination)
	endpoints, attempts := destination.Endpoints, maxAttempts
	if destination.Service == "" {
		endpoints, attempts = []route.Endpoint{{Addr: c.Original}}, 1
	}
	failed := error(&reason.Error{Reason: reason.NoEndpoints})
	var tried []netip.AddrPort
	for range attempts {
		endpoint, ok := s.balancer.Pick(endpoints, tried)
		if !ok {
			break
		}
		r.attempt(endpoint, destination.Service != "" && s.Config.Own(endpoint.Addr.Addr()))
		up, err := s.dial(ctx, c, endpoint.Addr)
		if err == nil {
			return up, nil
		}
		s.balancer.Done(endpoint.Addr)
		failed = err
		if !another(err) {
			break
		}
		tried = append(tried, endpoint.Addr)
	}
	return nil, failed
}

// dial connects to addr: to the pod's own application from the caller's address,
// if that is to be kept and is another's than the pod's, else from the pod's own.
// A link-local address means nothing without its interface, by which no route
// inside the pod leads to it.
func (s *Server) dial(ctx context.Context, c listen.Conn, addr netip.AddrPort) (*upstream.Conn, error) {
	caller := c.Peer.Addr()
	if s.KeepClient && c.Direction == listen.Inbound && !s.Config.Own(caller) && !caller.IsLinkLocalUnicast() {
		return s.dialer.DialAs(ctx, caller, addr)
	}
	return s.dialer.Dial(ctx, addr)
}

// another reports whether the failure is one of the endpoint, not of this proxy.
func another(err error) bool {
	var e *reason.Error
	return errors.As(err, &e) &&
		(e.Reason == reason.ConnectRefused || e.Reason == reason.ConnectTimeout || e.Reason == reason.ConnectFailed)
}

// join carries the bytes.
func (s *Server) join(client *net.TCPConn, up *upstream.Conn, r *record) error {
	if err := up.SetKeepAliveConfig(upstream.KeepAlive); err != nil {
		return &reason.Error{Reason: reason.UpstreamClosed, Err: err}
	}
	p := &pair{client: client, upstream: up.TCPConn, pipes: &s.pipes}
	s.mu.Lock()
	if s.pairs == nil {
		s.pairs = map[*pair]struct{}{}
	}
	s.pairs[p] = struct{}{}
	s.mu.Unlock()
	sent, received, cause := p.join()
	s.mu.Lock()
	delete(s.pairs, p)
	s.mu.Unlock()
	r.ended(sent, received)
	switch {
	case up.Looped():
		return &reason.Error{Reason: reason.Loop}
	case cause != nil:
		return cause
	}
	return nil
}

func (s *Server) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open++
	return s.MaxConnections == 0 || s.open <= s.MaxConnections
}

func (s *Server) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open--
}

// abortAll resets every connection.
func (s *Server) abortAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for p := range s.pairs {
		p.abort(reason.Shutdown, nil)
	}
}
