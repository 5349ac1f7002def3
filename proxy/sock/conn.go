package sock

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Conn is a connection that reads and writes by the calls of this package.
type Conn struct {
	net.Conn
	raw     syscall.RawConn
	in, out transfer
}

// transfer is one call of Read or of Write, of which there is one at a time each way. It
// is kept, for a call to allocate nothing.
type transfer struct {
	mu  sync.Mutex
	p   []byte // what is to be filled, or is yet to be written
	n   int    // bytes so far
	err error
	try func(fd uintptr) bool // false: the socket is to be waited for
}

// NewConn wraps a connection of package net's, which the Conn closes.
func NewConn(c interface {
	net.Conn
	syscall.Conn
}) (*Conn, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	out := &Conn{Conn: c, raw: raw}
	out.in.try, out.out.try = out.in.read, out.out.write
	return out, nil
}

// Read is io.Reader's.
func (c *Conn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	n, err := c.in.run(p, c.raw.Read)
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}

// Write is io.Writer's.
func (c *Conn) Write(p []byte) (int, error) { return c.out.run(p, c.raw.Write) }

func (t *transfer) run(p []byte, wait func(func(uintptr) bool) error) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.p, t.n, t.err = p, 0, nil
	err := wait(t.try)
	t.p = nil
	if err == nil {
		err = t.err
	}
	return t.n, err
}

// read reads what there is.
func (t *transfer) read(fd uintptr) bool { return t.call("recvfrom", Read, fd) }

// write writes all.
func (t *transfer) write(fd uintptr) bool {
	for len(t.p) > 0 {
		if !t.call("sendto", Write, fd) {
			return false
		}
		if t.err != nil {
			break
		}
	}
	return true
}

// call calls until no signal interrupts, and reports false if the socket is not ready.
func (t *transfer) call(name string, call func(uintptr, []byte) (int, error), fd uintptr) bool {
	for {
		n, err := call(fd, t.p)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return false
		}
		t.n, t.p, t.err = t.n+n, t.p[n:], os.NewSyscallError(name, err)
		return true
	}
}
