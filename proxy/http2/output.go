package http2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/sock"
)

// output is the frames of a connection that its socket has not taken. Of conn.mu.
type output struct {
	buf      *buffer // nil: none
	inFlight int     // bytes that a writer has
	writing  bool    // there is a writer: a turn, or drain
	sent     uint64  // bytes that the socket took
	listed   bool    // a turn will flush it
	header   int     // where in buf the header block begins that is being written
}

const frameHeader = 9 // bytes (RFC 9113, section 4.1)

func (o *output) pending() int {
	if o.buf == nil {
		return o.inFlight
	}
	return o.inFlight + len(o.buf.b)
}

func (o *output) bytes() *[]byte {
	if o.buf == nil {
		o.buf = getBuffer()
	}
	return &o.buf.b
}

// Write is the compressor's output.
func (o *output) Write(p []byte) (int, error) {
	o.buf.b = append(o.buf.b, p...)
	return len(p), nil
}

func appendFrame(b []byte, length int, t http2.FrameType, flags http2.Flags, id uint32) []byte {
	return append(b, byte(length>>16), byte(length>>8), byte(length), byte(t), byte(flags),
		byte(id>>24), byte(id>>16), byte(id>>8), byte(id))
}

func (o *output) data(id uint32, p []byte, end bool) {
	var flags http2.Flags
	if end {
		flags = http2.FlagDataEndStream
	}
	b := o.bytes()
	*b = append(appendFrame(*b, len(p), http2.FrameData, flags, id), p...)
}

func (o *output) uint32(t http2.FrameType, id, v uint32) {
	b := o.bytes()
	*b = binary.BigEndian.AppendUint32(appendFrame(*b, 4, t, 0, id), v)
}

func (o *output) windowUpdate(id uint32, n int) {
	o.uint32(http2.FrameWindowUpdate, id, uint32(n))
}

func (o *output) reset(id uint32, code Code) { o.uint32(http2.FrameRSTStream, id, uint32(code)) }

func (o *output) settings(settings ...http2.Setting) {
	b := o.bytes()
	*b = appendFrame(*b, 6*len(settings), http2.FrameSettings, 0, 0)
	for _, s := range settings {
		*b = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(*b, uint16(s.ID)), s.Val)
	}
}

func (o *output) settingsAck() {
	b := o.bytes()
	*b = appendFrame(*b, 0, http2.FrameSettings, http2.FlagSettingsAck, 0)
}

func (o *output) ping(ack bool, data [8]byte) {
	var flags http2.Flags
	if ack {
		flags = http2.FlagPingAck
	}
	b := o.bytes()
	*b = append(appendFrame(*b, len(data), http2.FramePing, flags, 0), data[:]...)
}

func (o *output) goAway(last uint32, code Code) {
	b := o.bytes()
	*b = appendFrame(*b, 8, http2.FrameGoAway, 0, 0)
	*b = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(*b, last), uint32(code))
}

// beginHeaders leaves room for the header of the block's first frame.
func (o *output) beginHeaders() {
	b := o.bytes()
	o.header = len(*b)
	*b = appendFrame(*b, 0, 0, 0, 0)
}

// endHeaders makes frames of what the compressor wrote since.
func (o *output) endHeaders(id uint32, end bool) {
	var flags http2.Flags
	if end {
		flags = http2.FlagHeadersEndStream
	}
	b := o.bytes()
	block := (*b)[o.header+frameHeader:]
	if len(block) <= maxFrame {
		appendFrame((*b)[:o.header], len(block), http2.FrameHeaders, flags|http2.FlagHeadersEndHeaders, id)
		return
	}
	rest := append([]byte(nil), block[maxFrame:]...)
	*b = (*b)[:o.header+frameHeader+maxFrame]
	appendFrame((*b)[:o.header], maxFrame, http2.FrameHeaders, flags, id)
	for len(rest) > 0 {
		n := min(len(rest), maxFrame)
		flags = 0
		if n == len(rest) {
			flags = http2.FlagContinuationEndHeaders
		}
		*b = append(appendFrame(*b, n, http2.FrameContinuation, flags, id), rest[:n]...)
		rest = rest[n:]
	}
}

