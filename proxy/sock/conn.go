package sock

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Conn is a connection that reads and writes by the calls of this package.
type Conn struct {
	net.Conn
	raw syscall.RawConn
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
	return &Conn{c, raw}, nil
}

// Read is io.Reader's.
func (c *Conn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	n := 0
	var failed error
	err := c.raw.Read(func(fd uintptr) bool {
		n, failed = now(Read, fd, p)
		return !errors.Is(failed, unix.EAGAIN)
	})
	switch {
	case err != nil:
		return 0, err
	case failed != nil:
		return 0, os.NewSyscallError("recvfrom", failed)
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// Write is io.Writer's.
func (c *Conn) Write(p []byte) (int, error) {
	written := 0
	var failed error
	err := c.raw.Write(func(fd uintptr) bool {
		for written < len(p) {
			var n int
			if n, failed = now(Write, fd, p[written:]); failed != nil {
				return !errors.Is(failed, unix.EAGAIN)
			}
			written += n
		}
		return true
	})
	if err == nil && failed != nil {
		err = os.NewSyscallError("sendto", failed)
	}
	return written, err
}

// now calls until no signal interrupts.
func now(call func(uintptr, []byte) (int, error), fd uintptr, p []byte) (int, error) {
	for {
		if n, err := call(fd, p); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
