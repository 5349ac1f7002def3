package relay

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/weirmesh/weir/proxy/balance"
	"github.com/weirmesh/weir/proxy/http2"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/mtls"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/route"
	"github.com/weirmesh/weir/proxy/upstream"
)

const (
	// upstreamIdle is how long a connection to an endpoint is kept without streams.
	upstreamIdle = 60 * time.Second
	// keptBody is how much of a request is kept for another attempt, in bytes.
	keptBody = 64 << 10
	// ownConnections is how many connections to the application one of a client's may
	// become. The client's may carry the streams of many (its pod's proxy gathers
	// them), more than an application takes on a connection: 100 or 128, mostly.
	ownConnections = 16
)

// http2Conn is a client's connection that carries HTTP/2. Each of its streams is
// routed and balanced by itself.
type http2Conn struct {
	*Server
	ctx      context.Context
	accepted listen.Conn
	peer     *mtls.Conn // nil: the client comes without
	server   *http2.ServerConn
	own      *http2.Client // to the application, or to what is no Service; nil: of a Service
	requests int           // the reading goroutine's

	mu         sync.Mutex
	registered map[*http2Exchange]struct{} // streams that are for the application
}

// serveHTTP2 serves a client until one of the ends closes. early, if not nil, is an
// upstream connection that is there already. It returns the number of requests,
// each of which leaves a record.
func (s *Server) serveHTTP2(ctx context.Context, c listen.Conn, client *conn, d route.Destination, early *upstream.Conn, picked pick) (int, error) {
	h := &http2Conn{Server: s, ctx: ctx, accepted: c, peer: client.secure}
	if own(c, d) {
		var first atomic.Pointer[upstream.Conn]
		first.Store(early)
		defer func() {
			if c := first.Load(); c != nil {
				c.Close() // no stream came
			}
		}()
		h.own = &http2.Client{Dial: h.dialOwn(&first, route.Endpoint{Addr: c.Original, Identity: d.Identity}), Usable: s.usable, Poller: s.pollers.choose, Connections: ownConnections, Timeouts: http2.Timeouts{Idle: keepAlive}}
		defer h.own.Close()
	} else if early != nil {
		// Its streams may go anywhere.
		early.Close()
	}
	picked.done(balance.Unknown)
	streams := &http2.Server{Handler: h.handle, Refused: h.refused, Poller: s.pollers.choose, Timeouts: http2.Timeouts{Idle: keepAlive}}
	head := append([]byte(nil), client.bytes()...)
	client.drop()
	if client.secure != nil {
		h.server = streams.NewConn(client.secure, head)
	} else {
		h.server = streams.NewConn(c.TCPConn, head)
	}
	s.watch(h)
	defer s.unwatch(h)
	defer endsWith(client.secure, h.drain)()
	if s.draining.Load() {
		h.server.Drain()
	}
	if err := s.review().Check(h.peer); err != nil {
		return 0, err // its root went before it was watched
	}
	_ = h.server.Serve()
	return h.requests, nil
}

func (h *http2Conn) abort(reason.Reason, error) { h.server.Close() }
func (h *http2Conn) drain()                     { h.server.Drain() }

// dialOwn dials where the connection was going; the first time it is there already,
// if it was early.
func (h *http2Conn) dialOwn(first *atomic.Pointer[upstream.Conn], endpoint route.Endpoint) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		if c := first.Swap(nil); c != nil {
			return stream(c), nil
		}
		c, err := h.reach(ctx, h.accepted, endpoint)
		if err != nil {
			return nil, err // not c: that would be a net.Conn
		}
		return stream(c), nil
	}
}

// refused leaves a record of a request that breaks a rule of HTTP.
func (h *http2Conn) refused(err error) {
	h.requests++
	r := newRecord(h.accepted)
	r.begin(time.Now(), 2, nil, nil)
	r.fail(&reason.Error{Reason: reason.BadRequest, Err: err})
	for _, entry := range r.entries(time.Now()) {
		h.Log(entry)
	}
}

