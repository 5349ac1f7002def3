package http2

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/net/http2"
)

// Observer is told of a stream's life. Its methods are called one at a time, on
// goroutines that read connections: they must not block. Done comes when the others,
// and what a [Stream.Hold] holds, have returned.
type Observer interface {
	// Response is called with each header block of an answer, those of 1xx too, and
	// returns what is sent to the client; it may change the fields in place, and
	// append. They are valid until it returns. False declines the answer: the
	// upstream's stream is cancelled, and Failed called with ErrDeclined.
	Response(t *Turn, s *Stream, status int, fields []Field) ([]Field, bool)
	// Failed is called when the upstream failed before its answer began, 1xx aside.
	// True: the observer has answered the client or opened another stream, or will.
	// False: the client's stream is reset.
	Failed(t *Turn, s *Stream, f Failure) bool
	// Done is called once, when it is over.
	Done(s *Stream, o Outcome)
}

// Failure is an attempt that came to nothing.
type Failure struct {
	Err error
	// Unsent: the upstream has certainly not acted on it (RFC 9113, section 8.7), or
	// has not got it.
	Unsent bool
	// Replayable: Open can send all again that the client has sent.
	Replayable bool
}

// Outcome is how a stream ended.
type Outcome struct {
	Status     int    // the final one; 0: there was no answer
	GRPCStatus string // as sent, "" if there was none
	Received   uint64 // bytes of the request's body
	Sent       uint64 // bytes of the answer's body, on their way to the client
	Err        error  // nil: both messages are complete, or the answer needed no more
}

// Stream is a client's request and its answer.
type Stream struct {
	// Request is the header block. The stream's own: it may be changed.
	Request []Field
	// Observer is set by the handler; nil: nobody looks.
	Observer Observer
	// Attempt is how long an attempt may take, from when it has a connection until its
	// answer is complete; 0: no limit. What takes longer has failed, with
	// ErrAttemptTimeout. Set by the handler.
	Attempt time.Duration
	// Withheld reports whether a field is not passed on as a trailer of the request; nil:
	// all are. Set by the handler.
	Withheld func(name string) bool

	mu       sync.Mutex
	down     half
	up       *half       // the attempt that counts, nil: none
	first    half        // room for the first attempt
	limit    *time.Timer // Attempt's; nil: there is none
	req      flow
	resp     flow
	head     bool   // an answer has no body, whatever its length
	bare     bool   // the request's header block ended it: it has no body, not even an empty one
	answered bool   // the answer's final header block has gone down
	unwanted bool   // nobody takes the rest of the request
	endCode  Code   // of the reset that then follows the answer
	keep     int    // how much of the request's body may be kept
	kept     []byte // what has gone up of it
	lost     bool   // more has gone up
	done     bool
	busy     int // calls of the observer that have not returned, and Holds
	reported bool
	outcome  Outcome
}

// half is a stream on one of its two connections.
type half struct {
	c      *conn
	stream *Stream
	id     uint32
	at     uint64 // where its first frame is in what c has written

	// Of c.mu.
	send    int // what may be sent
	recv    int // what the peer may send
	window  int // what it may be ahead of the other side
	taken   int // what it has not got back yet
	blocked bool
	closed  bool
}

// flow is one direction.
type flow struct {
	waiting  chunks // bytes that the destination has no window for, or is not there for
	length   int64  // that was declared; -1: none
	received uint64
	ended    bool    // at the source
	trailers []Field // after what waits
	finished bool    // at the destination
}

func (f *flow) add(n int, ended bool) error {
	f.received += uint64(n)
	if f.length >= 0 && (f.received > uint64(f.length) || ended && f.received < uint64(f.length)) {
		return fmt.Errorf("%w: body of %d bytes, content-length %d", ErrMalformed, f.received, f.length)
	}
	return nil
}

// open makes h a stream of c. c.mu is held.
func (c *conn) openHalf(h *half, s *Stream, id uint32) {
	*h = half{c: c, stream: s, id: id, send: c.peerWindow, recv: c.ownWindow, window: streamWindow}
	c.streams[id] = h
	c.opens++
}

