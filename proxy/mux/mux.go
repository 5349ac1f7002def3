// Package mux carries many streams of bytes on one connection, as a proxy has for
// another proxy.
//
// What a packet costs is mostly the kernel's, and TLS', and nearly the same whether there
// is one request in it or ten. A poller finds many at a time: what it sends to one other
// proxy in its turn goes in one piece, and is met in one piece there. A Stream is to its
// two ends what a connection of its own would be: it ends, half-closes, breaks off, holds
// its sender back, and has deadlines.
//
// Each end's frames are a head of 8 bytes and what it says of:
//
//	stream (4) | kind (1) | length (3) | length bytes
//
// Numbers are in network order. The client opens streams, each of a number that is higher
// than those before. A stream's sender has credit for as many bytes as its receiver has
// room for, Window at first, and the receiver gives more as they are read: a stream that
// nobody reads keeps no other from going on. Neither end waits for an answer to anything
// else. What is no such frame ends the connection, and every stream with it.
package mux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/poll"
)

const (
	headSize = 8
	// maxData is how much of a stream's bytes a frame carries at most.
	maxData = 16 << 10
	// Window is how much a stream's receiver has room for at first. Where it reads half of
	// that in less than soon, it is doubled, up to maxWindow, and by maxGrown at most for
	// all streams of a connection together: what is far away needs more under way.
	Window    = 64 << 10
	maxWindow = 1 << 20
	maxGrown  = 4 << 20
	// MaxStreams is how many of them a connection carries at a time.
	MaxStreams = 256
	// maxVain is how many streams more may have been opened for nothing than for something.
	maxVain = 100
	// flushAt is how many bytes are gathered before they are written. Where the connection
	// takes no more, who has much to send waits from there on, and who has little from
	// outCap on. Twice that is only what a peer makes this end say without reading it.
	flushAt = 64 << 10
	outCap  = 4 * flushAt
	much    = 4 << 10
	soon    = 50 * time.Millisecond
)

// kind is a frame's.
type kind uint8

const (
	kindOpen   kind = iota + 1 // a stream begins
	kindData                   // bytes of it
	kindEnd                    // no bytes follow
	kindClose                  // nor does anybody read any
	kindReset                  // it is broken off
	kindCredit                 // so many bytes more may be sent (4)
	kindLeave                  // no stream is opened any more (stream 0)
)

var (
	// ErrLeft is that no stream is opened on a connection any more.
	ErrLeft = errors.New("mux: the connection takes no more streams")
	// errFrame is what ends the connection.
	errFrame = errors.New("mux: the peer breaks a rule")
)

// Carrier is the connection: an *mtls.Conn. ReadNow and WriteNow do not wait, Write does.
type Carrier interface {
	ReadNow(p []byte) (int, error)
	WriteNow(p []byte) (int, error)
	Unsent() bool
	Write(p []byte) (int, error)
}

// buffers are lent to connections and streams while there are bytes.
var buffers = sync.Pool{New: func() any { b := make([]byte, 0, 2*maxData); return &b }}

func lend() *[]byte { return buffers.Get().(*[]byte) }

func giveBack(b *[]byte) {
	if cap(*b) <= outCap {
		*b = (*b)[:0]
		buffers.Put(b)
	}
}

// Session is one end of the connection. It is a poll.Handler of it, and acts on what
// comes in Ready alone.
type Session struct {
	carrier Carrier
	turn    *Turn
	opened  func(*Stream) // nil: this end opens them
	done    chan struct{}

	// Watched is called when somebody begins to watch a stream; nil: nobody is interested.
	// Set it before anybody else has the Session.
	Watched func()

	reading sync.Mutex
	in      *[]byte // what was read of a frame that is not whole; nil: nothing

	// mu is never held while a Handler is called, nor while anything is read or written.
	mu      sync.Mutex
	streams map[uint32]*Stream
	last    uint32    // that was opened
	out     *[]byte   // frames that wait; nil: none do
	listed  bool      // in turn
	crowded []*Stream // that wait for room in out
	drains  bool      // a goroutine waits for the connection to take what it has
	grown   int       // of all windows
	vain    int       // streams of the peer's that ended without a byte, less the others
	leaving bool      // this end opens, or takes, no more
	left    bool      // the peer has said so
	failed  error

	writing sync.Mutex // before mu; no Handler is called while it is held
}

// New makes one end: the client's if opened is nil; else opened is called for each stream
// that the client opens, and must not wait. Who has a poller's turn flushes the Turn.
func New(c Carrier, t *Turn, opened func(*Stream)) *Session {
	return &Session{carrier: c, turn: t, opened: opened, done: make(chan struct{}), streams: map[uint32]*Stream{}}
}