// done is a context that has ended: what is known is answered at once.
var done = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// handle begins a stream.
func (h *http2Conn) handle(t *http2.Turn, s *http2.Stream) {
	h.requests++
	e := &http2Exchange{conn: h, stream: s, request: http2Request{stream: s}, record: newRecord(h.accepted)}
	s.Observer, s.Withheld = e, isCallerField[string]
	e.record.begin(time.Now(), 2, e.request.Method(), e.request.RawPath())
	if h.requests == 1 {
		e.record.met(h.accepted)
	}
	e.grpc = strings.HasPrefix(e.request.pseudo("content-type"), "application/grpc")
	d, err := h.destination(done, h.accepted)
	if err == nil && s.Hold() {
		e.start(t, d)
		s.Release()
		return
	}
	// It is not known (any more): somebody has to wait.
	h.handlers.Add(1)
	go e.startLater()
}

// http2Exchange is one stream. It is its http2.Observer.
type http2Exchange struct {
	conn    *http2Conn
	stream  *http2.Stream
	request http2Request
	record  *record
	plan    plan
	grpc    bool

	attempt  int
	tried    []netip.AddrPort
	before   *reason.Error // of the attempt before
	picked   pick
	timer    *time.Timer
	patience time.Time // until when it waits for a connection; zero: it has not waited
	port     uint16    // the application's, if it is registered

	mu     sync.Mutex
	failed *reason.Error // what the client was told
	over   bool
	ended  chan struct{} // closed when it is over; nil: nobody waits for that
}

func (e *http2Exchange) startLater() {
	defer e.conn.handlers.Done()
	d, err := e.conn.destination(e.conn.ctx, e.conn.accepted)
	e.later(func(t *http2.Turn) {
		if err != nil {
			e.fail(t, err)
			return
		}
		e.start(t, d)
	})
}

// later does something on another goroutine than a connection's, unless the stream
// is over.
func (e *http2Exchange) later(f func(*http2.Turn)) {
	if !e.stream.Hold() {
		return
	}
	defer e.stream.Release()
	var t http2.Turn
	defer t.Flush()
	f(&t)
}

// start decides, and sends the request on its way.
func (e *http2Exchange) start(t *http2.Turn, d route.Destination) {
	if twice(d) {
		e.stream.Keep(keptBody)
	}
	h := e.conn
	policies := h.Config.Authorization()
	if err := e.plan.make(h.Server, h.accepted, d, &e.request, e.record); err != nil {
		e.fail(t, err)
		return
	}
	if h.accepted.Direction == listen.Inbound && !e.registers(t, policies, h.accepted.Original.Port()) {
		return
	}
	if a := e.plan.answer; a != nil {
		e.answer(t, a)
		return
	}
	e.stream.Attempt = e.plan.attempt
	if !e.plan.ends.IsZero() {
		e.timer = time.AfterFunc(time.Until(e.plan.ends), e.late)
	}
	e.send(t)
}

// late ends a stream whose time is up.
func (e *http2Exchange) late() {
	var t http2.Turn
	defer t.Flush()
	e.cutOff(&t, &reason.Error{Reason: reason.RequestTimeout})
}

// cutOff ends a stream that may have been answered, or be being so.
func (e *http2Exchange) cutOff(t *http2.Turn, failure *reason.Error) {
	e.note(failure)
	a := failed(failure, failure.Reason.Status())
	e.plan.edit(a)
	if !e.respond(t, a, failure) {
		e.stream.Reset(t, resetCancel, failure)
	}
}

// Codes of RFC 9113, section 7.
const (
	resetRefused = http2.Code(7) // REFUSED_STREAM
	resetCancel  = http2.Code(8) // CANCEL
)

