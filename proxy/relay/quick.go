package relay

import (
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/weirmesh/weir/proxy/balance"
	"github.com/weirmesh/weir/proxy/http1"
	"github.com/weirmesh/weir/proxy/http2"
	"github.com/weirmesh/weir/proxy/mux"
	"github.com/weirmesh/weir/proxy/route"
	"github.com/weirmesh/weir/proxy/upstream"
)

// Most requests are small, go to an endpoint that a connection is open to, and are
// answered with something not too large, so that nothing is waited for but the answer.
// A poller serves these, in place of the connection's goroutine, which sleeps: calls
// that read and write what is there, and nothing in between. Whatever is not so
// ordinary wakes the goroutine, which goes on where the poller was, and waits for
// whatever there is to wait for; http1.go is how it does that.

// step is how far a request has come.
type step uint8

const (
	atHead    step = iota // it is being read, or not there yet
	atPlan                // it has a plan
	atSending             // part of it is sent to h.up
	atAnswer              // all of it is; the answer is not there yet
	atPassing             // part of the answer is passed on
	away                  // the goroutine has it
)

const (
	// shortly is how long the poller waits for the rest of a request: heads and small bodies
	// often come in two packets, one after the other.
	shortly = 2 * time.Millisecond
	// pieces is how many reads of an answer the poller passes on; of what is larger the
	// goroutine does the rest.
	pieces = 16
)

// pollers serve connections, one for each processor that is used. The zero value is
// ready for use; close it.
type pollers struct {
	mu      sync.Mutex
	all     []*http2.Poller
	next    int
	closed  bool
	running sync.WaitGroup
	turn    mux.Turn // of all of them, and of goroutines that do a poller's work
}

// choose returns one for a connection; nil if there is none.
func (p *pollers) choose() *http2.Poller { return p.get(runtime.GOMAXPROCS(0)) }

// get returns one of so many for a connection; nil if there is none.
func (p *pollers) get(processors int) *http2.Poller {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	p.next++
	at := p.next % processors
	if at >= len(p.all) {
		one, err := http2.NewPoller(p.turn.Flush)
		if err != nil {
			return nil
		}
		at = len(p.all)
		p.all = append(p.all, one)
		p.running.Go(one.Run)
	}
	return p.all[at]
}

func (p *pollers) close() {
	p.mu.Lock()
	p.closed = true
	for _, one := range p.all {
		one.Close()
	}
	p.mu.Unlock()
	p.running.Wait()
}

// quick is what a poller and the connection's goroutine share. Everything else of the
// connection is the poller's, under the lock, while at is not away; and else the
// goroutine's.
type quick struct {
	poller     *http2.Poller // nil: there is none
	processors int           // that were used when it was chosen

	mu      sync.Mutex
	at      step
	said    bool // the client has said something since it was read
	partial bool // what is there of a request is not all
	pieces  int  // of the answer
	ended   bool // and that was, or was followed by, its end or a failure
	gone    bool // it is known to have broken off
	watched bool // by the poller
	resume  chan step
	due     time.Time // when the goroutine is to take over
	timer   *time.Timer
	rings   time.Time // the timer; zero: it does not
}

// wait has the poller serve requests until one is not ordinary, and returns how far
// that has come.
func (h *http1Conn) wait() step {
	q := &h.quick
	if n := runtime.GOMAXPROCS(0); n != q.processors {
		q.processors, q.poller = n, h.pollers.get(n)
	}
	q.mu.Lock()
	if q.poller == nil || h.leaving() || h.aborted.Load() || !h.client.polled(q.poller, h) {
		q.mu.Unlock()
		return atHead
	}
	q.watched, q.at, q.said = true, atHead, true // what came meanwhile was not heard
	q.dueBy(time.Now().Add(keepAlive))
	h.advance()
	q.mu.Unlock()
	h.pollers.turn.Flush()
	for {
		select {
		case at := <-q.resume:
			if at == atHead {
				h.client.readBy(time.Time{}) // it is that of a head long ago
			}
			return at
		case <-q.timer.C:
			h.late()
		}
	}
}

// dueBy sets when the goroutine takes over. The timer is moved when it rings too
// early, and not each time.
func (q *quick) dueBy(t time.Time) {
	q.due = t
	switch {
	case q.timer == nil:
		q.resume, q.timer = make(chan step, 1), time.NewTimer(time.Until(t))
	case q.rings.IsZero() || t.Before(q.rings):
		q.timer.Reset(time.Until(t))
	default:
		return
	}
	q.rings = t
}

// late is when the timer rings.
func (h *http1Conn) late() {
	q := &h.quick
	q.mu.Lock()
	defer q.mu.Unlock()
	q.rings = time.Time{}
	switch {
	case q.at == away:
	case q.at == atHead && q.processors != runtime.GOMAXPROCS(0):
		h.handOver(atHead) // to another poller, after one request
	case time.Now().Before(q.due):
		q.dueBy(q.due)
	default:
		if q.at == atHead && !q.partial {
			h.client.missed = os.ErrDeadlineExceeded
		}
		h.handOver(q.at)
	}
}