// Ended reports whether the client has sent its whole request.
func (s *Stream) Ended() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.req.ended
}

// Keep has up to n bytes of the request's body kept until the answer begins, so
// that it can be sent again (Failure.Replayable). To be called by the handler.
func (s *Stream) Keep(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keep = n
}

// Hold has Observer.Done wait for Release, so that what is begun between the two
// ends with Done. It reports false if the stream is over by now.
func (s *Stream) Hold() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done {
		return false
	}
	s.busy++
	return true
}

// Release is after a Hold that was true.
func (s *Stream) Release() {
	s.mu.Lock()
	s.busy--
	s.unlock()
}

// Respond answers in place of an upstream, and cancels the attempt under way. It
// reports false if an answer has begun or the stream is over. Without a body the
// header block ends the stream, as gRPC's trailers-only answers do.
func (s *Stream) Respond(t *Turn, status int, fields []Field, body []byte) bool {
	s.mu.Lock()
	defer s.unlock()
	if s.done || s.answered {
		return false
	}
	s.dropUp(true, http2.ErrCodeCancel, t)
	s.begin(status)
	s.stopRequest(http2.ErrCodeNo)
	s.recordGRPC(fields)
	fields = append([]Field{{Name: ":status", Value: strconv.Itoa(status)}}, fields...)
	said := s.down.c.sendHeaders(&s.down, fields, len(body) == 0, t)
	s.resp.ended, s.resp.finished = true, said && len(body) == 0
	s.resp.received = uint64(len(body))
	if len(body) > 0 {
		s.resp.waiting.append(body)
		s.pump(&s.resp, &s.down, t)
	}
	s.settle(t)
	return true
}

// Reset ends both sides with a RST_STREAM. Err is for the Outcome. It reports
// false if the stream is over.
func (s *Stream) Reset(t *Turn, code Code, err error) bool {
	s.mu.Lock()
	defer s.unlock()
	if s.done {
		return false
	}
	s.abort(true, code, true, code, err, t)
	return true
}

// unlock also reports what has come to its end.
func (s *Stream) unlock() {
	report := s.done && !s.reported && s.busy == 0
	if report {
		s.reported = true
		s.outcome.Received, s.outcome.Sent = s.req.received, s.resp.received
	}
	outcome, observer := s.outcome, s.Observer
	s.mu.Unlock()
	if report && observer != nil {
		observer.Done(s, outcome)
	}
}

// The functions below are called with s.mu held, unless they take it.

// from returns what comes from h and where it goes; nil: h does not count any more.
func (s *Stream) from(h *half) (*flow, *half) {
	switch {
	case s.done:
	case h == &s.down:
		return &s.req, s.up
	case h == s.up:
		return &s.resp, &s.down
	}
	return nil, nil
}

// to is from, seen from the destination.
func (s *Stream) to(h *half) (*flow, *half) {
	switch {
	case s.done:
	case h == &s.down:
		return &s.resp, s.up
	case h == s.up:
		return &s.req, &s.down
	}
	return nil, nil
}

// data takes a DATA frame. Padding is what of it was none.
func (s *Stream) data(h *half, data []byte, padding int, ended bool, t *Turn) error {
	s.mu.Lock()
	defer s.unlock()
	f, dst := s.from(h)
	switch {
	case f == nil:
		return nil
	case f.ended:
		return &streamError{h.id, http2.ErrCodeStreamClosed, fmt.Errorf("%w: DATA after the end", ErrMalformed)}
	case f == &s.resp && !s.answered:
		return &streamError{h.id, http2.ErrCodeProtocol, fmt.Errorf("%w: DATA before HEADERS", ErrMalformed)}
	}
	if err := f.add(len(data), ended); err != nil {
		return &streamError{h.id, http2.ErrCodeProtocol, err}
	}
	f.ended = ended
	n := 0
	switch {
	case f == &s.req && s.unwanted:
		n = len(data)
	case dst != nil && f.waiting.size == 0 && len(data) > 0:
		n = dst.c.sendData(dst, data, ended, t)
		f.finished = ended && n == len(data)
		s.sent(f, data[:n])
	}
	f.waiting.append(data[n:])
	if dst != nil && ended {
		s.pump(f, dst, t)
	}
	if !ended {
		h.c.credit(h, n+padding, f.waiting.size == 0, t)
	}
	s.settle(t)
	return nil
}