// send opens the stream at an endpoint, once those have theirs that wait for one.
func (e *http2Exchange) send(t *http2.Turn) {
	h := e.conn
	if h.own != nil {
		e.open(t, h.own, route.Endpoint{Addr: h.accepted.Original, Identity: e.plan.shows})
		return
	}
	if !h.lines.empty(ownerOf(&e.plan.backend)) {
		e.queue()
		return
	}
	endpoint, err := e.pick()
	if err != nil {
		e.fail(t, err)
		return
	}
	e.openAt(t, endpoint)
}

// pick chooses an endpoint. The error is a *reason.Error.
func (e *http2Exchange) pick() (route.Endpoint, error) {
	balancer, backend := &e.conn.balancer, &e.plan.backend
	endpoint, ok := balancer.Pick(backend, e.plan.key, e.tried)
	if !ok && e.plan.retry != nil {
		endpoint, ok = balancer.Pick(backend, e.plan.key, nil)
	}
	switch {
	case ok:
		return endpoint, nil
	case e.before != nil: // says more than that nobody is left
		return endpoint, e.before
	}
	return endpoint, errNobodyLeft
}

// openAt opens the stream at an endpoint that was picked.
func (e *http2Exchange) openAt(t *http2.Turn, endpoint route.Endpoint) {
	h, backend := e.conn, &e.plan.backend
	e.picked = pick{&h.balancer, backend, endpoint.Addr}
	if h.Config.Own(endpoint.Addr.Addr()) && !e.handOver(t, endpoint) {
		return
	}
	e.open(t, h.streams.to(h.Server, backend, endpoint), endpoint)
}

func (e *http2Exchange) open(t *http2.Turn, client *http2.Client, endpoint route.Endpoint) {
	e.attempt++
	shows := ""
	if e.conn.shows(endpoint) {
		shows = endpoint.Identity
	}
	e.record.send(endpoint, e.conn.own == nil && e.conn.Config.Own(endpoint.Addr.Addr()), shows)
	client.Open(t, e.stream, e.stream.Request)
}

// errNoPlace is that a backend has no place for the connection that a stream needs.
var errNoPlace = &reason.Error{Reason: reason.CircuitOpen, Err: errors.New("no place for another connection")}

// displaced is a stream for which there is no place at its endpoint. It goes to
// another one that has room on a connection, or waits.
func (e *http2Exchange) displaced(t *http2.Turn) {
	e.picked.done(balance.Unknown)
	e.attempt--
	e.record.unsent()
	if endpoint, ok := e.pickWithRoom(); ok {
		e.openAt(t, endpoint)
		return
	}
	e.queue()
}

// pickWithRoom chooses one of the endpoints that have a connection with room.
func (e *http2Exchange) pickWithRoom() (route.Endpoint, bool) {
	h, backend := e.conn, &e.plan.backend
	return h.balancer.Pick(backend, e.plan.key, append(h.streams.full(h.Server, backend), e.tried...))
}

// queue has the stream wait in line.
func (e *http2Exchange) queue() {
	e.conn.handlers.Add(1)
	go e.sendInLine()
}

// sendInLine sends the request when there is room on a connection, or a place for
// another one.
func (e *http2Exchange) sendInLine() {
	defer e.conn.handlers.Done()
	h, backend := e.conn, &e.plan.backend
	if e.patience.IsZero() {
		e.patience = h.patience(time.Time{})
	}
	var endpoint route.Endpoint
	err := h.stand(backend, ownerOf(backend), e.patience, e.waitFor(), func() (bool, error) {
		var ok bool
		if endpoint, ok = e.pickWithRoom(); ok {
			return true, nil
		}
		if !h.free(backend) {
			return false, nil
		}
		var err error
		endpoint, err = e.pick()
		return err == nil, err
	})
	sent := false
	e.later(func(t *http2.Turn) {
		if err != nil {
			e.fail(t, err)
			return
		}
		sent = true
		e.openAt(t, endpoint)
	})
	if err == nil && !sent { // the stream is over
		h.balancer.Done(backend, endpoint.Addr, balance.Unknown)
	}
	// There may be room for more, or what it was called for is not used.
	h.lines.call(ownerOf(backend))
}

