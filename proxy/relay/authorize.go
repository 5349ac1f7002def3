package relay

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/balance"
	"github.com/weirmesh/weir/proxy/http1"
	"github.com/weirmesh/weir/proxy/http2"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/mtls"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/route"
)

// What goes to the pod's own application is authorized: each request of HTTP, and each
// connection without any; from outside, and what comes back to its own pod. Who sends it
// says callerOf.

var errFragment = errors.New("the path has a fragment, which applications and policies could read differently")

// refusal is what a *reason.Error of policy_denied is about.
type refusal struct{ authz.Decision }

// Error is the policy's name, or that none allowed it.
func (r *refusal) Error() string { return r.Policy }

// evaluate holds a request, or with nil a connection that carries none, against what is
// demanded of callers and the policies there are now; it is false if it was not up to any
// policy. The error is a *reason.Error.
func (s *Server) evaluate(c listen.Conn, port uint16, m message) (authz.Decision, bool, error) {
	set, plain := s.Config.Authorization(), s.mustShow(c, port)
	switch {
	case set == nil && !plain, s.probes(c, port, m):
		return authz.Decision{Allowed: true}, false, nil
	case plain:
		return authz.Decision{}, false, &reason.Error{Reason: reason.PlaintextRefused, Err: fmt.Errorf("port %d", port)}
	}
	switch {
	case m == nil, string(m.Method()) == "CONNECT": // which has no path
	case !m.Prepare():
		return authz.Decision{}, true, &reason.Error{Reason: reason.BadRequest, Err: errPath}
	case bytes.IndexByte(m.RawPath(), '#') >= 0:
		return authz.Decision{}, true, &reason.Error{Reason: reason.BadRequest, Err: errFragment}
	}
	decision := set.Evaluate(s.callerOf(c), port, m)
	if !decision.Allowed {
		return decision, true, &reason.Error{Reason: reason.PolicyDenied, Err: &refusal{decision}}
	}
	return decision, true, nil
}

// mustShow reports whether a connection came in plain where mTLS is demanded.
func (s *Server) mustShow(c listen.Conn, port uint16) bool {
	return c.Direction == listen.Inbound && !c.Identity.Known() && s.Config.Peers(port) == route.Strict
}

// authorize is evaluate for what begins; the record says what was decided.
func (s *Server) authorize(c listen.Conn, port uint16, m message, r *record) error {
	decision, governed, err := s.evaluate(c, port, m)
	if governed && err == nil {
		r.entry.Decide(decision)
	}
	return err
}

// toOwn reports whether an endpoint is of this very pod, so that its policies are to be
// asked.
func (s *Server) toOwn(endpoint netip.AddrPort) bool {
	return s.Config.Authorization() != nil && s.Config.Own(endpoint.Addr())
}

// refusedOpaque says of an inbound connection whose client is silent whether it could be
// anything but HTTP, and how long it may be silent else.
func (s *Server) refusedOpaque(c listen.Conn) (time.Duration, bool) {
	set, port := s.Config.Authorization(), c.Original.Port()
	switch {
	case c.Direction != listen.Inbound || set.Evaluate(c.Identity, port, nil).Allowed:
		return 0, false
	case set.Hopeless(c.Identity, port):
		return refusedSilence, true
	}
	return keepAlive, true
}

// refusedSilence is how long a client that is refused whatever it says may take to say
// it: a request of HTTP is answered.
const refusedSilence = time.Second

// gate is what allows a connection, or a request that has made a tunnel of one, for as
// long as it goes on; nil: it is no policy's.
type gate func() error

// gate is that of a connection, with the head that made a tunnel of it or nil.
func (s *Server) gate(c listen.Conn, r *record, head *http1.Head) gate {
	port := c.Original.Port()
	switch {
	case r.handedOff:
		port = r.endpoint.Addr.Port()
	case c.Direction != listen.Inbound:
		return nil
	}
	return func() error {
		var m message
		if head != nil {
			m = &http1Request{Head: head}
		}
		_, _, err := s.evaluate(c, port, m)
		return err
	}
}

// Recheck ends what policies do not allow any more, or goes on with a peer whose root is
// trusted no more: any of that may have changed. It returns when all of it is told.
func (s *Server) Recheck() {
	s.mu.Lock()
	carriers := make([]carrier, 0, len(s.carriers))
	for c := range s.carriers {
		carriers = append(carriers, c)
	}
	s.mu.Unlock()
	review := s.review()
	for _, c := range carriers {
		c.recheck(review)
	}
	s.closeOutdated()
}

// recheck implements carrier.
func (p *pair) recheck(review *mtls.Review) {
	var refused *reason.Error
	if p.gate != nil && errors.As(p.gate(), &refused) ||
		errors.As(review.Check(p.client.secure), &refused) || errors.As(review.Check(p.upstream.secure), &refused) {
		p.abort(refused.Reason, refused.Err)
	}
}