// Turn is a goroutine's turn at connections: what it queues is written when it
// calls Flush. The zero value is ready. Handlers and observers are given the turn
// of the goroutine that calls them, which flushes it itself.
type Turn struct{ conns []*conn }

// add sees to it that c's output is written. c.mu is held.
func (t *Turn) add(c *conn) {
	if c.out.pending() > outputCap {
		c.killLocked(fmt.Errorf("%w: %d bytes wait to be read", ErrAbuse, c.out.pending()))
	}
	if !c.out.listed {
		c.out.listed = true
		t.conns = append(t.conns, c)
	}
}

// Flush writes what was queued, without waiting for sockets that have no room.
func (t *Turn) Flush() {
	for len(t.conns) > 0 {
		last := len(t.conns) - 1
		c := t.conns[last]
		t.conns[last] = nil
		t.conns = t.conns[:last]
		c.flush(t)
	}
}

// flush writes without waiting. What the socket does not take is left to drain.
func (c *conn) flush(t *Turn) {
	c.mu.Lock()
	c.out.listed = false
	for !c.out.writing && c.out.buf != nil && !c.dead {
		out := c.out.buf
		c.out.buf, c.out.inFlight, c.out.writing = nil, len(out.b), true
		c.mu.Unlock()
		n, err := c.writeNow(out.b)
		c.mu.Lock()
		if err != nil {
			c.out.inFlight, c.out.writing = 0, false
			c.stopped.Broadcast()
			c.mu.Unlock()
			c.kill(err)
			return
		}
		c.out.sent += uint64(n)
		if (n < len(out.b) || c.now.unsent()) && !c.dead {
			c.out.inFlight = len(out.b) - n
			c.drains++
			go c.drain(out, n)
			break
		}
		out.put()
		c.out.inFlight, c.out.writing = 0, false
		c.stopped.Broadcast()
	}
	waiting := len(c.blocked) > 0 && c.out.pending() < outputLimit
	c.mu.Unlock()
	if waiting {
		c.unblock(t)
	}
}

// writeNow writes what the socket takes at once: nothing, if it is no socket.
func (c *conn) writeNow(p []byte) (int, error) {
	if c.raw == nil {
		return 0, nil
	}
	c.now.p, c.now.n, c.now.err = p, 0, nil
	if err := c.raw.Write(c.now.try); err != nil {
		return 0, err
	}
	c.now.p = nil
	return c.now.n, c.now.err
}

// nowWriter is one attempt to write to a socket. Whoever has set output.writing
// may use it.
type nowWriter struct {
	over direct // what is on the socket; nil: the frames themselves
	p    []byte
	n    int
	err  error
	try  func(fd uintptr) bool // write, an allocation less
}

// unsent reports whether something that was written is not with the socket.
func (w *nowWriter) unsent() bool { return w.over != nil && w.over.Unsent() }

func (w *nowWriter) now(fd uintptr, p []byte) (int, error) {
	if w.over != nil {
		return w.over.WriteNow(p)
	}
	return sock.Write(fd, p)
}

func (w *nowWriter) write(fd uintptr) bool {
	for {
		n, err := w.now(fd, w.p)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
		case err != nil:
			w.err = os.NewSyscallError("write", err)
		default:
			w.n = n
		}
		return true
	}
}

// drain writes what flush could not, and what comes meanwhile.
func (c *conn) drain(out *buffer, from int) {
	var t Turn
	for {
		n, err := c.nc.Write(out.b[from:])
		c.mu.Lock()
		c.out.sent += uint64(n)
		out.put()
		out, from = c.out.buf, 0
		c.out.buf, c.out.inFlight = nil, 0
		if err != nil || out == nil || c.dead {
			c.out.writing = false
			c.mu.Unlock()
			if err != nil {
				c.kill(err)
			}
			c.unblock(&t)
			t.Flush()
			c.mu.Lock()
			c.drains--
			c.stopped.Broadcast()
			c.mu.Unlock()
			return
		}
		c.out.inFlight = len(out.b)
		c.mu.Unlock()
		c.unblock(&t)
		t.Flush()
	}
}

// waitDrained returns when no goroutine writes. On a connection that is dead none
// begins any more.
func (c *conn) waitDrained() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.drains > 0 || c.out.writing {
		c.stopped.Wait()
	}
}
