package relay

import (
	"cmp"
	"context"
	"errors"
	"io"
	"maps"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/http2"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/mtls"
	"github.com/weirmesh/weir/proxy/mux"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/route"
	"github.com/weirmesh/weir/proxy/upstream"
)

// What two proxies have for each other of HTTP/1 they gather (package mux): a connection
// of mTLS between them carries streams, each of which is what a connection would be. A
// request is on one of its own, an idle one is kept for the next, and to http1.go it is a
// connection like others.

const (
	// aloneFor is how long a proxy that takes no streams is not asked again.
	aloneFor = time.Minute
	// lookIdle is how often it is looked whether a connection carries any. It is kept for
	// another one until it is looked again.
	lookIdle = 30 * time.Second
	// parting is how long it may take to say that a connection ends.
	parting = time.Second
	// unheard is for how long a peer may leave what it is sent unacknowledged: one that has
	// vanished is missed then, with all that waits for it and would wait for it anew
	// (TCP_USER_TIMEOUT, tcp(7)). One that lives reads whatever comes.
	unheard = 20 * time.Second
)

// session is a connection that carries streams, at either end.
type session struct {
	*mux.Session
	server *Server
	secure *mtls.Conn
	fd     int

	mu         sync.Mutex
	poller     *http2.Poller // that reads it; nil: it is over
	processors int           // that were used when it was chosen
}

// newSession is the server's end if opened is not nil, as mux.New's.
func (s *Server) newSession(secure *mtls.Conn, opened func(*mux.Stream)) *session {
	one := &session{Session: mux.New(secure, &s.pollers.turn, opened), server: s, secure: secure}
	one.Watched = one.follow
	return one
}

// begin has a poller read it, behind what came with the handshake.
func (s *session) begin(p *http2.Poller) error {
	if err := s.beginBy(p); err != nil {
		return err
	}
	s.Ready(false)
	s.server.pollers.turn.Flush()
	return nil
}

func (s *session) beginBy(p *http2.Poller) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p == nil {
		return os.ErrClosed
	}
	raw, err := s.secure.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		s.fd = int(fd)
		failed = os.NewSyscallError("setsockopt user_timeout",
			unix.SetsockoptInt(s.fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(unheard.Milliseconds())))
	})
	if err = errors.Join(err, failed); err != nil {
		return err
	}
	if err := p.Add(s.fd, s.Session); err != nil {
		return err
	}
	s.poller, s.processors = p, runtime.GOMAXPROCS(0)
	return nil
}

// follow has the poller of another number of processors read it, if there are more, or
// less, by now.
func (s *session) follow() {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := runtime.GOMAXPROCS(0)
	if s.poller == nil || s.processors == n {
		return
	}
	s.processors = n
	p := s.server.pollers.get(n)
	if p == nil || p == s.poller {
		return
	}
	s.poller.Remove(s.fd)
	if s.poller = p; p.Add(s.fd, s.Session) != nil {
		s.poller = nil
		go s.Close(os.ErrClosed)
	}
}

// end is when the connection has ended: it is not read any more, and if nothing went wrong,
// the peer is told.
func (s *session) end() {
	s.mu.Lock()
	if s.poller != nil {
		s.poller.Remove(s.fd)
		s.poller = nil
	}
	s.mu.Unlock()
	s.Quit()
	if errors.Is(s.Why(), io.EOF) {
		_ = s.secure.SetWriteDeadline(time.Now().Add(parting))
		_ = s.secure.CloseWrite()
	}
}

// abort implements carrier. Its streams are told by themselves.
func (s *session) abort(r reason.Reason, _ error) { go s.Close(&reason.Error{Reason: r}) }

// drain implements carrier.
func (s *session) drain() { s.Leave() }

// recheck implements carrier.
func (s *session) recheck(review *mtls.Review) {
	if review.Check(s.secure) != nil {
		s.Leave()
	}
}

// takes is what an inbound connection may speak that is better than a proxy's least:
// streams, where what comes is looked into.
func (s *Server) takes(port uint16) []string {
	if s.Config.Opaque(port) {
		return nil
	}
	return []string{mtls.Streams}
}

