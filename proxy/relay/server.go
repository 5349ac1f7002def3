// Package relay carries connections from the listeners to where they belong.
//
// An outbound connection waits until the proxy knows what its original
// destination is. An inbound one goes to where it was going, which is the pod's own
// application. What a connection carries is declared by its port, or told by its
// first bytes (identify.go). What is for the application has to be allowed
// (authorize.go). Requests of HTTP are served one by one (http1.go): each by the route
// it meets (plan.go), at an endpoint of its own; those for one other proxy share a
// connection (streams.go). Of anything else the bytes move both ways (pair.go), inside
// the kernel unless an end is encrypted (copier.go): a Service's connections go to one
// of its endpoints, and each end sees of the other what it would see without a proxy:
// data, its end, a reset, an urgent byte; what cannot be connected is a reset.
//
// Every request leaves one access log record, and every connection that carried
// none; what comes back to its own pod is handed over here and leaves two. What a
// destination is comes from package control.
package relay

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/balance"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/mtls"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/route"
	"github.com/weirmesh/weir/proxy/telemetry"
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
	// Peers is what the application's port demands of its callers.
	Peers(port uint16) route.PeerMode
	// Probes are what the kubelet may ask of the application, whatever is demanded of
	// others.
	Probes() route.Probes
	// Opaque reports whether what goes to a port is not to be looked into.
	Opaque(port uint16) bool
	// Inbound is the policy that holds for callers of the application's port; nil: none.
	Inbound(port uint16) *route.Policy
	// Authorization are the policies that govern the pod; nil: none.
	Authorization() *authz.Set
	// Known is Destination where that need not be waited for.
	Known(netip.AddrPort) (route.Destination, bool)
	// Destination says what an original destination stands for.
	Destination(context.Context, netip.AddrPort) (route.Destination, error)
}

// Log takes the record of a request, or of a connection that is passed on as it is. It
// may not keep it.
type Log func(*telemetry.Record)

// Server relays connections. Config and Log are needed.
type Server struct {
	Config         Config
	Log            Log
	Drain          time.Duration // how long connections may go on once Serve is to end
	MaxConnections int           // at a time, more are reset; 0: no limit
	KeepClient     bool          // the application sees its callers' addresses

	// Head is how long a request's head may take, from its first byte on; 0: 30 s.
	Head time.Duration

	// TLS shakes hands with other proxies; nil: this one has no identity, and nobody's is
	// known. Hello is how long an inbound client may be silent before it is taken for a
	// plain one; 0: 30 ms.
	TLS   *mtls.Handshaker
	Hello time.Duration

	// Begun is told of each request that goes to an endpoint, and again when it goes to
	// another one, and of each connection that is passed on as it is; nil: nobody is.
	Begun Log
	// Failed is told of each attempt at an endpoint, the one that the record names, that
	// failed before anything was sent to it; nil: nobody is.
	Failed func(*telemetry.Record, reason.Reason)
	// Ejected is the Balancer's.
	Ejected func(backend *route.Backend, addr netip.AddrPort, how time.Duration)

	dialer   upstream.Dialer
	balancer balance.Balancer
	pipes    pipes
	pollers  pollers
	pool     upstream.Pool[*httpUpstream]
	streams  http2Clients
	sessions sessions
	lines    lines
	draining atomic.Bool
	mirrors  atomic.Int32 // under way

	mu       sync.Mutex
	open     int
	carriers map[carrier]struct{}
	handlers sync.WaitGroup
}

// carrier is a connection that is being carried.
type carrier interface {
	// abort ends it at once; the first reason counts.
	abort(reason.Reason, error)
	// drain has it end soon if nothing is lost by that.
	drain()
	// recheck ends what is not allowed any more, and what goes on with a peer that is not
	// believed any more.
	recheck(*mtls.Review)
}

// Serve takes connections from the listeners until ctx is done; then it closes
// them, lets open connections end for at most Drain, resets the rest and returns.
// An error of a listener ends it in the same way and is returned.
func (s *Server) Serve(ctx context.Context, listeners []*listen.Listener) error {
	s.balancer.Ejected = s.Ejected
	defer s.pipes.close()
	defer s.pollers.close()
	defer s.pool.Close()
	defer s.streams.close()
	defer s.sessions.close()
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
	s.drain()
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
		if c.Shed {
			s.handle(handling, c)
			continue
		}
		go s.handle(handling, c)
	}
}

// errDescriptors is why a connection was accepted only to be shed.
var errDescriptors = errors.New("the proxy has no descriptor left")

