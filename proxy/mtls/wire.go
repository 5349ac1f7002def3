package mtls

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/sock"
)

const (
	// smallBuffer holds a record of the largest size, and largeBuffer what is written
	// at a time of what there is much of: gather bytes, with what TLS adds to them.
	smallBuffer = 17 << 10
	largeBuffer = 160 << 10
	largeRead   = 128 << 10
	gather      = 144 << 10
	// growAfter reads in a row that fill the small buffer, and the large one is taken.
	growAfter = 4
)

// buffer is pooled by its pointer. It is held while there is something in it.
type buffer struct {
	b    []byte
	from int // what of b is done with
}

var (
	small = sync.Pool{New: func() any { return &buffer{b: make([]byte, 0, smallBuffer)} }}
	large = sync.Pool{New: func() any { return &buffer{b: make([]byte, 0, largeBuffer)} }}
)

// lend has room for n bytes, if there is a buffer that large.
func lend(n int) *buffer {
	if n > smallBuffer {
		return large.Get().(*buffer)
	}
	return small.Get().(*buffer)
}

func (b *buffer) put() {
	pool := &small
	if cap(b.b) > smallBuffer {
		pool = &large
	}
	b.b, b.from = b.b[:0], 0
	pool.Put(b)
}

// wire is what crypto/tls has for a connection. While hands are shaken it is the
// socket, which is waited for. Afterwards it never waits: what is not there to be read
// is errNothing, and what is written is kept until it is flushed.
type wire struct {
	tcp         *net.TCPConn
	raw         syscall.RawConn
	fd          uintptr // good until the connection is closed
	nonblocking bool

	// Of who reads.
	in    *buffer // nil: nothing is there
	full  int     // reads in a row that filled a small buffer
	dry   bool    // the last read found less than it had room for
	ended bool    // TCP has

	// crypto/tls writes as it reads, too: answers to key updates, alerts.
	mu     sync.Mutex
	out    *buffer // nil: all is flushed
	failed error
}

func newWire(tcp *net.TCPConn, first []byte) (*wire, error) {
	raw, err := tcp.SyscallConn()
	if err != nil {
		return nil, err
	}
	w := &wire{tcp: tcp, raw: raw}
	if err := raw.Control(func(fd uintptr) { w.fd = fd }); err != nil {
		return nil, err
	}
	if len(first) > 0 {
		w.in = lend(len(first))
		w.in.b = append(w.in.b, first...)
	}
	return w, nil
}

// errNothing is that nothing is there to be read. To crypto/tls it is a failure that
// passes.
var errNothing net.Error = nothing{}

type nothing struct{}

func (nothing) Error() string   { return "nothing to read yet" }
func (nothing) Timeout() bool   { return true }
func (nothing) Temporary() bool { return true }

// Read is net.Conn's.
func (w *wire) Read(p []byte) (int, error) {
	if w.in == nil {
		if !w.nonblocking {
			return w.tcp.Read(p)
		}
		if err := w.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, w.in.b[w.in.from:])
	if w.in.from += n; w.in.from == len(w.in.b) {
		w.in.put()
		w.in = nil
	}
	return n, nil
}

// fill takes what the socket has.
func (w *wire) fill() error {
	switch {
	case w.ended:
		return io.EOF
	case w.dry:
		return errNothing
	}
	size := smallBuffer
	if w.full >= growAfter {
		size = largeRead
	}
	in := lend(size)
	for {
		n, err := sock.Read(w.fd, in.b[:size])
		switch {
		case n > 0:
			in.b, w.in, w.dry = in.b[:n], in, n < size
			if w.full++; n < smallBuffer {
				w.full = 0
			}
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			err = errNothing
		case err != nil:
			err = os.NewSyscallError("read", err)
		default:
			w.ended, err = true, io.EOF
		}
		in.put()
		return err
	}
}

var errUnread = errors.New("mtls: the peer reads none of what it makes us write")

// Write is net.Conn's.
func (w *wire) Write(p []byte) (int, error) {
	if !w.nonblocking {
		return w.tcp.Write(p)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.failed != nil {
		return 0, w.failed
	}
	if w.out == nil {
		w.out = lend(len(p))
	}
	if need := len(w.out.b) + len(p); need > cap(w.out.b) {
		if need > largeBuffer {
			w.failed = errUnread
			return 0, w.failed
		}
		larger := lend(need)
		larger.b = append(larger.b, w.out.b[w.out.from:]...)
		w.out.put()
		w.out = larger
	}
	w.out.b = append(w.out.b, p...)
	return len(p), nil
}

// reserve has n bytes gathered in one buffer.
func (w *wire) reserve(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.out == nil {
		w.out = lend(n)
	}
}

// flush writes what was kept, as far as there is room; unix.EAGAIN: there is not
// enough.
func (w *wire) flush() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.failed == nil && w.out != nil {
		if w.out.from == len(w.out.b) {
			w.out.put()
			w.out = nil
			break
		}
		n, err := sock.Write(w.fd, w.out.b[w.out.from:])
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return err
		case err != nil:
			w.failed = os.NewSyscallError("write", err)
		}
		w.out.from += n
	}
	return w.failed
}

// unsent reports whether something is kept.
func (w *wire) unsent() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.out != nil && w.failed == nil
}

// drop gives the buffers back, whatever is in them.
func (w *wire) drop() {
	if w.in != nil {
		w.in.put()
		w.in = nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.failed = net.ErrClosed; w.out != nil {
		w.out.put()
		w.out = nil
	}
}

// Close is net.Conn's. Nobody calls it: whoever shakes hands closes the socket.
func (w *wire) Close() error { return w.tcp.Close() }

func (w *wire) LocalAddr() net.Addr  { return w.tcp.LocalAddr() }
func (w *wire) RemoteAddr() net.Addr { return w.tcp.RemoteAddr() }

// Deadlines are the socket's owner's. crypto/tls sets some of its own, for writes that
// wait: none does here.

func (w *wire) SetDeadline(time.Time) error      { return nil }
func (w *wire) SetReadDeadline(time.Time) error  { return nil }
func (w *wire) SetWriteDeadline(time.Time) error { return nil }