// Done is closed once the connection has ended, and all its streams with it.
func (s *Session) Done() <-chan struct{} { return s.done }

// Quit returns when nobody uses the carrier any more, once it is done.
func (s *Session) Quit() {
	s.reading.Lock()
	s.reading.Unlock() //nolint:staticcheck // whoever had it has left
	s.writing.Lock()
	s.writing.Unlock() //nolint:staticcheck // the same
}

// Why is what ended it: io.EOF, if it was in order; nil: it goes on.
func (s *Session) Why() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed
}

// Open opens a stream. The error is ErrLeft.
func (s *Session) Open() (*Stream, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed != nil || s.leaving || s.left || len(s.streams) >= MaxStreams || s.last == 1<<32-1 {
		return nil, ErrLeft
	}
	s.last++
	st := s.add(s.last)
	s.frame(st.id, kindOpen, nil)
	return st, nil
}

func (s *Session) add(id uint32) *Stream {
	st := &Stream{session: s, id: id, credit: Window, window: Window, room: Window}
	st.reader.init()
	st.writer.init()
	s.streams[id] = st
	return st
}

// Streams is how many there are.
func (s *Session) Streams() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.streams)
}

// Leave has no stream opened any more. The connection ends with the last one, once the
// peer has said the same.
func (s *Session) Leave() {
	s.mu.Lock()
	s.leave()
	s.mu.Unlock()
	s.Flush()
	s.over()
}

func (s *Session) leave() {
	if !s.leaving {
		s.leaving = true
		s.frame(0, kindLeave, nil)
	}
}

// over ends the connection if it has served, and all is written.
func (s *Session) over() {
	s.mu.Lock()
	over := s.leaving && s.left && len(s.streams) == 0 && s.out == nil && !s.drains
	s.mu.Unlock()
	if over {
		s.Close(io.EOF)
	}
}

// Close ends the connection for its streams, which fail for that reason. The carrier is
// its owner's to close.
func (s *Session) Close(why error) {
	s.mu.Lock()
	if s.failed != nil {
		s.mu.Unlock()
		return
	}
	s.failed = why
	var streams []*Stream
	for _, st := range s.streams {
		streams = append(streams, st)
		st.reader.wake()
		st.writer.wake()
	}
	s.mu.Unlock()
	close(s.done)
	for _, st := range streams {
		st.tell(true)
	}
	s.turn.Flush()
}

// frame queues one. mu is held.
func (s *Session) frame(id uint32, k kind, payload []byte) {
	if s.failed != nil {
		return
	}
	if s.out == nil {
		s.out = lend()
	}
	b := binary.BigEndian.AppendUint32(*s.out, id)
	b = append(b, byte(k), byte(len(payload)>>16), byte(len(payload)>>8), byte(len(payload)))
	*s.out = append(b, payload...)
	if !s.listed {
		s.listed = true
		s.turn.add(s)
	}
}

func (s *Session) waiting() int {
	if s.out == nil {
		return 0
	}
	return len(*s.out)
}

// Flush writes what waits, without waiting for the connection to have room.
func (s *Session) Flush() {
	s.writing.Lock()
	defer s.writing.Unlock()
	for {
		s.mu.Lock()
		s.listed = false
		out := s.out
		if s.drains || s.failed != nil || out == nil {
			s.mu.Unlock()
			return
		}
		s.out = nil
		s.mu.Unlock()
		rest, err := s.write(*out)
		if errors.Is(err, unix.EAGAIN) {
			s.mu.Lock()
			s.drains = true
			s.mu.Unlock()
			go s.drain(out, rest)
			return
		}
		giveBack(out)
		if err != nil {
			go s.Close(fmt.Errorf("mux: %w", err)) // who is told of it may be waiting for this very call
			return
		}
		s.uncrowd()
	}
}

// write returns what the connection has no room for.
func (s *Session) write(p []byte) ([]byte, error) {
	for len(p) > 0 || s.carrier.Unsent() {
		n, err := s.carrier.WriteNow(p)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return p, err
		}
		p = p[n:]
	}
	return nil, nil
}

// drain writes the rest, and waits for that.
func (s *Session) drain(out *[]byte, rest []byte) {
	_, err := s.carrier.Write(rest)
	giveBack(out)
	s.mu.Lock()
	s.drains = false
	s.mu.Unlock()
	if err != nil {
		s.Close(fmt.Errorf("mux: %w", err))
		return
	}
	s.uncrowd()
	s.Flush()
	s.over()
}