// serveStreams serves the streams of an inbound connection until it ends. It returns the
// number of requests, each of which leaves a record.
func (s *Server) serveStreams(ctx context.Context, c listen.Conn, secure *mtls.Conn, d route.Destination) (int, error) {
	var mu sync.Mutex
	requests := 0
	var running sync.WaitGroup
	one := s.newSession(secure, func(stream *mux.Stream) {
		accepted := c
		accepted.Accepted = time.Now()
		c.Handshake = 0 // it was the first one's
		running.Go(func() {
			n := s.serveStream(ctx, accepted, newStreamConn(stream, secure), d)
			mu.Lock()
			defer mu.Unlock()
			requests += n
		})
	})
	s.watch(one)
	defer s.unwatch(one)
	defer endsWith(secure, one.Leave)()
	if s.draining.Load() {
		one.Leave()
	}
	if err := s.review().Check(secure); err != nil {
		return 0, err // its root went before it was watched
	}
	if err := one.begin(s.pollers.choose()); err != nil {
		return 0, &reason.Error{Reason: reason.Overload, Err: err}
	}
	<-one.Done()
	one.end()
	running.Wait()
	return requests, nil
}

// serveStream serves one of them.
func (s *Server) serveStream(ctx context.Context, c listen.Conn, client *conn, d route.Destination) int {
	defer client.stream.Close()
	r := records.Get().(*record)
	defer records.Put(r)
	r.reset(c)
	r.decided(r.now(), d)
	defer s.leave()
	requests, err := 0, error(&reason.Error{Reason: reason.Overload})
	if s.enter() {
		requests, err = s.serveHTTP1(ctx, c, client, nil)
	}
	s.settle(client, r, requests, err)
	return max(requests, 1) // it has left a record
}

// sessions are the connections to other proxies that carry streams. The zero value is
// ready for use; close it.
type sessions struct {
	look time.Duration // how often it is looked whether one is idle; 0: lookIdle

	mu      sync.Mutex
	by      map[sessionKey]*dialled
	all     map[*session]struct{} // those on which no stream is opened any more among them
	closed  bool
	running sync.WaitGroup
}

// sessionKey is where a connection leads, and who reads it: each poller has its own, as
// nobody waits for another then.
type sessionKey struct {
	upstream.Key
	poller *http2.Poller
}

// dialled is a connection, or that there is none. All but known is good once that is
// closed.
type dialled struct {
	known   chan struct{}
	err     error     // why there is none
	alone   time.Time // the proxy takes no streams, as of then
	session *session
	up      *upstream.Conn
}

// isKnown reports whether that is closed.
func (d *dialled) isKnown() bool {
	select {
	case <-d.known:
		return true
	default:
		return false
	}
}

// old reports whether it is time to ask again.
func (d *dialled) old() bool {
	return d.isKnown() && !d.alone.IsZero() && time.Since(d.alone) > aloneFor
}

// reachStream is reach for HTTP/1: where the endpoint has to show its identity, what it
// returns is a stream, if the proxy there takes any.
func (h *http1Conn) reachStream(ctx context.Context, e route.Endpoint) (*upstream.Conn, error) {
	poller := h.quick.poller
	if h.TLS == nil || poller == nil || !h.shows(e) {
		return h.reach(ctx, h.accepted, e)
	}
	if _, err := h.TLS.Own(ctx); err != nil { // without, nobody knows under which trust it will be
		return nil, err
	}
	key := sessionKey{h.keyOf(upstream.Owner{}, e), poller}
	for {
		d, first := h.sessions.of(key)
		if first {
			return h.dialStreams(ctx, key, d, e)
		}
		select {
		case <-d.known:
		case <-ctx.Done():
			return nil, &reason.Error{Reason: reason.Shutdown, Err: ctx.Err()}
		}
		switch {
		case d.err != nil && !errors.Is(d.err, errAnothers):
			return nil, d.err
		case !d.alone.IsZero():
			return h.dialSecure(ctx, e)
		}
		if d.session != nil && !h.outdated(d.up, time.Now()) {
			if stream, err := d.session.Open(); err == nil {
				return d.up.Of(stream), nil
			}
		}
		h.sessions.forget(key, d)
	}
}

