package relay

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weirmesh/weir/proxy/balance"
	"github.com/weirmesh/weir/proxy/http1"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/mtls"
	"github.com/weirmesh/weir/proxy/reason"
)

const (
	// headTimeout is Server.Head's, and how long a body may take that is to be kept.
	headTimeout = 30 * time.Second
	// keepAlive is how long a client's connection may be idle, lastIdle how long
	// once it, or the proxy, is to end. Where nobody accepts before the proxy has, those
	// who call wait for that: it is much less than mtls.Timeout, another proxy's patience.
	keepAlive = time.Hour
	lastIdle  = time.Second
	// lingering is how long a client that is still sending may take to read an
	// answer that ends the connection.
	lingering = time.Second
	// glanceEvery is how often it is looked whether a client is still there whose
	// request is nowhere.
	glanceEvery = 100 * time.Millisecond
)

// http1Conn is a client's connection that carries HTTP/1. Requests are served one
// after the other, by one goroutine; a second one is there while a body is sent
// that was not there with its head.
type http1Conn struct {
	*Server
	accepted listen.Conn
	client   *conn
	ctx      context.Context // ends with abort
	cancel   context.CancelFunc

	// held is an upstream connection of this client's own: to the application,
	// whose connections are its callers', and to what is no Service. Others are the
	// pool's.
	held *httpUpstream

	request, response http1.Head
	// taken is how much of the client's buffer is the request, with as much of its
	// body as is there; it stays in the buffer for another attempt. 0 once the rest
	// is being uploaded.
	taken    int
	body     http1.Body // of the request, behind that
	method   []byte     // a copy: it outlives the buffer
	view     http1Request
	plan     plan
	record   *record // lent by records
	out      []byte  // for heads that are not passed on as they came
	attempt  int
	up       *httpUpstream // of the request; nil: none, or done with
	upload   *upload
	awaited  atomic.Pointer[httpUpstream] // for abort
	aborted  atomic.Bool
	strange  atomic.Bool // the client's root is trusted no more, or a certificate has ended
	asked    *http1.Head // the request's, of which policies may change; nil: it is no HTTP to them
	changed  atomic.Bool // they have
	poking   sync.Mutex  // is held while awaited is woken for that
	idle     idleness
	answered bool // a final head went to the client, or part of one
	last     bool // no other request is read
	served   int  // requests that were logged

	quick   quick
	outer   context.Context // of mirrors, which outlive the connection
	planned error           // why the plan could not be made, with the request atPlan
	rest    []byte          // of what is being sent atSending, passed on atPassing

	answerBody       http1.Body // behind that of it which is being passed on
	bodied, skipping int        // how much of the body that is, and of up's buffer
}

// serveHTTP1 serves a client until one of the ends closes. early, if not nil, is an
// upstream connection that is there already, for the first request. Of each
// request there is a record; it reports how many there were.
func (s *Server) serveHTTP1(ctx context.Context, c listen.Conn, client *conn, early *httpUpstream) (int, error) {
	h := &http1Conn{Server: s, accepted: c, client: client, held: early, outer: ctx}
	h.ctx, h.cancel = context.WithCancel(ctx)
	defer h.cancel()
	h.quick.at = away
	s.watch(h)
	defer s.unwatch(h)
	defer endsWith(client.secure, h.estrange)()
	defer h.end()
	if err := s.review().Check(client.secure); err != nil {
		return 0, err // its root went before it was watched
	}
	for {
		at := h.wait()
		if at == atHead {
			if err := h.readRequest(); err != nil {
				if h.served > 0 && len(h.client.bytes()) == 0 {
					// Between requests a reset is an end like any other: HAProxy ends so what it
					// does not keep.
					return h.served, nil
				}
				refused, err := h.refuse(err)
				if refused {
					h.served++
				}
				return h.served, err
			}
		}
		h.serveRequest(at)
		h.log(time.Now())
		if h.last {
			return h.served, nil
		}
	}
}

// log passes on what is known of the request, which ended now.
func (h *http1Conn) log(now time.Time) {
	for _, entry := range h.record.entries(now) {
		h.Log(entry)
	}
	records.Put(h.record) // a kilobyte that an idle connection need not hold
	h.record = nil
	h.served++
}

