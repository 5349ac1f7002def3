package mtls

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Conn is a connection between two proxies. One goroutine reads; another one may
// write. ReadNow, WriteNow and Silent are for who holds the socket: they do not wait,
// nor ask the runtime.
type Conn struct {
	tls    *tls.Conn
	wire   *wire
	peer   string
	until  time.Time
	client bool

	protocol string

	verified int64         // when the peer was, in Unix seconds
	trust    atomic.Uint64 // the number of the roots that the peer hangs on

	peeked *buffer // what Silent has found; nil: nothing
	heard  bool    // something was read
}

var (
	// ErrTruncated is an end that the peer did not announce: bytes may be missing.
	ErrTruncated = errors.New("mtls: the connection ended without TLS's end")
	// ErrRefused is that the server did not take this client, which it says only after
	// its handshake is over: it has heeded nothing of what was sent.
	ErrRefused = errors.New("mtls: refused by the peer")
)

// Peer is the other end's SPIFFE ID.
func (c *Conn) Peer() string { return c.peer }

// Streams reports whether what is inside is streams of package mux.
func (c *Conn) Streams() bool { return c.protocol == Streams }

// Until is when the first of the two certificates ends that it was made with.
func (c *Conn) Until() time.Time { return c.until }

// ReadNow is sock.Read of what is decrypted. It takes all there is, unless p is full.
// Errors are unix.EAGAIN, the socket's, TLS's, or an ErrTruncated or ErrRefused.
func (c *Conn) ReadNow(p []byte) (int, error) {
	n := c.takePeeked(p)
	for n < len(p) {
		c.wire.dry = n > 0 && c.wire.dry
		m, err := c.tls.Read(p[n:])
		n += m
		if err == nil || errors.Is(err, errNothing) && c.again(n) {
			continue
		}
		if n == 0 {
			return 0, c.failure(err)
		}
		break // it is met again
	}
	c.heard = true
	return n, nil
}

// again reports whether the socket must be asked once more before it is said that
// nothing is there: that it had less than there was room for says nothing of its end.
func (c *Conn) again(n int) bool { return n == 0 && c.wire.dry }

func (c *Conn) takePeeked(p []byte) int {
	b := c.peeked
	if b == nil {
		return 0
	}
	n := copy(p, b.b[b.from:])
	if b.from += n; b.from == len(b.b) {
		b.put()
		c.peeked = nil
	}
	return n
}

// failure is what an error of crypto/tls means; nil: the end.
func (c *Conn) failure(err error) error {
	// What TLS has to say without being asked, an answer to a key update or why it fails,
	// goes as far as there is room; the next write takes the rest along.
	_ = c.wire.flush()
	switch {
	case errors.Is(err, errNothing):
		return unix.EAGAIN
	case errors.Is(err, io.EOF) && c.wire.ended, errors.Is(err, io.ErrUnexpectedEOF):
		return ErrTruncated
	case errors.Is(err, io.EOF):
		return nil
	case c.client && !c.heard && alerted(err):
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return err
}

// WriteNow is sock.Write of what is to be encrypted. What it took may still be Unsent.
// An empty p sends that.
func (c *Conn) WriteNow(p []byte) (int, error) {
	if err := c.wire.flush(); err != nil || len(p) == 0 {
		return 0, err
	}
	p = p[:min(len(p), gather)]
	if len(p) > smallBuffer-records {
		c.wire.reserve(largeBuffer)
	}
	n, err := c.tls.Write(p)
	if err != nil {
		return 0, err
	}
	_ = c.wire.flush() // a failure is met again
	return n, nil
}

// records is more than TLS adds to a small buffer.
const records = 128

// Unsent reports whether something that was taken is not with the socket: another
// write, even of nothing, sends it.
func (c *Conn) Unsent() bool { return c.wire.unsent() }

// Peek is ReadNow that leaves the bytes where they are. A failure is taken.
func (c *Conn) Peek(p []byte) (int, error) {
	if c.peeked == nil {
		b := lend(smallBuffer)
		n, err := c.ReadNow(b.b[:smallBuffer])
		if n == 0 {
			b.put()
			return 0, err
		}
		b.b = b.b[:n]
		c.peeked = b
	}
	return copy(p, c.peeked.b[c.peeked.from:]), nil
}

// Read is net.Conn's: it waits.
func (c *Conn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	var n int
	var failed error
	err := c.wire.raw.Read(func(uintptr) bool {
		n, failed = c.ReadNow(p)
		return !errors.Is(failed, unix.EAGAIN)
	})
	if err = errors.Join(err, failed); n == 0 && err == nil {
		return 0, io.EOF
	}
	return n, err
}

// Write is net.Conn's: it waits until all is with the socket.
func (c *Conn) Write(p []byte) (int, error) {
	done := 0
	var failed error
	err := c.wire.raw.Write(func(uintptr) bool {
		for done < len(p) || c.Unsent() {
			n, err := c.WriteNow(p[done:])
			if errors.Is(err, unix.EAGAIN) {
				return false
			}
			if done += n; err != nil {
				failed = err
				return true
			}
		}
		return true
	})
	return done, errors.Join(err, failed)
}

// CloseWrite says that nothing follows: to the peer's TLS, and to its socket.
func (c *Conn) CloseWrite() error {
	if err := c.tls.CloseWrite(); err != nil {
		return err
	}
	if _, err := c.Write(nil); err != nil {
		return err
	}
	return c.wire.tcp.CloseWrite()
}

// Close closes the socket. It does not say that nothing follows: after a failure the
// peer must not take what it got for all.
func (c *Conn) Close() error { return c.wire.tcp.Close() }

// Release gives back what is held of bytes that nobody will read or send. Nobody reads
// or writes any more.
func (c *Conn) Release() {
	c.wire.drop()
	if c.peeked != nil {
		c.peeked.put()
		c.peeked = nil
	}
}

// NetConn is the socket: for its options.
func (c *Conn) NetConn() net.Conn { return c.wire.tcp }

// SyscallConn is the socket's, to wait for: its bytes are encrypted.
func (c *Conn) SyscallConn() (syscall.RawConn, error) { return c.wire.raw, nil }

// LocalAddr is net.Conn's.
func (c *Conn) LocalAddr() net.Addr { return c.wire.tcp.LocalAddr() }

// RemoteAddr is net.Conn's.
func (c *Conn) RemoteAddr() net.Addr { return c.wire.tcp.RemoteAddr() }

// SetDeadline is net.Conn's.
func (c *Conn) SetDeadline(t time.Time) error { return c.wire.tcp.SetDeadline(t) }

// SetReadDeadline is net.Conn's.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.wire.tcp.SetReadDeadline(t) }

// SetWriteDeadline is net.Conn's.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.wire.tcp.SetWriteDeadline(t) }
