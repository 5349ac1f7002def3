package http2

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/sock"
)

// buffer is pooled by its pointer.
type buffer struct{ b []byte }

// buffers hold at least one frame of the largest size, and the beginning of another.
var buffers = sync.Pool{New: func() any { return &buffer{make([]byte, 0, 2*maxFrame)} }}

func getBuffer() *buffer { return buffers.Get().(*buffer) }

// put gives a buffer back. One that grew far goes to the collector.
func (b *buffer) put() {
	if cap(b.b) <= 4*outputLimit {
		b.b = b.b[:0]
		buffers.Put(b)
	}
}

// input reads a connection through a buffer that it has only while there is
// something in it: a connection that waits holds none, unless in the middle of a frame.
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

	try  func(fd uintptr) bool // readNow, an allocation less
	err  error                 // its
	once func(fd uintptr)      // readNow, for who does not wait
	took int                   // bytes, by the last take
}

// newInput reads src, and before it the bytes that somebody else has read already.
func newInput(src io.Reader, raw syscall.RawConn, head []byte, waiting func()) *input {
	in := &input{src: src, raw: raw, waiting: waiting}
	in.try = in.readNow
	in.once = func(fd uintptr) { in.readNow(fd) }
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

// take reads what the socket has, behind what is there, and does not wait: took says how
// much that was.
func (in *input) take() error {
	in.err, in.took = nil, 0
	if err := in.raw.Control(in.once); err != nil {
		return err
	}
	in.reads.Add(1)
	return in.err
}

// full reports whether there is no room behind what is there.
func (in *input) full() bool { return in.buf != nil && len(in.buf.b) == cap(in.buf.b) }

// whole reports whether the next frame is there, with all its header block, or as much
// of either as says that it is wrong.
func (in *input) whole() bool {
	if in.buf == nil {
		return false
	}
	b := in.buf.b[in.pos:]
	for more := 0; len(b) >= frameHeader; more++ {
		head := http2.FrameHeader{Type: http2.FrameType(b[3]), Flags: http2.Flags(b[4]), Length: uint32(b[0])<<16 | uint32(b[1])<<8 | uint32(b[2])}
		if head.Length > maxFrame || tooShort(head) || more > maxContinuations {
			return true
		}
		length := frameHeader + int(head.Length)
		if len(b) < length {
			return false
		}
		block := head.Type == http2.FrameHeaders && more == 0 || head.Type == http2.FrameContinuation && more > 0
		if !block || head.Flags.Has(http2.FlagHeadersEndHeaders) {
			return true
		}
		b = b[length:]
	}
	return false
}

// room makes room behind what is there, and reports whether there is any.
func (in *input) room() bool {
	if in.full() && in.pos > 0 {
		in.buf.b = in.buf.b[:copy(in.buf.b, in.buf.b[in.pos:])]
		in.pos = 0
	}
	return !in.full()
}

// readNow reads what a socket has, behind what is there, and reports false when it has
// nothing yet.
func (in *input) readNow(fd uintptr) bool {
	buf := in.buf
	if buf == nil {
		buf = getBuffer()
	}
	for {
		n, err := in.now(fd, buf.b[len(buf.b):cap(buf.b)])
		switch {
		case n > 0:
			buf.b = buf.b[:len(buf.b)+n]
			in.buf, in.took = buf, n
			return true
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
		case err != nil:
			in.err = os.NewSyscallError("read", err)
		default:
			in.err = io.EOF
		}
		if in.buf == nil {
			buf.put()
		}
		return in.err != nil
	}
}