func (h *http1Conn) end() {
	if h.quick.timer != nil {
		h.quick.timer.Stop()
	}
	if h.held != nil {
		h.held.picked.done(balance.Unknown)
		h.held.Close()
	}
	h.client.drop()
}

// abort ends the connection at once, from any goroutine; closing it will send a
// reset.
func (h *http1Conn) abort(reason.Reason, error) {
	h.aborted.Store(true)
	h.cancel()
	past := time.Unix(1, 0)
	_ = h.client.SetLinger(0)
	_ = h.client.SetDeadline(past)
	if up := h.awaited.Load(); up != nil {
		_ = up.SetDeadline(past)
	}
	h.takeBack(false)
}

// readRequest waits for a request's head. The error is an *http1.Error,
// http1.ErrTooLarge, or the connection's; io.EOF if the client is done.
func (h *http1Conn) readRequest() error {
	var scan http1.Scanner
	for {
		n, err := scan.End(h.client.bytes())
		if err != nil {
			return err
		}
		if n > 0 {
			return h.request.ParseRequest(h.client.bytes()[:n])
		}
		// Moved lazily: a deadline is a timer. Without one, what there is of the head was
		// read when it was looked at what the client speaks.
		now := time.Now()
		head := cmp.Or(h.Head, headTimeout)
		switch left := h.client.deadline.Sub(now); {
		case len(h.client.bytes()) == 0 && left < keepAlive/2:
			h.client.readBy(now.Add(keepAlive))
		case len(h.client.bytes()) > 0 && (left > head || h.client.deadline.IsZero()):
			h.client.readBy(now.Add(head))
		}
		if h.aborted.Load() {
			return os.ErrDeadlineExceeded // that of abort, if ours has taken its place
		}
		if len(h.client.bytes()) > 0 {
			if err := h.client.fill(); err != nil {
				return err
			}
			continue
		}
		h.idle.begin(h.client, h.leaving)
		err = h.client.fill()
		h.idle.end(h.client)
		if err != nil {
			return err
		}
	}
}

// drain has the connection end soon, if it is idle. Its client may be about to send
// a request: this is no worse than what any server does, and rarer.
func (h *http1Conn) drain() {
	h.idle.shorten(h.client)
	h.takeBack(true)
}

// leaving reports whether the connection is to end with the request that it carries.
func (h *http1Conn) leaving() bool { return h.draining.Load() || h.strange.Load() }

// idleness is whether a client's connection is between requests, when its time may
// be shortened from another goroutine.
type idleness struct {
	mu    sync.Mutex
	idle  bool
	short bool // the deadline is not the connection's owner's
}

// begin is when c is idle from now on; leaving is asked after whoever shortens it knows.
func (i *idleness) begin(c *conn, leaving func() bool) {
	i.mu.Lock()
	i.idle = true
	i.mu.Unlock()
	if leaving() {
		i.shorten(c)
	}
}

func (i *idleness) shorten(c *conn) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.idle && !i.short {
		i.short = true
		_ = c.SetReadDeadline(time.Now().Add(lastIdle))
	}
}

func (i *idleness) end(c *conn) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.idle = false
	if i.short {
		i.short = false
		_ = c.SetReadDeadline(c.deadline)
	}
}

// refuse answers what is no request, of which nothing has gone upstream, and
// reports whether there was something.
func (h *http1Conn) refuse(err error) (bool, error) {
	var broken *http1.Error
	status := 0
	switch {
	case errors.As(err, &broken):
		status = 400
	case errors.Is(err, http1.ErrTooLarge):
		status = 431
	case errors.Is(err, os.ErrDeadlineExceeded) && len(h.client.bytes()) > 0:
		status = 408
	case errors.Is(err, io.EOF), errors.Is(err, os.ErrDeadlineExceeded):
		return false, nil
	case errors.Is(err, mtls.ErrTruncated) && len(h.client.bytes()) == 0:
		return false, nil // nothing is missing
	default:
		return false, &reason.Error{Reason: reason.ClientGone, Err: err}
	}
	h.record = records.Get().(*record)
	h.record.reset(h.accepted)
	h.record.begin(time.Now(), 1, nil, nil)
	failure := &reason.Error{Reason: reason.BadRequest, Err: err}
	h.record.fail(failure)
	h.last, h.request = true, http1.Head{Minor: 1}
	h.answer(failed(failure, status))
	h.linger()
	for _, entry := range h.record.entries(time.Now()) {
		h.Log(entry)
	}
	return true, nil
}