// handle serves one connection from beginning to end.
func (s *Server) handle(ctx context.Context, c listen.Conn) {
	defer s.handlers.Done()
	defer c.Close()
	r := records.Get().(*record)
	defer records.Put(r)
	r.reset(c)
	requests, err := s.serve(ctx, c, r)
	s.settle(c, r, requests, err)
}

// settle decides how a connection is to be closed, and leaves its record unless its
// requests have left theirs.
func (s *Server) settle(c interface{ SetLinger(int) error }, r *record, requests int, err error) {
	if err != nil {
		r.fail(err)
		// Transparent to refusal: the client sees a reset, not an orderly end.
		_ = c.SetLinger(0)
	}
	if requests == 0 || err != nil {
		s.log(r)
	}
}

// log passes on what is known of a connection, or a request, that ended now.
func (s *Server) log(r *record) {
	for _, entry := range r.entries(time.Now()) {
		s.Log(entry)
	}
}

// serve returns how many requests it has logged.
func (s *Server) serve(ctx context.Context, c listen.Conn, r *record) (int, error) {
	defer s.leave()
	if !s.enter() {
		return 0, &reason.Error{Reason: reason.Overload}
	}
	switch {
	case c.Shed:
		return 0, &reason.Error{Reason: reason.Overload, Err: errDescriptors}
	case c.Direct:
		return 0, &reason.Error{Reason: reason.NotRedirected}
	case s.dialer.Own(c.Peer, c.Original, c.Mark):
		return 0, &reason.Error{Reason: reason.Loop}
	}
	if err := s.Config.Ready(ctx); err != nil {
		return 0, err
	}
	destination, err := s.destination(ctx, c)
	if err != nil {
		return 0, err
	}
	r.decided(r.now(), destination)
	client, err := newConn(c.TCPConn)
	if err != nil {
		return 0, &reason.Error{Reason: reason.ClientGone, Err: err}
	}
	defer client.drop()
	if c.Direction == listen.Inbound {
		err := s.meet(ctx, &c, client)
		r.met(c)
		switch {
		case errors.Is(err, errConnected):
			return 0, nil
		case err != nil:
			return 0, err
		}
	}
	return s.identify(ctx, c, client, destination, r)
}

// relay carries c as it is, with what was read of it already. up, if not nil, is
// the connection to carry it to, and picked what the balancer counts of it.
func (s *Server) relay(ctx context.Context, c listen.Conn, client *conn, d route.Destination, up *upstream.Conn, picked pick, r *record) error {
	var err error
	if c.Direction == listen.Inbound {
		err = s.authorize(c, c.Original.Port(), nil, r)
	}
	if up == nil && err == nil {
		up, picked, err = s.connect(ctx, c, d, r)
	}
	if up != nil {
		defer picked.done(balance.Unknown)
		defer up.Close()
	}
	if err == nil && r.handedOff {
		r.sender = s.callerOf(c)
		err = s.authorize(c, r.endpoint.Addr.Port(), nil, r)
	}
	if err != nil {
		return err
	}
	r.begun(s)
	end, err := newUpstreamConn(up)
	if err != nil {
		return &reason.Error{Reason: reason.UpstreamClosed, Err: err}
	}
	first := client.bytes()
	if len(first) > 0 {
		if _, err := end.Write(first); err != nil {
			return &reason.Error{Reason: reason.UpstreamClosed, Err: err}
		}
		client.skip(len(first))
	}
	client.readBy(time.Time{})
	sent, received, cause := s.carry(client, end, s.gate(c, r, nil))
	r.sent(sent + uint64(len(first)))
	r.received(received)
	switch {
	case up.Looped():
		return &reason.Error{Reason: reason.Loop}
	case cause != nil:
		r.missed(s, cause) // a refusal comes after the handshake
		return cause
	}
	return nil
}

// pick is an endpoint that the balancer counts something to. Of the zero value it
// counts nothing.
type pick struct {
	balancer *balance.Balancer
	backend  *route.Backend
	addr     netip.AddrPort
}

// done ends the counting, once, and says how it went.
func (p *pick) done(outcome balance.Outcome) {
	if p.backend != nil {
		p.balancer.Done(p.backend, p.addr, outcome)
		p.backend = nil
	}
}