// handOver wakes the goroutine. The poller is told to be silent, as it would wake for
// every packet of a large body.
func (h *http1Conn) handOver(at step) {
	h.unwatch()
	if h.up != nil {
		h.up.unwatch()
	}
	h.quick.at, h.quick.partial = away, false
	h.quick.resume <- at
}

// unwatch has the poller forget the client.
func (h *http1Conn) unwatch() {
	if h.quick.watched {
		h.quick.watched = false
		h.client.unpolled(h.quick.poller)
	}
}

// takeBack has the goroutine go on, from another one: there is something to be done
// that the poller does not do.
func (h *http1Conn) takeBack(idle bool) {
	q := &h.quick
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.at != away && (!idle || q.at == atHead) {
		h.handOver(q.at)
	}
}

// Ready is poll.Handler's, of the client.
func (h *http1Conn) Ready(ended bool) {
	q := &h.quick
	q.mu.Lock()
	defer q.mu.Unlock()
	q.said, q.ended = true, q.ended || ended
	switch {
	case q.at == atHead:
		h.advance()
	case q.at == atAnswer && ended && h.client.reset():
		q.gone = true
		h.handOver(atAnswer)
	}
}

// Ready is poll.Handler's, of an upstream.
func (u *httpUpstream) Ready(ended bool) {
	if ended {
		u.ended.Store(true)
	}
	h := u.user.Load()
	if h == nil {
		u.said.Store(true)
		if h = u.user.Load(); h == nil {
			return // it is idle, or a goroutine's
		}
	}
	h.quick.mu.Lock()
	defer h.quick.mu.Unlock()
	if (h.quick.at == atAnswer || h.quick.at == atPassing) && h.up == u {
		h.advance()
	}
}

// watch has p tell of u, or nobody.
func (u *httpUpstream) watch(p *http2.Poller) bool {
	if u.poller != p { // there were more processors, or less
		u.forget()
	}
	if u.poller == nil && u.polled(p, u) {
		u.poller = p
		if u.stream != nil {
			u.said.Store(true) // a poller tells of what is there already, a stream does not
		}
	}
	return u.poller != nil
}

func (u *httpUpstream) unwatch() {
	u.user.Store(nil)
	u.forget()
}

// forget has the poller tell nobody.
func (u *httpUpstream) forget() {
	if u.poller != nil {
		u.unpolled(u.poller)
		u.poller = nil
	}
}

// advance goes on until something must be waited for, or the goroutine is to go on.
func (h *http1Conn) advance() {
	for goOn := true; goOn; {
		switch h.quick.at {
		case atHead:
			goOn = h.quickRequest()
		case atAnswer:
			goOn = h.quickAnswer()
		case atPassing:
			goOn = h.quickRest()
		default:
			return
		}
	}
}

// quickRequest reads a request and sends it, and reports whether there is something to
// go on with. The answer is not: it is told of.
func (h *http1Conn) quickRequest() bool {
	q := &h.quick
	if len(h.client.bytes()) == 0 || q.partial {
		if !q.said || !h.client.takeNow() {
			q.said = q.ended
			return false
		}
		q.said = q.ended || h.client.more()
	}
	d, ok := h.ordinary()
	switch {
	case !ok && q.partial && !h.client.over():
		q.dueBy(time.Now().Add(shortly))
		return q.said
	case !ok:
		h.handOver(atHead)
		return false
	}
	h.begin()
	h.view = http1Request{Head: &h.request}
	h.planned = h.plan.make(h.Server, h.accepted, d, &h.view, h.record)
	if h.planned == nil && h.plan.answer == nil {
		h.up = h.reuse()
	}
	if h.up == nil {
		h.handOver(atPlan)
		return false
	}
	h.mirror()
	h.attempt = 1
	now := h.record.now()
	h.sending(h.up, now)
	h.up.limit = h.plan.limit(now)
	h.up.user.Store(h) // before there can be an answer
	h.rest = h.textFor(h.up)
	if h.up.watch(q.poller) {
		before := len(h.rest)
		h.rest = h.up.writeNow(h.rest)
		h.record.sent(uint64(before - len(h.rest)))
	}
	if len(h.rest) > 0 || h.up.unsent() { // for want of room, or a failure, which the goroutine meets again
		h.handOver(atSending)
		return false
	}
	h.record.requestBody(h.taken - len(h.request.Raw()))
	due := now.Add(lookEvery)
	if limit := h.up.limit; !limit.IsZero() && limit.Before(due) {
		due = limit
	}
	q.dueBy(due)
	q.at = atAnswer
	return h.up.said.Swap(false)
}