// serveRequest serves the request whose head is read, and which has come so far.
func (h *http1Conn) serveRequest(at step) {
	err := h.planned
	h.planned = nil
	if at == atHead {
		h.begin()
		h.plan = plan{}
		if err = h.take(); err == nil {
			err = h.decide()
		}
	}
	if err == nil && h.plan.answer == nil {
		if at <= atPlan {
			h.mirror()
		}
		err = h.forward(at)
	}
	switch {
	case err != nil:
		h.fail(err)
	case h.plan.answer != nil:
		h.answer(h.plan.answer)
	}
	h.plan.leave(h.Server)
	h.finish(time.Now())
}

// begin notes what the request is.
func (h *http1Conn) begin() {
	h.method = append(h.method[:0], h.request.Method...)
	h.up, h.upload, h.answered, h.last, h.asked = nil, nil, false, h.request.Close, &h.request
	path, _ := h.request.Path()
	h.record = records.Get().(*record)
	h.record.reset(h.accepted)
	h.record.begin(time.Now(), h.request.Minor, h.method, path)
	if h.served == 0 {
		h.record.met(h.accepted)
	}
}

// take finds out how much of the request is there.
func (h *http1Conn) take() error {
	head := len(h.request.Raw())
	h.body = bodyOf(&h.request)
	n, err := h.body.Next(h.client.bytes()[head:])
	if h.taken = head + n; err != nil {
		h.last = true
		return &reason.Error{Reason: reason.BadRequest, Err: err}
	}
	return nil
}

// decide makes the plan.
func (h *http1Conn) decide() error {
	d, err := h.destination(h.ctx, h.accepted)
	if err != nil {
		return err
	}
	if !h.body.Done() && twice(d) {
		if err := h.gather(); err != nil {
			return err
		}
	}
	h.view = http1Request{Head: &h.request}
	return h.plan.make(h.Server, h.accepted, d, &h.view, h.record)
}

// gather waits for the rest of a body, as long as it fits into the buffer.
func (h *http1Conn) gather() error {
	if h.request.Expect {
		return nil
	}
	h.client.readBy(time.Now().Add(headTimeout))
	for !h.body.Done() && len(h.client.bytes()) < maxBuffer && h.body.Left() <= int64(maxBuffer-len(h.client.bytes())) {
		head := len(h.request.Raw())
		if err := h.client.fill(); err != nil {
			return &reason.Error{Reason: reason.ClientGone, Err: err}
		}
		// The buffer may be another now.
		if err := h.request.ParseRequest(h.client.bytes()[:head]); err != nil {
			return &reason.Error{Reason: reason.BadRequest, Err: err}
		}
		if err := h.take(); err != nil {
			return err
		}
	}
	return nil
}

// forward has the request answered by an endpoint, by another one where that did
// not work and may be tried again. The first attempt has come so far.
func (h *http1Conn) forward(at step) error {
	var tried []netip.AddrPort
	var before error // of the attempt before
	fresh := false
	for h.attempt = 1; ; h.attempt++ {
		up, err := h.up, error(nil)
		if at <= atPlan {
			up, err = h.obtain(h.ctx, tried, fresh)
		}
		if up == nil && before != nil && errors.Is(err, errNobodyLeft) {
			return before
		}
		if err == nil {
			err = h.try(up, at)
			at = atHead
			up.picked.done(outcome(h.response.Status, err))
			if h.up = up; err != nil {
				h.discard()
			}
		}
		if err == nil {
			return nil
		}
		h.record.missed(h.Server, err)
		var failure *attemptError // here, as it costs an allocation
		switch {
		case !errors.As(err, &failure):
			return err
		case !h.mayTry(failure):
			return failure.cause
		}
		if err := h.pause(h.plan.retried()); err != nil {
			return err
		}
		before = failure.cause
		if fresh = failure.stale; !fresh {
			tried = append(tried, failure.endpoint)
		}
	}
}