// connect connects to where c goes: to where it was going, or to one of a backend's
// endpoints.
func (s *Server) connect(ctx context.Context, c listen.Conn, d route.Destination, r *record) (*upstream.Conn, pick, error) {
	if own(c, d) {
		endpoint := route.Endpoint{Addr: c.Original, Identity: d.Identity}
		r.attempt(endpoint, false)
		began := time.Now()
		up, err := s.reach(ctx, c, endpoint)
		if err == nil {
			r.connected(time.Since(began), up)
		}
		r.missed(s, err)
		return up, pick{}, err
	}
	backend := d.Backend()
	if d.Routes != nil && d.Routes.Kind == route.TCPRoute {
		rule := &d.Routes.Rules[0]
		r.routed(rule.Route)
		chosen, err := choose(rule)
		if err != nil {
			return nil, pick{}, err
		}
		backend = chosen.Backend
	}
	failed := error(errNobodyLeft)
	var tried []netip.AddrPort
	for range maxAttempts {
		endpoint, place, err := s.choose(ctx, c, &backend, tried)
		if errors.Is(err, errNobodyLeft) {
			break
		}
		if err != nil {
			return nil, pick{}, err
		}
		picked := pick{&s.balancer, &backend, endpoint.Addr}
		r.attempt(endpoint, s.Config.Own(endpoint.Addr.Addr()))
		began := time.Now()
		up, err := s.reach(ctx, c, endpoint)
		if err == nil {
			place.keep(up)
			s.balancer.Report(&backend, endpoint.Addr, balance.Success)
			r.connected(time.Since(began), up)
			return up, picked, nil
		}
		place.leave()
		r.missed(s, err)
		failed = err
		if !another(err) {
			picked.done(balance.Unknown)
			break
		}
		picked.done(balance.ConnectFailure)
		tried = append(tried, endpoint.Addr)
	}
	return nil, pick{}, failed
}

// choose picks an endpoint for c, and takes a place for a connection to it, which it
// may have to wait for.
func (s *Server) choose(ctx context.Context, c listen.Conn, backend *route.Backend, tried []netip.AddrPort) (route.Endpoint, place, error) {
	var endpoint route.Endpoint
	var place place
	try := func() (bool, error) {
		var ok bool
		if endpoint, ok = s.balancer.Pick(backend, balance.Key{Client: c.Peer.Addr()}, tried); !ok {
			return false, errNobodyLeft
		}
		if place, ok = s.takePlace(backend); !ok {
			s.balancer.Done(backend, endpoint.Addr, balance.Unknown)
		}
		return ok, nil
	}
	owner := ownerOf(backend)
	ok, err := false, error(nil)
	if s.lines.empty(owner) {
		ok, err = try()
	}
	if !ok && err == nil {
		err = s.stand(backend, owner, s.patience(time.Time{}), waitIn(ctx), try)
	}
	return endpoint, place, err
}

// dial connects to addr: to the pod's own application from the caller's address,
// if that is to be kept and is another's than the pod's, else from the pod's own.
// A link-local address means nothing without its interface, by which no route
// inside the pod leads to it.
func (s *Server) dial(ctx context.Context, c listen.Conn, addr netip.AddrPort) (*upstream.Conn, error) {
	if c.Direction != listen.Inbound {
		return s.dialer.Dial(ctx, addr)
	}
	caller := c.Peer.Addr()
	if !s.KeepClient || s.Config.Own(caller) || caller.IsLinkLocalUnicast() {
		caller = netip.Addr{}
	}
	return s.dialer.DialLocal(ctx, caller, addr)
}

// another reports whether the failure is one of the endpoint, not of this proxy.
func another(err error) bool {
	var e *reason.Error
	if !errors.As(err, &e) || errors.Is(err, mtls.ErrOwn) {
		return false
	}
	switch e.Reason {
	case reason.ConnectRefused, reason.ConnectTimeout, reason.ConnectFailed,
		reason.PeerIdentity, reason.TrustDomain, reason.CertUntrusted, reason.CertExpired, reason.CertNotYetValid,
		reason.CertMalformed, reason.TLSProtocol, reason.TLSRefused, reason.TLSFailed:
		return true
	}
	return false
}

// carry moves bytes both ways until both have ended or one failed, or they are not
// allowed any more, and returns how many went up and down, and the failure.
func (s *Server) carry(client, up *conn, allowed gate) (uint64, uint64, *reason.Error) {
	p := &pair{client: client, upstream: up, pipes: &s.pipes, gate: allowed}
	s.watch(p)
	defer s.unwatch(p)
	p.recheck(s.review()) // policies, and roots, may have changed before it was watched
	return p.join()
}

// drain has connections end as they become idle.
func (s *Server) drain() {
	s.draining.Store(true)
	s.pool.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.carriers {
		c.drain()
	}
}

// watch has c ended when the time to drain is over.
func (s *Server) watch(c carrier) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.carriers == nil {
		s.carriers = map[carrier]struct{}{}
	}
	s.carriers[c] = struct{}{}
}

func (s *Server) unwatch(c carrier) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.carriers, c)
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
	for c := range s.carriers {
		c.abort(reason.Shutdown, nil)
	}
}