// sent keeps what has gone up, as long as that is wanted.
func (s *Stream) sent(f *flow, p []byte) {
	if f != &s.req || s.answered || s.lost || len(p) == 0 {
		return
	}
	if len(s.kept)+len(p) > s.keep {
		s.kept, s.lost = nil, true
		return
	}
	s.kept = append(s.kept, p...)
}

// pumpTo sends what waits for h. It takes s.mu.
func (s *Stream) pumpTo(h *half, t *Turn) {
	s.mu.Lock()
	defer s.unlock()
	f, src := s.to(h)
	if f == nil || f.waiting.size == 0 {
		return
	}
	n := s.pump(f, h, t)
	if n > 0 && src != nil && !f.ended {
		src.c.credit(src, n, f.waiting.size == 0, t)
	}
	s.settle(t)
}

// pump sends what waits, and the end if that is next. It returns how many bytes
// went.
func (s *Stream) pump(f *flow, dst *half, t *Turn) int {
	total := 0
	for f.waiting.size > 0 {
		p, all := f.waiting.peek()
		end := all && f.ended && f.trailers == nil
		n := dst.c.sendData(dst, p, end, t)
		s.sent(f, p[:n])
		total += n
		whole := n == len(p)
		if n > 0 {
			f.waiting.drop(n)
		}
		if !whole {
			return total
		}
		f.finished = end
	}
	if f.ended && !f.finished {
		if f.trailers != nil {
			f.finished = dst.c.sendHeaders(dst, f.trailers, true, t)
		} else {
			f.finished = dst.c.sendEnd(dst, t)
		}
	}
	return total
}

// trailers takes a header block that ends a direction.
func (s *Stream) trailers(h *half, fields []Field, ended bool, t *Turn) error {
	s.mu.Lock()
	defer s.unlock()
	return s.takeTrailers(h, fields, ended, t)
}

func (s *Stream) takeTrailers(h *half, fields []Field, ended bool, t *Turn) error {
	f, dst := s.from(h)
	if f == nil {
		return nil
	}
	if f.ended {
		return &streamError{h.id, http2.ErrCodeStreamClosed, fmt.Errorf("%w: HEADERS after the end", ErrMalformed)}
	}
	err := checkTrailers(fields)
	if err == nil && !ended {
		err = fmt.Errorf("%w: trailers that end nothing", ErrMalformed)
	}
	if err == nil {
		err = f.add(0, true)
	}
	if err != nil {
		return &streamError{h.id, http2.ErrCodeProtocol, err}
	}
	f.ended = true
	switch {
	case f == &s.resp:
		s.recordGRPC(fields)
	case s.Withheld != nil:
		fields = slices.DeleteFunc(fields, func(field Field) bool { return s.Withheld(field.Name) })
	}
	switch {
	case f == &s.req && s.unwanted:
	case dst != nil && f.waiting.size == 0 && len(fields) > 0 && f == &s.resp:
		f.finished = dst.c.sendHeaders(dst, fields, true, t)
	default:
		if len(fields) > 0 {
			f.trailers = slices.Clone(fields)
		}
		if dst != nil {
			s.pump(f, dst, t)
		}
	}
	s.settle(t)
	return nil
}

func (s *Stream) recordGRPC(fields []Field) {
	if v := get(fields, "grpc-status"); v != "" {
		s.outcome.GRPCStatus = v
	}
}

