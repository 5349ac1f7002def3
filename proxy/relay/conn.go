package relay

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/http1"
	"github.com/weirmesh/weir/proxy/http2"
	"github.com/weirmesh/weir/proxy/mtls"
	"github.com/weirmesh/weir/proxy/mux"
	"github.com/weirmesh/weir/proxy/poll"
	"github.com/weirmesh/weir/proxy/sock"
	"github.com/weirmesh/weir/proxy/upstream"
)

const (
	// bufferSize is what a connection reads into, while it has something to read.
	bufferSize = 16 << 10
	// maxBuffer holds the largest head, and bytes behind it.
	maxBuffer = http1.MaxHead + bufferSize
)

// buffers are lent to connections while these have bytes.
var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// conn is a connection with the bytes that were read of it and not passed on yet.
// It holds a buffer only while there are any: an idle one costs none. One
// goroutine reads; another one may write.
type conn struct {
	link
	tcp    *net.TCPConn // nil: it is a stream
	raw    syscall.RawConn
	stream *mux.Stream // nil: it is a connection of its own
	secure *mtls.Conn  // what the bytes go through; nil: they go as they are

	lent *[bufferSize]byte // buf, if that is a buffer of the pool
	buf  []byte            // nil: none is held
	r, w int               // of buf, what is not passed on

	socket   uintptr // good until who has the connection closes it; of a stream none
	full     bool    // the last read took as much as there was room for
	eof      bool
	err      error
	missed   error              // of takeNow: fill's next
	fd       func(uintptr) bool // fill's, once and not an allocation per call
	deadline time.Time          // of reading

	rest    []byte             // what Write has yet to write
	failed  error              // of writing
	writing func(uintptr) bool // Write's, as fd
}

// link is what a connection is apart from its bytes: a *net.TCPConn, or a *mux.Stream.
type link interface {
	SetDeadline(time.Time) error
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
	SetLinger(sec int) error
	CloseWrite() error
}

func newConn(tcp *net.TCPConn) (*conn, error) {
	raw, err := tcp.SyscallConn()
	if err != nil {
		return nil, err
	}
	c := &conn{link: tcp, tcp: tcp, raw: raw}
	c.fd, c.writing = c.readable, c.writable
	return c, raw.Control(func(fd uintptr) { c.socket = fd })
}

// newStreamConn is of a stream that secure carries.
func newStreamConn(stream *mux.Stream, secure *mtls.Conn) *conn {
	c := &conn{link: stream, raw: stream, stream: stream, secure: secure}
	c.fd, c.writing = c.readable, c.writable
	return c
}

func newUpstreamConn(up *upstream.Conn) (*conn, error) {
	if up.Stream != nil {
		return newStreamConn(up.Stream, up.Secure), nil
	}
	c, err := newConn(up.TCPConn)
	if err != nil {
		return nil, err
	}
	c.secure = up.Secure
	return c, nil
}

// take is sock.Read of what comes, decrypted if it is encrypted.
func (c *conn) take(fd uintptr, p []byte) (int, error) {
	switch {
	case c.stream != nil:
		return c.stream.ReadNow(p)
	case c.secure != nil:
		return c.secure.ReadNow(p)
	}
	return sock.Read(fd, p)
}

// give is sock.Write of what goes, encrypted if it is to be.
func (c *conn) give(fd uintptr, p []byte) (int, error) {
	switch {
	case c.stream != nil:
		return c.stream.WriteNow(p)
	case c.secure != nil:
		return c.secure.WriteNow(p)
	}
	return sock.Write(fd, p)
}

// unsent reports whether something that was written is not with the socket: it goes
// with the next write, even of nothing.
func (c *conn) unsent() bool { return c.stream == nil && c.secure != nil && c.secure.Unsent() }

// CloseWrite says that nothing follows.
func (c *conn) CloseWrite() error {
	if c.stream == nil && c.secure != nil {
		return c.secure.CloseWrite()
	}
	return c.link.CloseWrite()
}

// Write writes all of p. One goroutine at a time.
func (c *conn) Write(p []byte) (int, error) {
	if len(p) == 0 && !c.unsent() {
		return 0, nil
	}
	c.rest, c.failed = p, nil
	err := c.raw.Write(c.writing)
	n := len(p) - len(c.rest)
	c.rest = nil
	if err == nil {
		err = c.failed
	}
	return n, err
}

// writable writes, and reports false while there is no room for all.
func (c *conn) writable(fd uintptr) bool {
	for len(c.rest) > 0 || c.unsent() {
		n, err := c.give(fd, c.rest)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return false
		case err != nil:
			c.failed = os.NewSyscallError("write", err)
			return true
		}
		c.rest = c.rest[n:]
	}
	return true
}

// bytes are those that were read and are not passed on.
func (c *conn) bytes() []byte { return c.buf[c.r:c.w] }

// skip says that n bytes are passed on.
func (c *conn) skip(n int) {
	c.r += n
	if c.r == c.w {
		c.release()
	}
}

// release gives the buffer back, if there is nothing in it.
func (c *conn) release() {
	if c.r != c.w {
		return
	}
	if c.lent != nil {
		buffers.Put(c.lent)
	}
	c.lent, c.buf, c.r, c.w = nil, nil, 0, 0
}

// drop gives the buffer back, whatever is in it.
func (c *conn) drop() {
	c.r = c.w
	c.release()
}

