package mux

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/poll"
)

// Stream is one of a connection's, and is used as a connection: one goroutine reads,
// another one may write. ReadNow and WriteNow do not wait; who does waits in Read and
// Write, which are those of a syscall.RawConn, without a descriptor.
type Stream struct {
	session *Session
	id      uint32
	handler atomic.Pointer[poll.Handler]

	reader, writer waiter

	// Of session.mu.
	view    []byte    // of the frame that is being told of, what is not read
	behind  chunks    // what was not read when it was told of
	credit  int       // bytes that may be sent
	window  int       // bytes that the peer may have under way
	room    int       // of these, what it has not sent
	owed    int       // bytes that were read, for which it has no credit yet
	given   time.Time // credit was
	crowded bool      // in session.crowded
	used    bool      // something has come

	ended bool  // the peer sends no more
	gone  error // it reads no more, either
	sent  bool  // this end sends no more
	reset bool  // it has broken off
	hard  bool  // it is to be broken off when it is closed
	shut  bool  // it is closed
}

// take takes a frame. session.mu is held.
func (st *Stream) take(k kind, payload []byte) error {
	switch k {
	case kindData:
		if st.ended || len(payload) > st.room {
			return fmt.Errorf("%w: %d bytes where %d may come", errFrame, len(payload), st.room)
		}
		st.room -= len(payload)
		st.view = payload
		if !st.used && len(payload) > 0 {
			st.used, st.session.vain = true, max(0, st.session.vain-1)
		}
		return nil
	case kindEnd:
		st.ended = true
	case kindClose:
		st.ended, st.gone = true, os.NewSyscallError("write", unix.EPIPE)
	case kindReset:
		st.ended, st.reset, st.gone = true, true, os.NewSyscallError("read", unix.ECONNRESET)
		st.drop()
	case kindCredit:
		more := int(binary.BigEndian.Uint32(payload))
		if more > maxWindow*2 || st.credit+more > maxWindow*2 {
			return fmt.Errorf("%w: a credit of %d and %d bytes", errFrame, st.credit, more)
		}
		st.credit += more
		st.writer.wake()
		return nil
	default:
		return fmt.Errorf("%w: kind %d", errFrame, k)
	}
	if st.session.opened != nil && !st.used {
		st.used = true // it counts once
		if st.session.vain++; st.session.vain > maxVain {
			return fmt.Errorf("%w: %d streams for nothing", errFrame, st.session.vain)
		}
	}
	st.reader.wake()
	st.writer.wake()
	return nil
}

// tell tells the handler, if there is one.
func (st *Stream) tell(ended bool) {
	if h := st.handler.Load(); h != nil {
		(*h).Ready(ended)
	}
}

// kept keeps what was not read of a frame while it was told of.
func (st *Stream) kept() {
	st.session.mu.Lock()
	defer st.session.mu.Unlock()
	if len(st.view) == 0 {
		return
	}
	st.behind.add(st.view)
	st.view = nil
	st.reader.wake()
}

// drop forgets what was not read.
func (st *Stream) drop() {
	st.view = nil
	st.behind.drop()
}

// Watch has h told of what comes from now on, as a poll.Poller would, by whoever reads the
// connection; nil: nobody is. It reports whether something is there.
func (st *Stream) Watch(h poll.Handler) bool {
	if h == nil {
		st.handler.Store(nil)
		return false
	}
	if w := st.session.Watched; w != nil {
		w()
	}
	st.handler.Store(&h)
	st.session.mu.Lock()
	defer st.session.mu.Unlock()
	return st.behind.n > 0 || len(st.view) > 0 || st.ended || st.session.failed != nil
}

// ReadNow is sock.Read of what has come. The error is unix.EAGAIN, or why it broke off.
func (st *Stream) ReadNow(p []byte) (int, error) {
	st.session.mu.Lock()
	defer st.session.mu.Unlock()
	n := st.copy(p)
	if n > 0 {
		st.skip(n)
		return n, nil
	}
	return 0, st.state()
}

// Peek is ReadNow that leaves the bytes where they are.
func (st *Stream) Peek(p []byte) (int, error) {
	st.session.mu.Lock()
	defer st.session.mu.Unlock()
	if n := st.copy(p); n > 0 {
		return n, nil
	}
	return 0, st.state()
}

// state is what reading meets behind the last byte; nil: the end.
func (st *Stream) state() error {
	switch {
	case st.shut:
		return os.ErrClosed
	case st.reset:
		return st.gone
	case st.ended:
		return nil
	case st.session.failed != nil:
		return st.session.failure()
	}
	return unix.EAGAIN
}

// failure is what its end is to a stream that has not come to its own.
func (s *Session) failure() error {
	if s.failed == io.EOF { //nolint:errorlint // it is Ready's own
		return os.NewSyscallError("read", unix.ECONNRESET)
	}
	return s.failed
}