// response takes a header block of the upstream. It takes s.mu.
func (s *Stream) response(h *half, fields []Field, ended bool, t *Turn) error {
	s.mu.Lock()
	if s.up != h || s.done {
		s.mu.Unlock()
		return nil
	}
	if s.answered {
		defer s.unlock()
		return s.takeTrailers(h, fields, ended, t)
	}
	status, length, err := checkResponse(fields)
	if err == nil && status < 200 && ended {
		err = fmt.Errorf("%w: status %d ends the stream", ErrMalformed, status)
	}
	if s.head || status == 204 || status == 304 {
		length = -1
	}
	if err == nil && ended && length > 0 {
		err = fmt.Errorf("%w: no body, content-length %d", ErrMalformed, length)
	}
	if err != nil {
		s.mu.Unlock()
		return &streamError{h.id, http2.ErrCodeProtocol, err}
	}
	if observer := s.Observer; observer != nil {
		s.busy++
		s.mu.Unlock()
		var wanted bool
		fields, wanted = observer.Response(t, s, status, fields)
		s.mu.Lock()
		s.busy--
		if !wanted {
			s.attemptFailed(h, Failure{Err: ErrDeclined}, true, http2.ErrCodeCancel, t)
			return nil
		}
	}
	defer s.unlock()
	if s.up != h || s.done {
		return nil
	}
	if status >= 200 {
		s.begin(status)
		s.resp.length = length
		s.recordGRPC(fields)
	}
	said := s.down.c.sendHeaders(&s.down, fields, ended, t)
	s.resp.ended, s.resp.finished = ended, ended && said
	s.settle(t)
	return nil
}

// begin notes that an answer begins: there will be no other attempt.
func (s *Stream) begin(status int) {
	s.answered = true
	s.outcome.Status = status
	s.kept = nil
}

// stopRequest gives up on the rest of the request. If the client has not sent all
// of it, it is told so with code once it has its answer.
func (s *Stream) stopRequest(code Code) {
	s.unwanted, s.endCode = true, code
	s.req.waiting.clear()
	s.req.trailers = nil
}

// dropUp ends the attempt under way.
func (s *Stream) dropUp(reset bool, code Code, t *Turn) {
	if s.up != nil {
		s.up.c.closeHalf(s.up, reset, code, t)
		s.up = nil
	}
	if s.limit != nil {
		s.limit.Stop()
	}
}

// begun has the attempt h under way.
func (s *Stream) begun(h *half) {
	s.up = h
	if s.Attempt > 0 {
		s.limit = time.AfterFunc(s.Attempt, func() { s.late(h) })
	}
}

// late ends an attempt whose time is over. It takes s.mu.
func (s *Stream) late(h *half) {
	var t Turn
	defer t.Flush()
	s.mu.Lock()
	switch {
	case s.done || s.up != h:
		s.mu.Unlock()
	case s.busy > 0: // with an answer that is just there: what comes of it, is seen then
		s.limit.Reset(time.Millisecond)
		s.mu.Unlock()
	default:
		s.attemptFailed(h, Failure{Err: ErrAttemptTimeout}, true, http2.ErrCodeCancel, &t)
	}
}

// settle ends what has come to its end.
func (s *Stream) settle(t *Turn) {
	if s.done {
		return
	}
	taken := s.req.finished || s.unwanted
	if s.up != nil && taken && s.resp.ended {
		s.dropUp(false, 0, t)
	}
	// A request that the upstream still takes keeps its place in the client's table,
	// which bounds how many there are.
	if s.resp.finished && taken && (s.req.ended || s.unwanted) {
		s.down.c.closeHalf(&s.down, !s.req.ended, s.endCode, t)
		s.done = true
	}
}

// abort ends both sides, each with a reset if it is to have one.
func (s *Stream) abort(resetDown bool, down Code, resetUp bool, up Code, err error, t *Turn) {
	s.dropUp(resetUp, up, t)
	s.down.c.closeHalf(&s.down, resetDown, down, t)
	s.req.waiting.clear()
	s.resp.waiting.clear()
	s.kept = nil
	s.outcome.Err = err
	s.done = true
}