// waitFor is the waiting of a stream.
func (e *http2Exchange) waitFor() waiting {
	return waitUnless(e.end(), func() error { return &reason.Error{Reason: reason.ClientGone} })
}

// Response implements http2.Observer.
func (e *http2Exchange) Response(_ *http2.Turn, _ *http2.Stream, status int, fields []http2.Field) ([]http2.Field, bool) {
	if status/100 == 1 {
		return fields, true
	}
	e.record.firstByte()
	if e.plan.counts(status) && e.mayTry(&attemptError{cause: &reason.Error{Reason: reason.UpstreamClosed}}) {
		return nil, false
	}
	e.record.answered(status)
	e.picked.done(outcome(status, nil))
	list := http2Fields{fields}
	e.plan.edit(&list)
	return list.list, true
}

func (e *http2Exchange) mayTry(failure *attemptError) bool {
	return e.plan.again(e.conn.Server, failure, []byte(e.request.pseudo(":method")), e.attempt)
}

// Failed implements http2.Observer.
func (e *http2Exchange) Failed(t *http2.Turn, _ *http2.Stream, f http2.Failure) bool {
	if errors.Is(f.Err, errNoPlace) && f.Replayable {
		e.displaced(t)
		return true
	}
	e.freed()
	e.patience = time.Time{}
	if errors.Is(f.Err, http2.ErrDial) || errors.Is(f.Err, http2.ErrBusy) {
		e.record.unsent()
	}
	failure := &attemptError{cause: http2Failure(f.Err), endpoint: e.picked.addr, unsent: f.Unsent || errors.Is(f.Err, mtls.ErrRefused)}
	own := errors.Is(f.Err, mtls.ErrOwn)
	e.record.missed(e.conn.Server, failure.cause)
	switch {
	case errors.Is(f.Err, errNoPlace), own:
		e.picked.done(balance.Unknown)
	case errors.Is(f.Err, http2.ErrDeclined):
		e.picked.done(balance.ServerError)
	case errors.Is(f.Err, http2.ErrDial):
		e.picked.done(balance.ConnectFailure)
	default:
		e.picked.done(outcome(0, failure.cause))
	}
	declined := errors.Is(f.Err, http2.ErrDeclined)
	if own || !f.Replayable || !declined && !e.mayTry(failure) {
		e.fail(t, failure.cause)
		return true
	}
	e.before = failure.cause
	if !full(f.Err) {
		e.tried = append(e.tried, failure.endpoint)
	}
	if e.plan.asked {
		// The pause is no reason to hold up other streams.
		e.conn.handlers.Add(1)
		go e.sendLater(e.plan.retried())
		return true
	}
	e.send(t)
	return true
}

// full reports whether an endpoint refused a stream that its connection had no room
// for, which it had yet to say: another connection may have.
func full(err error) bool {
	var reset *http2.ResetError
	return errors.As(err, &reset) && reset.Code == resetRefused
}

func (e *http2Exchange) sendLater(pause time.Duration) {
	defer e.conn.handlers.Done()
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		e.later(e.send)
	case <-e.end():
	}
}

// end is closed when the stream is over.
func (e *http2Exchange) end() <-chan struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ended == nil {
		e.ended = make(chan struct{})
		if e.over {
			close(e.ended)
		}
	}
	return e.ended
}

// http2Failure is the reason of an attempt's failure.
func http2Failure(err error) *reason.Error {
	var known *reason.Error
	switch {
	case errors.As(err, &known):
		return known
	case errors.Is(err, mtls.ErrRefused):
		return &reason.Error{Reason: reason.TLSRefused, Err: err}
	case errors.Is(err, http2.ErrMalformed), errors.Is(err, http2.ErrHeaderTooLarge):
		return &reason.Error{Reason: reason.BadResponse, Err: err}
	case errors.Is(err, http2.ErrAttemptTimeout):
		return &reason.Error{Reason: reason.RequestTimeout}
	case errors.Is(err, http2.ErrBusy):
		return &reason.Error{Reason: reason.Overload, Err: err}
	}
	return &reason.Error{Reason: reason.UpstreamClosed, Err: err}
}