// ordinary reads the request that is in the buffer, and reports whether it is one for
// the poller: whole, with nothing to be told before its body comes, for a destination
// that is known, on a connection that goes on. It has no effect if not, but to say
// whether that is so for want of a little more.
func (h *http1Conn) ordinary() (route.Destination, bool) {
	var none route.Destination
	var scan http1.Scanner
	text := h.client.bytes()
	n, err := scan.End(text)
	if h.quick.partial = n == 0 && err == nil && len(text) > 0 && len(text) < bufferSize; h.quick.partial {
		return none, false
	}
	if err != nil || n == 0 || h.request.ParseRequest(text[:n]) != nil {
		return none, false
	}
	body := bodyOf(&h.request)
	m, err := body.Next(text[n:])
	if err != nil || !body.Done() {
		left := body.Left()
		h.quick.partial = err == nil && !h.request.Expect && left > 0 && left <= int64(bufferSize-len(text))
		return none, false
	}
	h.body, h.taken = body, n+m
	if h.request.Expect || h.request.Close || h.request.Upgrade || h.request.Minor == 0 || h.leaving() {
		return none, false
	}
	return h.known(h.accepted)
}

// reuse returns a connection for the request that is open already; nil: there is none,
// or it has to be stood in line for, or may be refused here.
func (h *http1Conn) reuse() *httpUpstream {
	if up := h.held; up != nil {
		if !h.plan.direct && h.toOwn(up.endpoint.Addr) || up.dialled.Looped() || h.outdated(up.dialled, h.record.accepted) || h.record.accepted.Sub(up.since) >= upstream.Fresh && !up.quiet() {
			return nil
		}
		h.held = nil
		return up
	}
	owner := ownerOf(&h.plan.backend)
	if h.plan.direct || !h.lines.empty(owner) {
		return nil
	}
	endpoint, ok := h.balancer.Pick(&h.plan.backend, h.plan.key, nil)
	if !ok {
		return nil
	}
	picked := pick{&h.balancer, &h.plan.backend, endpoint.Addr}
	if h.toOwn(endpoint.Addr) {
		picked.done(balance.Unknown)
		return nil
	}
	up := h.pooled(owner, picked, endpoint, h.record.accepted)
	if up == nil {
		picked.done(balance.Unknown)
	}
	return up
}

// quickAnswer reads the answer and passes it on, and reports whether it is passed on.
func (h *http1Conn) quickAnswer() bool {
	up := h.up
	if !up.takeNow() {
		return false
	}
	n, ok := h.ordinaryAnswer(up)
	if !ok {
		h.handOver(atAnswer)
		return false
	}
	h.record.firstByte()
	h.rest = h.answerFor(up, n)
	h.quick.pieces = 0
	return h.quickPass()
}

// quickRest reads more of the answer's body and passes it on.
func (h *http1Conn) quickRest() bool {
	if !h.up.takeNow() {
		return false
	}
	body := h.answerBody
	n, err := body.Next(h.up.bytes())
	if h.quick.pieces++; err != nil || len(h.up.bytes()) == 0 || h.quick.pieces > pieces {
		h.handOver(atPassing)
		return false
	}
	h.answerBody = body
	h.rest, h.bodied, h.skipping = h.up.bytes()[:n], n, n
	return h.quickPass()
}

// quickPass passes on what is there of the answer, and reports whether it is.
func (h *http1Conn) quickPass() bool {
	up := h.up
	if !h.last {
		before := len(h.rest)
		h.rest = h.client.writeNow(h.rest)
		h.record.received(uint64(before - len(h.rest)))
	}
	if len(h.rest) > 0 || h.client.unsent() {
		h.handOver(atPassing)
		return false
	}
	h.passed(up)
	if !h.answerBody.Done() {
		h.quick.at = atPassing
		return true
	}
	up.picked.done(outcome(h.response.Status, nil))
	up.user.Store(nil)
	h.plan.leave(h.Server)
	now := h.record.now()
	h.finish(now)
	h.log(now)
	h.quick.dueBy(now.Add(keepAlive))
	h.quick.at = atHead
	return true
}

// ordinaryAnswer reads the answer that is in the buffer, and reports how much of its
// body is there and whether it is one for the poller: with an end that it says itself,
// for both connections to go on after it, and not to be tried again. It has no effect
// if not.
func (h *http1Conn) ordinaryAnswer(up *httpUpstream) (int, bool) {
	var scan http1.Scanner
	text := up.bytes()
	head, err := scan.End(text)
	if err != nil || head == 0 || h.response.ParseResponse(text[:head], h.method) != nil {
		return 0, false
	}
	r := &h.response
	if r.Status/100 == 1 || r.Minor == 0 || r.Close || h.plan.counts(r.Status) || h.leaving() {
		return 0, false
	}
	if r.Body.Kind == http1.UntilClose || r.Body.Kind == http1.Tunnel {
		return 0, false
	}
	h.answerBody = r.Body
	n, err := h.answerBody.Next(text[head:])
	return n, err == nil
}