// uncrowd has those go on who waited for room.
func (s *Session) uncrowd() {
	s.mu.Lock()
	crowded := s.crowded
	s.crowded = nil
	for _, st := range crowded {
		st.crowded = false
		st.writer.wake()
	}
	s.mu.Unlock()
}

// Ready is poll.Handler's.
func (s *Session) Ready(ended bool) {
	s.reading.Lock()
	defer s.reading.Unlock()
	if s.Why() != nil {
		return
	}
	for {
		if s.in == nil {
			s.in = lend()
		}
		in := *s.in
		n, err := s.carrier.ReadNow(in[len(in):cap(in)])
		switch {
		case n > 0:
			in = in[:len(in)+n]
			full := len(in) == cap(in)
			rest, err := s.frames(in)
			*s.in = append(in[:0], rest...)
			switch {
			case err != nil:
				s.Close(err)
			case full || ended:
				continue
			}
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
		case err == nil:
			s.Close(io.EOF)
		default:
			s.Close(fmt.Errorf("mux: %w", err))
		}
		if len(*s.in) == 0 {
			giveBack(s.in)
			s.in = nil
		}
		return
	}
}

// frames acts on those that are whole, and returns what is left.
func (s *Session) frames(in []byte) ([]byte, error) {
	for len(in) >= headSize {
		id, k := binary.BigEndian.Uint32(in), kind(in[4])
		length := int(in[5])<<16 | int(in[6])<<8 | int(in[7])
		if most := k.most(); length > most || k == kindCredit && length < most {
			return nil, fmt.Errorf("%w: %d bytes in a frame of kind %d", errFrame, length, k)
		}
		if len(in) < headSize+length {
			break
		}
		if err := s.act(id, k, in[headSize:headSize+length]); err != nil {
			return nil, err
		}
		in = in[headSize+length:]
	}
	return in, nil
}

// most is how long a frame's payload is at most.
func (k kind) most() int {
	switch k {
	case kindData:
		return maxData
	case kindCredit:
		return 4
	}
	return 0
}

func (s *Session) act(id uint32, k kind, payload []byte) error {
	s.mu.Lock()
	if s.failed != nil {
		s.mu.Unlock()
		return s.failed
	}
	if s.waiting() > 2*outCap {
		s.mu.Unlock()
		return fmt.Errorf("%w: it reads nothing of what it makes this end say", errFrame)
	}
	if k == kindOpen || k == kindLeave {
		st, err := s.turnOf(id, k)
		s.mu.Unlock()
		if st != nil {
			s.opened(st)
		}
		s.over()
		return err
	}
	st := s.streams[id]
	if st == nil {
		known := id <= s.last
		s.mu.Unlock()
		if !known || id == 0 {
			return fmt.Errorf("%w: a frame of stream %d, which was not opened", errFrame, id)
		}
		return nil // it was closed here meanwhile
	}
	err := st.take(k, payload)
	s.mu.Unlock()
	if err == nil && k != kindCredit {
		st.tell(k != kindData)
		st.kept()
	}
	return err
}

// turnOf acts on a frame that is no stream's; mu is held. It returns the stream that was
// opened.
func (s *Session) turnOf(id uint32, k kind) (*Stream, error) {
	switch {
	case k == kindLeave && id == 0:
		s.left = true
		s.leave() // and so the other end knows that nothing more is under way
		return nil, nil
	case k != kindOpen || s.opened == nil || id <= s.last || s.left:
		return nil, fmt.Errorf("%w: stream %d, of %d, kind %d", errFrame, id, s.last, k)
	}
	s.last = id
	if len(s.streams) >= MaxStreams {
		s.frame(id, kindReset, nil)
		return nil, nil
	}
	return s.add(id), nil
}

// Turn is what was queued and is not written yet. Whoever had a turn, of a poller or of
// its own, flushes it. The zero value is ready.
type Turn struct {
	mu     sync.Mutex
	listed []*Session
	spare  []*Session
}

// add is called with Session.mu held.
func (t *Turn) add(s *Session) {
	t.mu.Lock()
	t.listed = append(t.listed, s)
	t.mu.Unlock()
}

// Flush writes all that is queued.
func (t *Turn) Flush() {
	t.mu.Lock()
	listed := t.listed
	t.listed, t.spare = t.spare[:0], nil
	t.mu.Unlock()
	for i, s := range listed {
		s.Flush()
		listed[i] = nil
	}
	t.mu.Lock()
	if t.spare == nil {
		t.spare = listed
	}
	t.mu.Unlock()
}

var _ poll.Handler = (*Session)(nil)