// freed is when a stream has left its connection.
func (e *http2Exchange) freed() {
	if e.conn.own == nil {
		e.conn.lines.call(ownerOf(&e.plan.backend))
	}
}

// Done implements http2.Observer.
func (e *http2Exchange) Done(_ *http2.Stream, o http2.Outcome) {
	e.freed()
	if e.port != 0 {
		e.unregister()
	}
	if e.timer != nil {
		e.timer.Stop()
	}
	e.picked.done(balance.Unknown)
	e.plan.leave(e.conn.Server)
	e.record.ended(o)
	if o.Status > 0 {
		e.record.answered(o.Status)
	}
	e.mu.Lock()
	failure := e.failed
	if e.over = true; e.ended != nil {
		close(e.ended)
	}
	e.mu.Unlock()
	var reset *http2.ResetError
	switch {
	case failure != nil:
		e.record.fail(failure)
	case errors.Is(o.Err, http2.ErrClosed):
		e.record.fail(&reason.Error{Reason: reason.Shutdown, Err: o.Err})
	case errors.As(o.Err, &reset) && !reset.Upstream:
		e.record.fail(&reason.Error{Reason: reason.ClientGone, Err: o.Err})
	case errors.Is(o.Err, http2.ErrClient):
		why := reason.ClientGone
		if errors.Is(o.Err, http2.ErrMalformed) || errors.Is(o.Err, http2.ErrAbuse) {
			why = reason.BadRequest
		}
		e.record.fail(&reason.Error{Reason: why, Err: o.Err})
	case o.Err != nil:
		e.record.fail(http2Failure(o.Err))
	}
	for _, entry := range e.record.entries(time.Now()) {
		e.conn.Log(entry)
	}
}

// fail tells the client that, and why, its request failed.
func (e *http2Exchange) fail(t *http2.Turn, err error) {
	var failure *reason.Error
	if !errors.As(err, &failure) {
		failure = &reason.Error{Reason: reason.ConnectFailed, Err: err}
	}
	e.note(failure)
	status := failure.Reason.Status()
	if status == 0 {
		e.stream.Reset(t, resetCancel, failure)
		return
	}
	a := failed(failure, status)
	if e.plan.wait > 0 {
		a.fields = append(a.fields, retryAfter(e.plan.wait))
	}
	e.plan.edit(a)
	e.respond(t, a, failure)
}

// note keeps the first failure for the record.
func (e *http2Exchange) note(failure *reason.Error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.failed == nil {
		e.failed = failure
	}
}

func (e *http2Exchange) answer(t *http2.Turn, a *answer) { e.respond(t, a, nil) }

// respond answers in place of an endpoint; a call of gRPC that failed gets its
// status, without a body.
func (e *http2Exchange) respond(t *http2.Turn, a *answer, failure *reason.Error) bool {
	fields := make([]http2.Field, 0, len(a.fields)+3)
	status, body := a.status, []byte(a.body)
	if e.grpc && failure != nil {
		status, body = 200, nil
		fields = append(fields, http2.Field{Name: "content-type", Value: "application/grpc"},
			http2.Field{Name: "grpc-status", Value: strconv.Itoa(failure.Reason.GRPC())},
			http2.Field{Name: "grpc-message", Value: grpcMessage(strings.TrimSpace(a.body))})
	}
	for _, f := range a.fields {
		name := strings.ToLower(f.Name)
		if body == nil && name == "content-type" {
			continue
		}
		fields = append(fields, http2.Field{Name: name, Value: f.Value})
	}
	if len(body) > 0 {
		fields = append(fields, http2.Field{Name: "content-length", Value: strconv.Itoa(len(body))})
	}
	return e.stream.Respond(t, status, fields, body)
}