// pause lets time pass before another attempt, unless there will be none: the client
// has left, or the connection is to end.
func (h *http1Conn) pause(d time.Duration) error {
	if d == 0 {
		return nil
	}
	_, err := h.waitFor(nil, time.Now().Add(d))
	return err
}

// waitFor waits until something is there or time is over, and reports whether it is
// there. It looks after the client meanwhile.
func (h *http1Conn) waitFor(something <-chan struct{}, until time.Time) (bool, error) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		left := time.Until(until)
		if left <= 0 {
			return false, nil
		}
		timer.Reset(min(left, glanceEvery))
		select {
		case <-something:
			return true, nil
		case <-h.ctx.Done():
			return false, &reason.Error{Reason: reason.Shutdown}
		case <-timer.C:
		}
		if h.client.reset() {
			return false, &reason.Error{Reason: reason.ClientGone}
		}
	}
}

// mayTry reports whether the request can be and may be sent again.
func (h *http1Conn) mayTry(failure *attemptError) bool {
	return !h.answered && h.upload == nil && h.plan.again(h.Server, failure, h.method, h.attempt)
}

// try sends the request to up and passes the answer on.
func (h *http1Conn) try(up *httpUpstream, at step) error {
	now := time.Now()
	if at <= atPlan {
		h.sending(up, now)
		up.begin(now, h.plan.limit(now))
	} else {
		up.extend(now)
	}
	h.awaited.Store(up)
	defer h.awaitNoMore(up)
	switch {
	case h.aborted.Load():
		return &reason.Error{Reason: reason.Shutdown}
	case at == atAnswer && (h.quick.gone || h.client.reset()):
		return &reason.Error{Reason: reason.ClientGone}
	case at == atPassing:
		return h.passRest(up)
	}
	if at < atAnswer {
		if at <= atPlan {
			h.rest = h.textFor(up)
		}
		if err := h.send(up); err != nil {
			return err
		}
	}
	if err := h.receive(up); err != nil {
		return err
	}
	return h.passOn(up)
}

// sending notes that the request is sent to up now.
func (h *http1Conn) sending(up *httpUpstream, now time.Time) {
	own := !h.plan.direct && h.Config.Own(up.endpoint.Addr.Addr())
	if own {
		h.handedOver(h.accepted, &h.view, h.record)
	}
	h.record.use(now, up, own)
}

// textFor is what is there of the request, as up is to have it.
func (h *http1Conn) textFor(up *httpUpstream) []byte {
	taken := h.client.bytes()[:h.taken]
	if hop := h.hopTo(up); !h.request.Unchanged(hop) {
		h.out = append(h.request.AppendTo(h.out[:0], hop), taken[len(h.request.Raw()):]...)
		return h.out
	}
	return taken
}

// send writes the rest of what is there of the request, and has what is not there
// follow.
func (h *http1Conn) send(up *httpUpstream) error {
	n, err := up.Write(h.rest)
	h.rest = nil
	h.record.sent(uint64(n))
	h.record.requestBody(h.taken - len(h.request.Raw()))
	if err != nil {
		return up.failed(err)
	}
	if h.body.Done() {
		return nil
	}
	// From here on it cannot be sent again: the head's buffer is the body's.
	h.keepHead()
	h.client.skip(h.taken)
	h.taken = 0
	h.client.readBy(time.Time{})
	h.upload = startUpload(h.client, up, h.body)
	return nil
}

// hopTo is what is said to the upstream of its connection. The application's is
// its caller's, who may want it closed.
func (h *http1Conn) hopTo(up *httpUpstream) http1.Hop {
	switch {
	case h.request.Close && h.request.Minor == 1 && !up.shared:
		return http1.Close
	case h.request.KeepAlive && h.request.Minor == 0:
		return http1.KeepAlive
	}
	return http1.Silent
}