// wasReset takes a RST_STREAM. It takes s.mu.
func (s *Stream) wasReset(h *half, code Code, t *Turn) {
	s.mu.Lock()
	switch {
	case s.done:
	case h == &s.down:
		s.abort(false, 0, true, code, &ResetError{Code: code}, t)
	case h == s.up:
		err := &ResetError{Code: code, Upstream: true}
		s.attemptFailed(h, Failure{Err: err, Unsent: code == http2.ErrCodeRefusedStream}, false, code, t)
		return
	}
	s.unlock()
}

// broken ends a stream whose peer broke a rule, with code. It takes s.mu.
func (s *Stream) broken(h *half, code Code, err error, t *Turn) {
	s.mu.Lock()
	switch {
	case s.done:
	case h == &s.down:
		s.abort(true, code, true, http2.ErrCodeCancel, fmt.Errorf("%w: %w", ErrClient, err), t)
	case h == s.up:
		s.attemptFailed(h, Failure{Err: err}, true, code, t)
		return
	}
	s.unlock()
}

// connLost ends a stream whose connection is gone. It takes s.mu.
func (s *Stream) connLost(h *half, err error, unsent bool, t *Turn) {
	s.mu.Lock()
	switch {
	case s.done:
	case h == &s.down:
		s.abort(false, 0, true, http2.ErrCodeCancel, fmt.Errorf("%w's connection: %w", ErrClient, err), t)
	case h == s.up:
		s.attemptFailed(h, Failure{Err: fmt.Errorf("upstream's connection: %w", err), Unsent: unsent}, false, http2.ErrCodeInternal, t)
		return
	}
	s.unlock()
}

// attemptFailed ends the attempt h, with RST_STREAM if reset is set. If the answer
// has begun, the client sees it end with the code of an upstream's reset. It
// unlocks s.mu.
func (s *Stream) attemptFailed(h *half, f Failure, reset bool, code Code, t *Turn) {
	if s.done || s.up != h {
		s.unlock()
		return
	}
	s.dropUp(reset, code, t)
	if s.answered {
		var byPeer *ResetError
		switch {
		case s.resp.ended:
			// It has all been said: the client gets it, and then the same code.
			s.stopRequest(code)
			s.settle(t)
		case errors.As(f.Err, &byPeer), errors.Is(f.Err, ErrAttemptTimeout):
			s.abort(true, code, false, 0, f.Err, t)
		default:
			s.abort(true, http2.ErrCodeInternal, false, 0, f.Err, t)
		}
		s.unlock()
		return
	}
	s.rewind()
	s.failed(f, t)
}

// rewind makes what has gone up wait again.
func (s *Stream) rewind() {
	s.req.finished = false
	if len(s.kept) == 0 {
		return
	}
	var again chunks
	again.append(s.kept)
	s.kept = s.kept[:0]
	for s.req.waiting.size > 0 {
		p, _ := s.req.waiting.peek()
		again.append(p)
		s.req.waiting.drop(len(p))
	}
	s.req.waiting = again
}

// failed asks the observer what to do. It unlocks s.mu.
func (s *Stream) failed(f Failure, t *Turn) {
	f.Replayable = !s.lost
	handled := false
	if s.Observer != nil {
		s.busy++
		s.mu.Unlock()
		handled = s.Observer.Failed(t, s, f)
		s.mu.Lock()
		s.busy--
	}
	code := http2.ErrCodeInternal
	var byPeer *ResetError
	if errors.As(f.Err, &byPeer) {
		code = byPeer.Code
	}
	if !handled && !s.done && !s.answered && s.up == nil {
		s.abort(true, code, false, 0, f.Err, t)
	}
	s.unlock()
}

// notOpened tells of an attempt that found no connection. It takes s.mu.
func (s *Stream) notOpened(err error, t *Turn) {
	s.mu.Lock()
	if s.done || s.answered || s.up != nil {
		s.unlock()
		return
	}
	s.failed(Failure{Err: err, Unsent: true}, t)
}