// grpcMessage is a Status-Message of gRPC over HTTP/2: percent-encoded.
func grpcMessage(text string) string {
	var out strings.Builder
	for _, c := range []byte(text) {
		if c < ' ' || c > '~' || c == '%' {
			const digits = "0123456789ABCDEF"
			out.WriteByte('%')
			out.WriteByte(digits[c>>4])
			out.WriteByte(digits[c&15])
			continue
		}
		out.WriteByte(c)
	}
	return out.String()
}

// http2Clients are the connections to endpoints that all of the pod's streams
// share.
type http2Clients struct {
	mu     sync.Mutex
	by     map[upstream.Key]*sharedClient
	closed bool
}

type sharedClient struct {
	*http2.Client
	used    time.Time
	backend atomic.Pointer[route.Backend] // as it is now, of one whose connections are counted; nil: of others
}

// forgetClients is from how many endpoints on those are forgotten that were not
// used for twice the time that a connection may be idle.
const forgetClients = 64

// to is the client of a backend's endpoint.
func (c *http2Clients) to(s *Server, backend *route.Backend, endpoint route.Endpoint) *http2.Client {
	now := time.Now()
	key := s.keyOf(ownerOf(backend), endpoint)
	c.mu.Lock()
	defer c.mu.Unlock()
	client := c.by[key]
	if client == nil {
		c.forget(s, now)
		client = s.newClient(key, endpoint)
		if c.closed {
			client.Close()
			return client.Client
		}
		if c.by == nil {
			c.by = map[upstream.Key]*sharedClient{}
		}
		c.by[key] = client
	}
	client.used = now
	if key.Owner != (upstream.Owner{}) {
		client.backend.Store(backend)
	}
	return client.Client
}

// forget forgets clients that were not used for long, once there are many. c.mu is
// held.
func (c *http2Clients) forget(s *Server, now time.Time) {
	if len(c.by) < forgetClients {
		return
	}
	for key, client := range c.by {
		if now.Sub(client.used) > 2*upstreamIdle && s.balancer.Active(key.Addr) == 0 {
			delete(c.by, key)
			go client.Close()
		}
	}
}

// newClient makes one that dials an endpoint.
func (s *Server) newClient(key upstream.Key, endpoint route.Endpoint) *sharedClient {
	client := &sharedClient{}
	client.Client = &http2.Client{
		Dial: func(ctx context.Context) (net.Conn, error) {
			var place place
			if backend := client.backend.Load(); backend != nil {
				var ok bool
				if place, ok = s.takePlace(backend); !ok {
					return nil, errNoPlace
				}
			}
			conn, err := s.reach(ctx, listen.Conn{}, endpoint)
			if err != nil {
				place.leave()
				return nil, err
			}
			place.keep(conn)
			return stream(conn), nil
		},
		Usable:   s.usable,
		Poller:   s.pollers.choose,
		Ready:    func() { s.lines.call(key.Owner) },
		Timeouts: http2.Timeouts{Idle: upstreamIdle},
	}
	return client
}

// full are the endpoints of a backend that have no connection with room for a
// stream.
func (c *http2Clients) full(s *Server, backend *route.Backend) []netip.AddrPort {
	owner := ownerOf(backend)
	out := make([]netip.AddrPort, 0, len(backend.Endpoints))
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range backend.Endpoints {
		if client := c.by[s.keyOf(owner, e)]; client == nil || !client.Room() {
			out = append(out, e.Addr)
		}
	}
	return out
}

// closeIdle closes a connection of an owner's that has no stream, and reports
// whether there was one.
func (c *http2Clients) closeIdle(owner upstream.Owner) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, client := range c.by {
		if key.Owner == owner && client.CloseIdle() {
			return true
		}
	}
	return false
}