// authorizeOwn authorizes a request that goes to an endpoint of this very pod.
func (h *http1Conn) authorizeOwn(endpoint route.Endpoint) error {
	if !h.toOwn(endpoint.Addr) {
		return nil
	}
	h.record.attempt(endpoint, true)
	h.handedOver(h.accepted, &h.view, h.record)
	return h.authorize(h.accepted, endpoint.Addr.Port(), &h.view, h.record)
}

// keepHead takes a copy of the request's head, whose buffer is needed for something else
// while it goes on.
func (h *http1Conn) keepHead() {
	if h.asked != &h.request {
		return
	}
	h.asked = nil
	if h.accepted.Direction != listen.Inbound && !h.record.handedOff {
		return
	}
	if kept := new(http1.Head); kept.ParseRequest(h.request.AppendTo(nil, http1.Silent)) == nil {
		h.asked = kept
	}
}

// recheck implements carrier. Who serves the request looks whether it is allowed still; a
// poller, which waits for its answer, has the goroutine do what is to be done if it is not.
func (h *http1Conn) recheck(review *mtls.Review) {
	h.distrust(review)
	h.poking.Lock()
	h.changed.Store(true)
	if up := h.awaited.Load(); up != nil {
		_ = up.SetReadDeadline(time.Unix(1, 0))
	}
	h.poking.Unlock()
	q := &h.quick
	q.mu.Lock()
	defer q.mu.Unlock()
	if (q.at == atAnswer || q.at == atPassing) && h.allowed() != nil {
		h.handOver(q.at)
	}
}

// allowed is what the policies there are now say of the request.
func (h *http1Conn) allowed() error {
	if allowed := h.gate(h.accepted, h.record, h.asked); allowed != nil {
		return allowed()
	}
	return nil
}

// revoked looks whether the request, which waits for up, is allowed still, if policies
// have changed.
func (h *http1Conn) revoked(up *httpUpstream) error {
	if !h.changed.Load() {
		return nil
	}
	h.poking.Lock()
	h.unpoke(up)
	h.poking.Unlock()
	return h.allowed()
}

// unpoke gives reading the time that it had.
func (h *http1Conn) unpoke(up *httpUpstream) {
	if h.changed.Swap(false) {
		_ = up.SetReadDeadline(up.deadline)
	}
}

// awaitNoMore is when up, which may be another request's soon, is not waited for.
func (h *http1Conn) awaitNoMore(up *httpUpstream) {
	h.poking.Lock()
	defer h.poking.Unlock()
	h.awaited.Store(nil)
	h.unpoke(up)
}

// handOver authorizes a stream that goes to an endpoint of this very pod, and reports
// whether it may go on.
func (e *http2Exchange) handOver(t *http2.Turn, endpoint route.Endpoint) bool {
	h, port := e.conn, endpoint.Addr.Port()
	policies := h.Config.Authorization()
	if e.port == 0 { // or else it is done, and others may read the request
		h.handedOver(h.accepted, &e.request, e.record)
	}
	if err := h.authorize(h.accepted, port, &e.request, e.record); err != nil {
		e.record.attempt(endpoint, true)
		e.picked.done(balance.Unknown)
		e.fail(t, err)
		return false
	}
	return e.registers(t, policies, port)
}

// registers has a stream watched that is for the application, and was authorized by these
// policies: others may come while it goes on, and mTLS may be demanded. It reports whether
// it may go on: that may have come already.
func (e *http2Exchange) registers(t *http2.Turn, policies *authz.Set, port uint16) bool {
	h := e.conn
	e.port = port
	h.mu.Lock()
	if h.registered == nil {
		h.registered = map[*http2Exchange]struct{}{}
	}
	h.registered[e] = struct{}{}
	h.mu.Unlock()
	if h.Config.Authorization() == policies && !h.mustShow(h.accepted, port) {
		return true
	}
	_, _, err := h.evaluate(h.accepted, port, &e.request)
	if err != nil {
		e.picked.done(balance.Unknown)
		e.fail(t, err)
	}
	return err == nil
}

func (e *http2Exchange) unregister() {
	e.conn.mu.Lock()
	defer e.conn.mu.Unlock()
	delete(e.conn.registered, e)
}

// recheck implements carrier, of all streams.
func (h *http2Conn) recheck(review *mtls.Review) {
	h.distrust(review)
	h.mu.Lock()
	streams := slices.Collect(maps.Keys(h.registered))
	h.mu.Unlock()
	for _, e := range streams {
		e.recheck()
	}
}

// recheck ends a stream that is not allowed any more.
func (e *http2Exchange) recheck() {
	request := http2Request{stream: e.stream} // the exchange's own is another goroutine's
	_, _, err := e.conn.evaluate(e.conn.accepted, e.port, &request)
	var refused *reason.Error
	if errors.As(err, &refused) {
		e.later(func(t *http2.Turn) { e.cutOff(t, refused) })
	}
}