// receive waits for the answer's final head. Informational ones go by (RFC 9110,
// section 15.2), but not to a client that does not know them.
func (h *http1Conn) receive(up *httpUpstream) error {
	for {
		if err := h.readResponse(up); err != nil {
			return err
		}
		if h.response.Status/100 != 1 || h.response.Status == 101 {
			break
		}
		raw := h.response.Raw()
		if h.request.Minor > 0 {
			if _, err := h.client.Write(raw); err != nil {
				return &reason.Error{Reason: reason.ClientGone, Err: err}
			}
		}
		up.skip(len(raw))
	}
	if h.response.Status == 101 && !h.request.Upgrade {
		return &reason.Error{Reason: reason.BadResponse, Err: errors.New("101 (Switching Protocols) without a request for it")}
	}
	if h.plan.counts(h.response.Status) {
		// What may not be tried again is the client's answer.
		if bad := up.answered(); h.mayTry(bad) {
			return bad
		}
	}
	return nil
}

// readResponse waits for one head.
func (h *http1Conn) readResponse(up *httpUpstream) error {
	var scan http1.Scanner
	for {
		n, err := scan.End(up.bytes())
		if err == nil && n > 0 {
			h.record.firstByte()
			err = h.response.ParseResponse(up.bytes()[:n], h.method)
		}
		switch {
		case err != nil:
			return &reason.Error{Reason: reason.BadResponse, Err: err}
		case n > 0:
			return nil
		}
		if err := h.await(up); err != nil {
			return err
		}
	}
}

// await waits for bytes of up, and looks after the client and the clock meanwhile.
func (h *http1Conn) await(up *httpUpstream) error {
	for {
		if err := h.revoked(up); err != nil {
			return err
		}
		err := up.fill()
		switch {
		case err == nil:
			return nil
		case up.dialled.Looped():
			return &reason.Error{Reason: reason.Loop}
		case h.upload.failure() != nil:
			return h.upload.failure()
		case h.aborted.Load():
			return &reason.Error{Reason: reason.Shutdown}
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return up.failed(err)
		case up.late(time.Now()):
			return up.timedOut()
		case h.client.reset():
			return &reason.Error{Reason: reason.ClientGone}
		}
		up.extend(time.Now())
	}
}

// passOn gives the client the answer whose head is read.
func (h *http1Conn) passOn(up *httpUpstream) error {
	h.answerBody = h.response.Body
	n, err := h.answerBody.Next(up.bytes()[len(h.response.Raw()):])
	if err != nil {
		return &reason.Error{Reason: reason.BadResponse, Err: err}
	}
	h.rest = h.answerFor(up, n)
	return h.passRest(up)
}

// answerFor is the answer's head, with the beginning of its body, as the client is to
// have it.
func (h *http1Conn) answerFor(up *httpUpstream, n int) []byte {
	head := len(h.response.Raw())
	h.bodied, h.skipping = n, head+n
	hop := h.conclude(up)
	h.plan.edit(&h.response)
	h.answered = true
	out := up.bytes()[:head+n]
	if !h.response.Unchanged(hop) {
		h.out = append(h.response.AppendTo(h.out[:0], hop), out[head:]...)
		return h.out
	}
	return out
}

// passRest passes on the rest of the answer, of which some is there.
func (h *http1Conn) passRest(up *httpUpstream) error {
	for {
		n, err := h.client.Write(h.rest)
		h.record.received(uint64(n))
		if err != nil {
			return &reason.Error{Reason: reason.ClientGone, Err: err}
		}
		h.passed(up)
		if h.answerBody.Done() {
			return nil
		}
		if h.answerBody.Kind == http1.Tunnel {
			return h.tunnel(up)
		}
		if len(up.bytes()) == 0 { // or the poller has left some
			if err := h.await(up); err != nil {
				if h.answerBody.Kind == http1.UntilClose && up.eof {
					return nil
				}
				return err
			}
		}
		if n, err = h.answerBody.Next(up.bytes()); err != nil {
			return &reason.Error{Reason: reason.BadResponse, Err: err}
		}
		h.rest, h.bodied, h.skipping = up.bytes()[:n], n, n
	}
}

// passed is when what was there is passed on.
func (h *http1Conn) passed(up *httpUpstream) {
	h.record.responseBody(h.bodied)
	up.skip(h.skipping)
	h.rest, h.bodied, h.skipping = nil, 0, 0
}

