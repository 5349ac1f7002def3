package relay

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/balance"
	"github.com/weirmesh/weir/proxy/http2"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/mtls"
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
	owner    upstream.Owner // in the pool
	shared   bool           // it goes back to the pool
	reused   bool           // it has carried a request before this one
	spent    bool           // it is not good for another request
	picked   pick           // of this request, until its outcome is known
	took     time.Duration  // to connect, if that was for this request

	limit time.Time // of this attempt; zero: none
	since time.Time // it has been idle; of one that is held

	poller *http2.Poller             // that tells user; nil: nobody is told
	user   atomic.Pointer[http1Conn] // whose request it has, if a poller serves that
	said   atomic.Bool               // it has said something while nobody's was
	ended  atomic.Bool               // it has said its last
}

func newHTTPUpstream(c *upstream.Conn, e route.Endpoint) (*httpUpstream, error) {
	buffered, err := newUpstreamConn(c)
	if err != nil {
		c.Close()
		return nil, err
	}
	return &httpUpstream{conn: buffered, dialled: c, endpoint: e}, nil
}

// Close ends the connection.
func (u *httpUpstream) Close() error {
	u.unwatch()
	u.drop()
	if u.secure != nil && u.stream == nil {
		u.secure.Release()
	}
	return u.dialled.Close()
}

// key is where the connection is kept.
func (u *httpUpstream) key() upstream.Key {
	key := upstream.Key{Addr: u.endpoint.Addr, Owner: u.owner}
	if u.secure != nil {
		key.Identity, key.Trust = u.endpoint.Identity, u.dialled.Trust
	}
	return key
}

// Quiet reports whether nothing has come since the last answer, and the connection is
// good for another request.
func (u *httpUpstream) Quiet() bool { return u.quiet() && !pastEnd(u.dialled, time.Now()) }

// quiet is conn's, without a look where a poller would have told of whatever has come: up
// to when it looked itself, which is less than upstream.Fresh ago.
func (u *httpUpstream) quiet() bool {
	if u.poller == nil || u.more() || u.said.Load() {
		return u.conn.quiet()
	}
	return len(u.bytes()) == 0 && !u.over()
}

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
	if u.refused(err) {
		return &attemptError{cause: &reason.Error{Reason: reason.TLSRefused, Err: err}, endpoint: u.endpoint.Addr, unsent: true}
	}
	ended := errors.Is(err, io.EOF) || errors.Is(err, mtls.ErrTruncated) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
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
		err := error(nil)
		if !fresh && up.quiet() && !up.dialled.Looped() && !h.outdated(up.dialled, time.Now()) {
			// One that was dialled before there was a request may lead to this very pod.
			if h.plan.direct {
				return up, nil
			}
			if err = h.authorizeOwn(up.endpoint); err == nil {
				return up, nil
			}
		}
		up.picked.done(balance.Unknown)
		up.Close()
		if err != nil {
			return nil, err
		}
	}
	if h.plan.direct {
		endpoint := route.Endpoint{Addr: h.accepted.Original, Identity: h.plan.shows}
		h.record.attempt(endpoint, false)
		return h.open(ctx, endpoint, pick{}, place{})
	}
	f, ok, err := found{}, false, error(nil)
	owner := ownerOf(&h.plan.backend)
	if h.lines.empty(owner) {
		f, ok, err = h.find(owner, tried, fresh)
	}
	if !ok && err == nil {
		f, err = h.findInLine(owner, tried, fresh)
	}
	if err != nil {
		return nil, err
	}
	if err := h.authorizeOwn(f.endpoint); err != nil {
		f.leave()
		return nil, err
	}
	return h.use(ctx, f)
}

// found is an endpoint for an attempt, with a connection that had been idle, or a
// place for a new one.
type found struct {
	up       *httpUpstream
	endpoint route.Endpoint
	picked   pick
	place    place
}

// leave gives back what is not used.
func (f *found) leave() {
	if f.up != nil {
		f.up.picked.done(balance.Unknown)
		f.up.Close()
		return
	}
	f.picked.done(balance.Unknown)
	f.place.leave()
}