// fill waits for bytes and takes what is there; io.EOF at their end. A failure is
// the connection's, os.ErrDeadlineExceeded among them.
func (c *conn) fill() error {
	if c.eof {
		return io.EOF
	}
	if err := c.missed; err != nil {
		c.missed = nil
		return err
	}
	c.room()
	c.err = nil
	if err := c.raw.Read(c.fd); err != nil {
		c.release()
		return err
	}
	if c.err != nil {
		c.release()
	}
	return c.err
}

// tryFill is fill that does not wait: without bytes it returns
// os.ErrDeadlineExceeded.
func (c *conn) tryFill() error {
	if c.eof {
		return io.EOF
	}
	c.room()
	c.err = nil
	ready := false
	if err := c.raw.Control(func(fd uintptr) { ready = c.readable(fd) }); err != nil {
		return err
	}
	if !ready {
		return os.ErrDeadlineExceeded
	}
	return c.err
}

// takeNow takes what is there, for who is told when something comes: it does not ask
// the runtime. It reports whether there was something; a failure, and an end, is
// fill's.
func (c *conn) takeNow() bool {
	if c.eof || c.missed != nil {
		return true
	}
	c.room()
	c.err = nil
	if !c.readable(c.socket) {
		return false
	}
	if !c.eof {
		c.missed = c.err
	}
	return true
}

// over reports whether takeNow has met the end, or a failure.
func (c *conn) over() bool { return c.eof || c.missed != nil }

// more reports whether the last read took as much as it could: there may be more.
func (c *conn) more() bool { return c.full }

// writeNow writes as much of p as there is room for, in the same way, and returns
// what it did not. A failure is met again by who writes that.
func (c *conn) writeNow(p []byte) []byte {
	c.rest = p
	c.writable(c.socket)
	rest := c.rest
	c.rest = nil
	return rest
}

// room makes room for more bytes behind those that are there.
func (c *conn) room() {
	switch {
	case c.buf == nil || c.w < len(c.buf):
	case c.r > 0:
		c.w = copy(c.buf, c.buf[c.r:c.w])
		c.r = 0
	case len(c.buf) < maxBuffer:
		larger := make([]byte, min(4*len(c.buf), maxBuffer))
		copy(larger, c.buf[:c.w])
		if c.lent != nil {
			buffers.Put(c.lent)
			c.lent = nil
		}
		c.buf = larger
	}
}

// readable reads, and reports false when there is nothing yet. The buffer is not
// held while it waits.
func (c *conn) readable(fd uintptr) bool {
	if c.buf == nil {
		c.lent = buffers.Get().(*[bufferSize]byte)
		c.buf = c.lent[:]
	}
	c.full = false
	for {
		n, err := c.take(fd, c.buf[c.w:])
		switch {
		case n > 0:
			c.w += n
			c.full = c.w == len(c.buf)
			return true
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			c.release()
			return false
		case err != nil:
			c.err = os.NewSyscallError("read", err)
			return true
		}
		c.eof, c.err = true, io.EOF
		return true
	}
}

// awaitReadable returns when there is something to read, an end among it, and does
// not take it. A failure is the connection's, which nobody will hear of again, or
// os.ErrDeadlineExceeded.
func (c *conn) awaitReadable() error {
	if c.r < c.w || c.eof {
		return nil
	}
	var failed error
	err := c.raw.Read(func(fd uintptr) bool {
		var nothing bool
		nothing, failed = c.silent(fd)
		return !nothing
	})
	return errors.Join(err, failed)
}

// quiet reports whether nothing has come of an idle connection: no byte, no end,
// no failure.
func (c *conn) quiet() bool {
	if c.r < c.w || c.eof {
		return false
	}
	out := false
	err := c.raw.Control(func(fd uintptr) { out, _ = c.silent(fd) })
	return out && err == nil
}

// silent looks without taking, but for a failure.
func (c *conn) silent(fd uintptr) (bool, error) {
	var one [1]byte
	_, err := c.peek(fd, one[:])
	switch {
	case errors.Is(err, unix.EAGAIN):
		return true, nil
	case err != nil:
		return false, os.NewSyscallError("recv", err)
	}
	return false, nil
}

// peek is take that leaves the bytes where they are.
func (c *conn) peek(fd uintptr, p []byte) (int, error) {
	switch {
	case c.stream != nil:
		return c.stream.Peek(p)
	case c.secure != nil:
		return c.secure.Peek(p)
	}
	for {
		n, err := sock.Peek(fd, p)
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// reset reports whether the peer has broken the connection off. One that has
// only finished sending has not.
func (c *conn) reset() bool {
	var broken error
	err := c.raw.Control(func(fd uintptr) { broken = c.broken(fd) })
	return broken != nil || err != nil
}

// broken is why the peer is not there any more; nil: it may be.
func (c *conn) broken(fd uintptr) error {
	if c.stream != nil {
		return c.stream.Broken()
	}
	errno, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && errno != 0 {
		err = os.NewSyscallError("half-closed", unix.Errno(errno))
	}
	return err
}

// polled has the poller tell h what comes, and reports whether it does. It may tell in vain.
func (c *conn) polled(p *http2.Poller, h poll.Handler) bool {
	if c.stream == nil {
		return p.Add(int(c.socket), h) == nil
	}
	c.stream.Watch(h)
	return true
}

// unpolled has it tell nobody.
func (c *conn) unpolled(p *http2.Poller) {
	if c.stream == nil {
		p.Remove(int(c.socket))
	} else {
		c.stream.Watch(nil)
	}
}

// readBy sets when reading fails. The zero time: never.
func (c *conn) readBy(t time.Time) {
	if !t.Equal(c.deadline) {
		c.deadline = t
		_ = c.SetReadDeadline(t)
	}
}
