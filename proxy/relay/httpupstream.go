package relay

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/balance"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/route"
	"github.com/weirmesh/weir/proxy/upstream"
)

// lookEvery is how often it is looked whether a client that waits for an answer is
// still there.
const lookEvery = 5 * time.Second

// errNobodyLeft is that a backend has no endpoint, or none that was not tried.
var errNobodyLeft = &reason.Error{Reason: reason.NoEndpoints}

// httpUpstream is a connection to an endpoint that carries HTTP/1.
type httpUpstream struct {
	*conn
	dialled *upstream.Conn // what conn is a buffer of

	endpoint route.Endpoint
	shared   bool          // it goes back to the pool
	reused   bool          // it has carried a request before this one
	spent    bool          // it is not good for another request
	picked   pick          // of this request, until its outcome is known
	took     time.Duration // to connect, if that was for this request

	limit time.Time // of this attempt; zero: none
}

func newHTTPUpstream(c *upstream.Conn, e route.Endpoint) (*httpUpstream, error) {
	buffered, err := newConn(c.TCPConn)
	if err != nil {
		c.Close()
		return nil, err
	}
	return &httpUpstream{conn: buffered, dialled: c, endpoint: e}, nil
}

// Close ends the connection.
func (u *httpUpstream) Close() error {
	u.drop()
	return u.dialled.Close()
}

// Quiet reports whether nothing has come since the last answer.
func (u *httpUpstream) Quiet() bool { return u.quiet() }

// attemptError is an attempt that failed before the client saw anything of it.
type attemptError struct {
	cause    *reason.Error
	endpoint netip.AddrPort
	unsent   bool // nothing of the request can have arrived
	stale    bool // the connection had been idle, and ended without a byte
}

func (e *attemptError) Error() string { return e.cause.Error() }
func (e *attemptError) Unwrap() error { return e.cause }

// begin is before a request that must be answered by limit.
func (u *httpUpstream) begin(now, limit time.Time) {
	u.limit = limit
	u.extend(now)
}

// extend has reading look up again, in time for the limit. It is moved lazily: a
// deadline is a timer.
func (u *httpUpstream) extend(now time.Time) {
	next := u.deadline
	if left := next.Sub(now); left < lookEvery || left > 3*lookEvery {
		next = now.Add(2 * lookEvery)
	}
	if !u.limit.IsZero() && u.limit.Before(next) {
		next = u.limit
	}
	u.readBy(next)
}

// late reports whether the limit has passed.
func (u *httpUpstream) late(now time.Time) bool { return !u.limit.IsZero() && !now.Before(u.limit) }

func (u *httpUpstream) timedOut() error {
	return &attemptError{cause: &reason.Error{Reason: reason.RequestTimeout}, endpoint: u.endpoint.Addr}
}

// failed is a failure of the connection.
func (u *httpUpstream) failed(err error) error {
	ended := errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
	return &attemptError{
		cause: &reason.Error{Reason: reason.UpstreamClosed, Err: err}, endpoint: u.endpoint.Addr,
		stale: u.reused && ended && len(u.bytes()) == 0,
	}
}

// answered is an answer that counts as a failure. It stays unread.
func (u *httpUpstream) answered() *attemptError {
	return &attemptError{cause: &reason.Error{Reason: reason.UpstreamClosed}, endpoint: u.endpoint.Addr}
}

// outcome is what an attempt says of its endpoint.
func outcome(status int, err error) balance.Outcome {
	switch {
	case err == nil && status >= 500:
		return balance.ServerError
	case err == nil:
		return balance.Success
	}
	var failure *reason.Error // here, as it costs an allocation
	if errors.As(err, &failure) {
		switch failure.Reason {
		case reason.UpstreamClosed, reason.RequestTimeout, reason.BadResponse:
			return balance.ServerError
		}
	}
	return balance.Unknown
}

// obtain returns a connection for an attempt: fresh, if one that had been idle has
// just failed. A failure to connect is an *attemptError.
func (h *http1Conn) obtain(ctx context.Context, tried []netip.AddrPort, fresh bool) (*httpUpstream, error) {
	if up := h.held; up != nil {
		h.held = nil
		if !fresh && up.quiet() && !up.dialled.Looped() {
			return up, nil
		}
		up.picked.done(balance.Unknown)
		up.Close()
	}
	if h.plan.direct {
		h.record.attempt(route.Endpoint{Addr: h.accepted.Original}, false)
		return h.open(ctx, route.Endpoint{Addr: h.accepted.Original}, pick{})
	}
	backend := &h.plan.backend
	endpoint, ok := h.balancer.Pick(backend, h.plan.key, tried)
	if !ok && h.plan.retry != nil {
		endpoint, ok = h.balancer.Pick(backend, h.plan.key, nil)
	}
	if !ok {
		return nil, errNobodyLeft
	}
	picked := pick{&h.balancer, backend, endpoint.Addr}
	if !fresh {
		if up, ok := h.pool.Get(endpoint.Addr, time.Now()); ok {
			up.picked, up.reused, up.took = picked, true, 0
			return up, nil
		}
	}
	h.record.attempt(endpoint, h.Config.Own(endpoint.Addr.Addr()))
	return h.open(ctx, endpoint, picked)
}

// open connects to an endpoint.
func (h *http1Conn) open(ctx context.Context, endpoint route.Endpoint, picked pick) (*httpUpstream, error) {
	began := time.Now()
	c, err := h.dial(ctx, h.accepted, endpoint.Addr)
	if err != nil {
		var failure *reason.Error
		if errors.As(err, &failure) && another(err) {
			picked.done(balance.ConnectFailure)
			return nil, &attemptError{cause: failure, endpoint: endpoint.Addr, unsent: true}
		}
		picked.done(balance.Unknown)
		return nil, err
	}
	up, err := newHTTPUpstream(c, endpoint)
	if err != nil {
		picked.done(balance.Unknown)
		return nil, &reason.Error{Reason: reason.UpstreamClosed, Err: err}
	}
	_ = up.SetKeepAliveConfig(upstream.KeepAlive)
	up.picked, up.shared, up.took = picked, picked.backend != nil, time.Since(began)
	return up, nil
}

// discard closes the request's upstream connection.
func (h *http1Conn) discard() {
	if h.up != nil {
		h.up.Close()
		h.up = nil
	}
}

// giveBack keeps the request's upstream connection for the next one, if it is good
// for that.
func (h *http1Conn) giveBack() {
	up := h.up
	h.up = nil
	switch {
	case up == nil:
	case up.spent || len(up.bytes()) > 0 || up.dialled.Looped():
		up.Close()
	case up.shared:
		h.pool.Put(up.endpoint.Addr, up, time.Now())
	case h.last:
		up.Close()
	default:
		up.reused = true
		h.held = up
	}
}

// own reports whether requests of c go where it was going, on connections that
// belong to it alone.
func own(c listen.Conn, d route.Destination) bool {
	return c.Direction == listen.Inbound || d.Service == ""
}
