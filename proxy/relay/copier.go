package relay

import (
	"errors"
	"io"
	"sync"

	"golang.org/x/sys/unix"
)

// block is what a copier reads into once there is much.
const block = 128 << 10

var blocks = sync.Pool{New: func() any { return new([block]byte) }}

// copier moves the bytes of one direction where either end is encrypted, so that they
// come by this process. It holds a buffer while it has bytes: a small one, and a large
// one once growAfter reads in a row had filled a small one.
type copier struct {
	src, dst *conn

	lent  *[bufferSize]byte
	large *[block]byte
	full  int // reads in a row
	n     int
	err   error
}

func (c *copier) run() (uint64, bool, error) {
	var moved uint64
	read := c.read // once, not an allocation per call
	for {
		if err := c.src.raw.Read(read); err != nil {
			return moved, true, err
		}
		switch {
		case errors.Is(c.err, io.EOF):
			// A failure is a reset meanwhile: the other direction finds out.
			_ = c.dst.CloseWrite()
			return moved, false, nil
		case c.err != nil:
			return moved, true, c.err
		}
		_, err := c.dst.Write(c.buffer()[:c.n])
		c.release()
		if err != nil {
			return moved, false, err
		}
		moved += uint64(c.n)
	}
}

// read takes what the source has, and reports false when it has nothing yet.
func (c *copier) read(fd uintptr) bool {
	buf := c.buffer()
	for {
		n, err := c.src.take(fd, buf)
		switch {
		case n > 0:
			if c.full++; n < bufferSize {
				c.full = 0
			}
			c.n = n
			return true
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			c.release()
			return false
		case err == nil:
			err = io.EOF
		}
		c.release()
		c.err = err
		return true
	}
}

// buffer is the one that is held.
func (c *copier) buffer() []byte {
	switch {
	case c.large != nil:
		return c.large[:]
	case c.lent != nil:
		return c.lent[:]
	case c.full >= growAfter:
		c.large = blocks.Get().(*[block]byte)
		return c.large[:]
	}
	c.lent = buffers.Get().(*[bufferSize]byte)
	return c.lent[:]
}

func (c *copier) release() {
	if c.large != nil {
		blocks.Put(c.large)
	}
	if c.lent != nil {
		buffers.Put(c.lent)
	}
	c.large, c.lent = nil, nil
}