// errAnothers is a failure to connect that is of who wanted to: another may succeed.
var errAnothers = errors.New("who dialled gave up")

// dialStreams dials for itself, and for all that wait for it.
func (h *http1Conn) dialStreams(ctx context.Context, key sessionKey, d *dialled, e route.Endpoint) (*upstream.Conn, error) {
	defer close(d.known)
	up, err := h.dialSecure(ctx, e, mtls.Streams)
	switch {
	case err != nil:
		d.err = err
		if ctx.Err() != nil {
			d.err = errAnothers
		}
		h.sessions.forget(key, d)
		return nil, err
	case !up.Secure.Streams():
		d.alone = time.Now()
		return up, nil
	}
	one := h.newSession(up.Secure, nil)
	stream, err := one.Open()
	if err == nil {
		err = one.begin(key.poller)
	}
	if err == nil {
		d.session, d.up = one, up
		err = h.sessions.tend(key, d)
	}
	if err != nil {
		d.err, d.session = &reason.Error{Reason: reason.Overload, Err: err}, nil
		h.sessions.forget(key, d)
		one.Close(err)
		one.end()
		up.Close()
		return nil, d.err
	}
	first := up.Of(stream)
	first.Handshake = up.Handshake
	return first, nil
}

// of returns what there is, and whether the caller is to find out.
func (s *sessions) of(key sessionKey) (*dialled, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.by[key]
	if d != nil && !d.old() {
		return d, false
	}
	maps.DeleteFunc(s.by, func(_ sessionKey, d *dialled) bool { return d.old() })
	if s.by == nil {
		s.by = map[sessionKey]*dialled{}
	}
	d = &dialled{known: make(chan struct{})}
	s.by[key] = d
	return d, true
}

// forget has the next one dial. What there is ends with its last stream.
func (s *sessions) forget(key sessionKey, d *dialled) {
	s.mu.Lock()
	if s.by[key] == d {
		delete(s.by, key)
	}
	s.mu.Unlock()
	if d.session != nil {
		d.session.Leave()
	}
}

// tend looks after a connection until it ends.
func (s *sessions) tend(key sessionKey, d *dialled) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return os.ErrClosed
	}
	if s.all == nil {
		s.all = map[*session]struct{}{}
	}
	s.all[d.session] = struct{}{}
	s.running.Go(func() {
		s.awaitEnd(key, d)
		s.forget(key, d)
		d.session.end()
		d.up.Close()
		s.mu.Lock()
		delete(s.all, d.session)
		s.mu.Unlock()
	})
	return nil
}

// awaitEnd returns when the connection has ended. One that has been idle does so soon.
func (s *sessions) awaitEnd(key sessionKey, d *dialled) {
	look := time.NewTicker(cmp.Or(s.look, lookIdle))
	defer look.Stop()
	for idle := false; ; {
		select {
		case <-d.session.Done():
			return
		case <-look.C:
		}
		was := idle
		if idle = d.session.Streams() == 0; idle && was {
			s.forget(key, d)
		}
	}
}

// review has no stream be opened any more where other roots are trusted by now.
func (s *sessions) review(trust uint64) {
	s.mu.Lock()
	var old []*session
	for key, d := range s.by {
		if key.Trust == trust {
			continue
		}
		delete(s.by, key)
		if d.isKnown() && d.session != nil { // or it will be found to be outdated
			old = append(old, d.session)
		}
	}
	s.mu.Unlock()
	for _, one := range old {
		one.Leave()
	}
}

// close ends all, and waits for that.
func (s *sessions) close() {
	s.mu.Lock()
	s.closed = true
	all := slices.Collect(maps.Keys(s.all))
	s.mu.Unlock()
	for _, one := range all {
		one.Close(io.EOF)
	}
	s.running.Wait()
}