// close ends all connections. No stream is on them any more.
func (c *http2Clients) close() {
	c.mu.Lock()
	clients := c.by
	c.by, c.closed = nil, true
	c.mu.Unlock()
	for _, client := range clients {
		client.Close()
	}
}

// http2Fields are route.Fields of HTTP/2.
type http2Fields struct{ list []http2.Field }

func (f *http2Fields) Len() int                   { return len(f.list) }
func (f *http2Fields) Is(i int, name string) bool { return f.list[i].Name == name }
func (f *http2Fields) Set(i int, value string)    { f.list[i].Value = value }
func (f *http2Fields) Append(i int, value string) { f.list[i].Value += "," + value }
func (f *http2Fields) Remove(i int)               { f.list = append(f.list[:i], f.list[i+1:]...) }
func (f *http2Fields) Add(name, value string) {
	f.list = append(f.list, http2.Field{Name: name, Value: value})
}

// http2Request is a message of HTTP/2.
type http2Request struct {
	stream    *http2.Stream
	canonical []byte
}

func (r *http2Request) fields() *http2Fields { return &http2Fields{r.stream.Request} }

func (r *http2Request) Len() int                   { return len(r.stream.Request) }
func (r *http2Request) Is(i int, name string) bool { return r.stream.Request[i].Name == name }
func (r *http2Request) Name(i int) []byte          { return view(r.stream.Request[i].Name) }
func (r *http2Request) Value(i int) []byte         { return view(r.stream.Request[i].Value) }
func (r *http2Request) Set(i int, value string)    { r.fields().Set(i, value) }
func (r *http2Request) Append(i int, value string) { r.fields().Append(i, value) }

func (r *http2Request) Remove(i int) {
	f := r.fields()
	f.Remove(i)
	r.stream.Request = f.list
}

func (r *http2Request) Add(name, value string) {
	f := r.fields()
	f.Add(name, value)
	r.stream.Request = f.list
}

// pseudo is the value of the first field of that name; "" if there is none.
func (r *http2Request) pseudo(name string) string {
	for i := range r.stream.Request {
		if r.stream.Request[i].Name == name {
			return r.stream.Request[i].Value
		}
	}
	return ""
}

// view is text as bytes that nobody writes to.
func view(text string) []byte { return unsafe.Slice(unsafe.StringData(text), len(text)) }

func (r *http2Request) Prepare() bool {
	path, ok := route.CanonicalPath(r.RawPath())
	r.canonical = path
	return ok
}

func (r *http2Request) Method() []byte { return view(r.pseudo(":method")) }
func (r *http2Request) Path() []byte   { return r.canonical }
func (r *http2Request) Host() []byte   { return view(r.pseudo(":authority")) }

func (r *http2Request) RawPath() []byte {
	path, _, _ := strings.Cut(r.pseudo(":path"), "?")
	return view(path)
}

func (r *http2Request) Query() []byte {
	_, query, ok := strings.Cut(r.pseudo(":path"), "?")
	if !ok {
		return nil
	}
	return view(query)
}

func (r *http2Request) Header(name string) ([]byte, bool) {
	for i := range r.stream.Request {
		if r.stream.Request[i].Name == name {
			return view(r.stream.Request[i].Value), true
		}
	}
	return nil, false
}

func (r *http2Request) SetHost(host string) { r.put(":authority", host) }

func (r *http2Request) SetPath(path []byte) {
	target := string(path)
	if query := r.Query(); query != nil {
		target += "?" + string(query)
	}
	r.put(":path", target)
}

// put sets a pseudo-header field, which stands before the others.
func (r *http2Request) put(name, value string) {
	for i := range r.stream.Request {
		if r.stream.Request[i].Name == name {
			r.stream.Request[i].Value = value
			return
		}
	}
	r.stream.Request = append([]http2.Field{{Name: name, Value: value}}, r.stream.Request...)
}
