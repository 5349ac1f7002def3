package http2

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/sock"
)

// buffer is pooled by its pointer.
type buffer struct{ b []byte }

var buffers = sync.Pool{New: func() any { return &buffer{make([]byte, 0, maxFrame)} }}

func getBuffer() *buffer { return buffers.Get().(*buffer) }

// put gives a buffer back. One that grew far goes to the collector.
func (b *buffer) put() {
	if cap(b.b) <= 4*outputLimit {
		b.b = b.b[:0]
		buffers.Put(b)
	}
}

// input reads a connection through a buffer that it has only while there is
// something in it: a connection that waits holds none.
type input struct {
	src     io.Reader
	raw     syscall.RawConn // nil: src is no socket
	over    direct          // what is on the socket; nil: the frames themselves
	waiting func()          // called before a read that may block

	buf *buffer
	pos int  // in buf
	mid bool // something of the frame under way has been read

	// For others to look at: how often something arrived, and whether the peer is
	// waited for in the middle of a frame.
	reads atomic.Uint64
	stuck atomic.Bool

	try func(fd uintptr) bool // readNow, an allocation less
	err error                 // its
}

// newInput reads src, and before it the bytes that somebody else has read already.
func newInput(src io.Reader, raw syscall.RawConn, head []byte, waiting func()) *input {
	in := &input{src: src, raw: raw, waiting: waiting}
	in.try = in.readNow
	if len(head) > 0 {
		in.buf = getBuffer()
		in.buf.b = append(in.buf.b, head...)
	}
	return in
}

// boundary says that a frame, or a header block, has been read to its end.
func (in *input) boundary() { in.mid = false }

// Read is io.Reader's.
func (in *input) Read(p []byte) (int, error) {
	if in.buf == nil {
		if err := in.fill(); err != nil {
			return 0, err
		}
	}
	in.mid = true
	n := copy(p, in.buf.b[in.pos:])
	in.pos += n
	if in.pos == len(in.buf.b) {
		in.release()
	}
	return n, nil
}

func (in *input) release() {
	if in.buf != nil {
		in.buf.put()
		in.buf, in.pos = nil, 0
	}
}

// fill waits for a byte and takes all that came with it.
func (in *input) fill() error {
	in.waiting()
	in.stuck.Store(in.mid)
	var err error
	if in.raw != nil {
		in.err = nil
		if err = in.raw.Read(in.try); err == nil {
			err = in.err
		}
	} else {
		in.buf = getBuffer()
		var n int
		n, err = in.src.Read(in.buf.b[:cap(in.buf.b)])
		in.buf.b = in.buf.b[:n]
		if n > 0 {
			err = nil
		} else if err == nil {
			err = io.ErrNoProgress
		}
	}
	in.reads.Add(1)
	if err != nil {
		in.release()
	}
	return err
}

func (in *input) now(fd uintptr, p []byte) (int, error) {
	if in.over != nil {
		return in.over.ReadNow(p)
	}
	return sock.Read(fd, p)
}

// readNow reads what a socket has, and reports false when it has nothing yet.
func (in *input) readNow(fd uintptr) bool {
	buf := getBuffer()
	for {
		n, err := in.now(fd, buf.b[:cap(buf.b)])
		switch {
		case n > 0:
			buf.b = buf.b[:n]
			in.buf = buf
			return true
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			buf.put()
			return false
		case err != nil:
			in.err = os.NewSyscallError("read", err)
		default:
			in.err = io.EOF
		}
		buf.put()
		return true
	}
}