func (st *Stream) copy(p []byte) int {
	n := st.behind.copy(p)
	return n + copy(p[n:], st.view)
}

// skip says that n bytes were read, and gives credit for them once it is worth a frame.
func (st *Stream) skip(n int) {
	st.owed += n
	before := min(n, st.behind.n)
	st.behind.skip(before)
	st.view = st.view[n-before:]
	if st.ended || st.owed < st.window/2 {
		return
	}
	now := time.Now()
	if now.Sub(st.given) < soon && st.window < maxWindow && st.session.grown+st.window <= maxGrown {
		st.session.grown += st.window
		st.owed += st.window
		st.window *= 2
	}
	st.room += st.owed
	var more [4]byte
	binary.BigEndian.PutUint32(more[:], uint32(st.owed))
	st.session.frame(st.id, kindCredit, more[:])
	st.owed, st.given = 0, now
}

// WriteNow is sock.Write: what it takes is sent when the turn is flushed. The error is
// unix.EAGAIN, or why nobody would read it.
func (st *Stream) WriteNow(p []byte) (int, error) {
	s := st.session
	s.mu.Lock()
	if s.waiting() >= flushAt {
		s.mu.Unlock()
		s.Flush()
		s.mu.Lock()
	}
	defer s.mu.Unlock()
	switch {
	case st.shut || st.sent:
		return 0, os.NewSyscallError("write", unix.EPIPE)
	case st.gone != nil:
		return 0, st.gone
	case s.failed != nil:
		return 0, s.failure()
	case len(p) == 0:
		return 0, nil
	case st.credit == 0:
		return 0, unix.EAGAIN
	}
	limit := outCap
	if len(p) > much {
		limit = flushAt
	}
	if s.waiting() >= limit {
		if !st.crowded {
			st.crowded = true
			s.crowded = append(s.crowded, st)
		}
		return 0, unix.EAGAIN
	}
	p = p[:min(len(p), st.credit, maxData)]
	st.credit -= len(p)
	s.frame(st.id, kindData, p)
	return len(p), nil
}

// Broken is why nobody is at the other end any more; nil: there may be. One that has only
// finished sending is.
func (st *Stream) Broken() error {
	st.session.mu.Lock()
	defer st.session.mu.Unlock()
	if st.gone == nil && st.session.failed != nil {
		return st.session.failure()
	}
	return st.gone
}

// CloseWrite says that nothing follows.
func (st *Stream) CloseWrite() error {
	st.session.mu.Lock()
	if st.gone != nil || st.shut || st.session.failed != nil {
		st.session.mu.Unlock()
		return os.NewSyscallError("shutdown", unix.ENOTCONN)
	}
	if !st.sent {
		st.sent = true
		st.session.frame(st.id, kindEnd, nil)
	}
	st.session.mu.Unlock()
	st.session.Flush()
	return nil
}

// SetLinger with 0 has Close break the stream off, as it does a connection.
func (st *Stream) SetLinger(sec int) error {
	st.session.mu.Lock()
	defer st.session.mu.Unlock()
	st.hard = st.hard || sec == 0
	return nil
}

// Close ends it, in both directions.
func (st *Stream) Close() error {
	s := st.session
	s.mu.Lock()
	if st.shut {
		s.mu.Unlock()
		return os.ErrClosed
	}
	st.shut = true
	st.drop()
	st.reader.end()
	st.writer.end()
	delete(s.streams, st.id)
	s.grown -= st.window - Window
	if k := kindClose; st.gone == nil {
		if st.hard {
			k = kindReset
		}
		s.frame(st.id, k, nil)
	}
	s.mu.Unlock()
	st.handler.Store(nil)
	s.Flush()
	s.over()
	return nil
}

// Read is syscall.RawConn's: it waits until f, which is called as something comes, reports
// true. The error is os.ErrDeadlineExceeded or os.ErrClosed.
func (st *Stream) Read(f func(uintptr) bool) error { return st.reader.wait(st.session, f) }

// Write is syscall.RawConn's, for room.
func (st *Stream) Write(f func(uintptr) bool) error { return st.writer.wait(st.session, f) }

// Control is syscall.RawConn's.
func (st *Stream) Control(f func(uintptr)) error {
	f(0)
	return nil
}

// SetDeadline is net.Conn's.
func (st *Stream) SetDeadline(t time.Time) error {
	st.reader.by(t)
	st.writer.by(t)
	return nil
}

// SetReadDeadline is net.Conn's.
func (st *Stream) SetReadDeadline(t time.Time) error {
	st.reader.by(t)
	return nil
}

// SetWriteDeadline is net.Conn's.
func (st *Stream) SetWriteDeadline(t time.Time) error {
	st.writer.by(t)
	return nil
}