// conclude settles by the answer's head whether the connections are good for more,
// and returns what the client is told of its own.
func (h *http1Conn) conclude(up *httpUpstream) http1.Hop {
	r := &h.response
	h.record.answered(r.Status)
	up.spent = up.spent || r.Close || r.Body.Kind == http1.Tunnel
	h.last = h.last || h.leaving() || r.Body.Kind == http1.UntilClose || r.Body.Kind == http1.Tunnel ||
		// A client does not know better of an old answer than that it ends so.
		r.Minor == 0 && !r.KeepAlive ||
		// The application's connection is its caller's.
		r.Close && h.accepted.Direction == listen.Inbound ||
		// A body that is still coming may not be wanted any more.
		h.upload != nil && r.Status >= 300
	switch {
	case h.last && r.Minor == 1 && r.Body.Kind != http1.Tunnel:
		return http1.Close
	case !h.last && (h.request.Minor == 0 || r.Minor == 0):
		return http1.KeepAlive
	}
	return http1.Silent
}

// fail ends a request that could not be served: with an answer, or where there is
// one already, with a reset.
func (h *http1Conn) fail(err error) {
	var failure *reason.Error
	if !errors.As(err, &failure) {
		failure = &reason.Error{Reason: reason.ConnectFailed, Err: err}
	}
	h.record.fail(failure)
	if status := failure.Reason.Status(); status > 0 && !h.answered && !h.aborted.Load() {
		a := failed(failure, status)
		if wait := h.plan.wait; wait > 0 {
			a.fields = append(a.fields, retryAfter(wait))
		}
		h.plan.edit(a)
		h.answer(a)
		return
	}
	h.last = true
	h.abort(failure.Reason, failure)
}

// answer answers in place of an endpoint.
func (h *http1Conn) answer(a *answer) {
	h.last = h.last || !h.body.Done() || h.upload != nil || h.leaving()
	h.answered = true
	h.record.answered(a.status)
	h.record.responseBody(len(a.body))
	h.out = a.appendHTTP1(h.out[:0], h.request.Minor, string(h.method) == "HEAD", h.last)
	n, err := h.client.Write(h.out)
	h.record.received(uint64(n))
	h.last = h.last || err != nil
}

// finish settles what becomes of the client's connection after a request.
func (h *http1Conn) finish(now time.Time) {
	if h.upload != nil && !h.upload.wait(lingering) {
		h.last = true
		h.client.readBy(time.Unix(1, 0))
		<-h.upload.done
	}
	if h.upload != nil && !h.upload.complete {
		h.last = true
		h.discard()
	}
	if h.upload != nil {
		h.record.uploaded(h.upload.moved)
	}
	h.giveBack(now)
	h.client.skip(h.taken)
	h.taken = 0
	if h.last {
		h.linger()
	}
}

// linger lets a client that is still sending read the answer: what it sends to a
// closed connection would have the answer thrown away.
func (h *http1Conn) linger() {
	if h.aborted.Load() {
		return
	}
	if h.client.secure != nil { // it says so by writing
		_ = h.client.SetWriteDeadline(time.Now().Add(lingering))
	}
	if h.client.CloseWrite() != nil {
		return
	}
	h.client.readBy(time.Now().Add(lingering))
	for {
		h.client.drop()
		if h.client.fill() != nil {
			return
		}
	}
}

// tunnel joins the two connections, which carry HTTP no more, with what was read
// ahead of either.
func (h *http1Conn) tunnel(up *httpUpstream) error {
	h.keepHead()
	h.client.skip(h.taken)
	h.taken = 0
	if rest := h.client.bytes(); len(rest) > 0 {
		if _, err := up.Write(rest); err != nil {
			return up.failed(err)
		}
		h.record.sent(uint64(len(rest)))
		h.client.skip(len(rest))
	}
	h.client.readBy(time.Time{})
	h.awaitNoMore(up)
	up.readBy(time.Time{})
	sent, received, cause := h.carry(h.client, up.conn, h.gate(h.accepted, h.record, h.asked))
	h.record.sent(sent)
	h.record.received(received)
	if cause != nil {
		return cause
	}
	return nil
}