// find looks for one. It is false if the backend has no place for another
// connection. The error is errNobodyLeft.
func (h *http1Conn) find(owner upstream.Owner, tried []netip.AddrPort, fresh bool) (found, bool, error) {
	backend := &h.plan.backend
	endpoint, ok := h.balancer.Pick(backend, h.plan.key, tried)
	if !ok && h.plan.retry != nil {
		endpoint, ok = h.balancer.Pick(backend, h.plan.key, nil)
	}
	if !ok {
		return found{}, false, errNobodyLeft
	}
	f := found{endpoint: endpoint, picked: pick{&h.balancer, backend, endpoint.Addr}}
	if !fresh {
		if f.up = h.pooled(owner, f.picked, endpoint, time.Now()); f.up != nil {
			return f, true, nil
		}
	}
	if f.place, ok = h.takePlace(backend); !ok {
		f.picked.done(balance.Unknown)
	}
	return f, ok, nil
}

// pooled is a connection to the endpoint that was picked which had been idle; nil:
// there is none.
func (h *http1Conn) pooled(owner upstream.Owner, picked pick, endpoint route.Endpoint, now time.Time) *httpUpstream {
	up, ok := h.pool.Get(h.keyOf(owner, endpoint), now)
	if !ok {
		return nil
	}
	up.picked, up.reused = picked, true
	return up
}

// findInLine is find where it has to wait.
func (h *http1Conn) findInLine(owner upstream.Owner, tried []netip.AddrPort, fresh bool) (found, error) {
	var f found
	err := h.stand(&h.plan.backend, owner, h.patience(h.plan.ends), h.waitFor, func() (bool, error) {
		var ok bool
		var err error
		f, ok, err = h.find(owner, tried, fresh)
		return ok, err
	})
	if err != nil && h.plan.over(time.Now()) {
		err = &reason.Error{Reason: reason.RequestTimeout, Err: err}
	}
	return f, err
}

// use makes a connection of what was found.
func (h *http1Conn) use(ctx context.Context, f found) (*httpUpstream, error) {
	if f.up != nil {
		return f.up, nil
	}
	h.record.attempt(f.endpoint, h.Config.Own(f.endpoint.Addr.Addr()))
	return h.open(ctx, f.endpoint, f.picked, f.place)
}

// open connects to an endpoint, in the time that the request has.
func (h *http1Conn) open(ctx context.Context, endpoint route.Endpoint, picked pick, place place) (*httpUpstream, error) {
	began := time.Now()
	limit := h.plan.limit(began)
	if !limit.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, limit)
		defer cancel()
	}
	c, err := h.reachStream(ctx, endpoint)
	if err != nil {
		place.leave()
		var failure *reason.Error
		switch {
		case !limit.IsZero() && !time.Now().Before(limit):
			failure = &reason.Error{Reason: reason.RequestTimeout, Err: errors.New("the endpoint did not take the connection in time")}
		case !errors.As(err, &failure) || !another(err):
			picked.done(balance.Unknown)
			return nil, err
		}
		picked.done(balance.ConnectFailure)
		return nil, &attemptError{cause: failure, endpoint: endpoint.Addr, unsent: true}
	}
	place.keep(c)
	up, err := newHTTPUpstream(c, endpoint)
	if err != nil {
		picked.done(balance.Unknown)
		return nil, &reason.Error{Reason: reason.UpstreamClosed, Err: err}
	}
	up.picked, up.shared, up.took = picked, picked.backend != nil, time.Since(began)
	up.owner = place.owner
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
// for that, from now on.
func (h *http1Conn) giveBack(now time.Time) {
	up := h.up
	h.up = nil
	switch {
	case up == nil:
	case up.spent || up.ended.Load() || len(up.bytes()) > 0 || up.dialled.Looped() || h.outdated(up.dialled, now):
		up.Close()
	case up.shared:
		h.pool.Put(up.key(), up, now)
		h.lines.call(up.owner)
	case h.last:
		up.Close()
	default:
		up.reused, up.since = true, now
		h.held = up
	}
}

// own reports whether requests of c go where it was going, on connections that
// belong to it alone.
func own(c listen.Conn, d route.Destination) bool {
	return c.Direction == listen.Inbound || d.Service == ""
}
