package relay

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/sock"
)

// pump moves the bytes of one direction, inside the kernel where it can.
//
// io.Copy between two *net.TCPConn splices as well, but holds its pipe while the
// connection is idle, does not say which end failed, and stalls for good at a TCP
// urgent byte, over which splice(2) does not go.
type pump struct {
	src, dst       *net.TCPConn
	rawSrc, rawDst syscall.RawConn
	pipes          *pipes

	haste   haste
	pipe    pipe
	held    bool   // pipe is on loan
	large   int    // fills in a row that were half of a pipe
	spliced int    // bytes in the pipe
	bytes   []byte // bytes outside it: an urgent one, or all when there is no pipe
	urgent  bool
	eof     bool
	err     error

	one [1]byte
}

func newPump(dst, src *net.TCPConn, pipes *pipes) (*pump, error) {
	rawSrc, err := src.SyscallConn()
	if err != nil {
		return nil, err
	}
	rawDst, err := dst.SyscallConn()
	if err != nil {
		return nil, err
	}
	return &pump{src: src, dst: dst, rawSrc: rawSrc, rawDst: rawDst, pipes: pipes}, nil
}

// run moves bytes until the source ends, then half-closes the destination. It
// returns their number; with an error, whether it was the source that failed.
func (p *pump) run() (uint64, bool, error) {
	defer p.release()
	var moved uint64
	fill, drain := p.fill, p.drain // once, not an allocation per call
	for {
		if err := p.rawSrc.Read(fill); err != nil {
			return moved, true, err
		}
		if p.err != nil {
			return moved, true, p.err
		}
		if p.eof {
			// ENOTCONN: reset meanwhile. The other direction finds out.
			_ = p.dst.CloseWrite()
			return moved, false, nil
		}
		n := uint64(p.spliced + len(p.bytes))
		if err := p.rawDst.Write(drain); err != nil {
			return moved, false, err
		}
		if p.err != nil {
			return moved, false, p.err
		}
		moved += n
	}
}

// fill takes what the source has, and reports false when it has nothing yet.
func (p *pump) fill(fd uintptr) bool {
	p.haste.breathe()
	if !p.held {
		p.pipe, p.held = p.pipes.get()
	}
	if !p.held {
		return p.fillBytes(int(fd), make([]byte, 16<<10))
	}
	for {
		n, err := sock.Splice(fd, uintptr(p.pipe.w), p.pipe.size)
		switch {
		case n > 0:
			p.spliced = n
			p.grow()
			p.haste.came(n, time.Now)
			return true
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil && !errors.Is(err, unix.EAGAIN):
			p.err = os.NewSyscallError("splice", err)
			return true
		}
		// Nothing there, the end, or an urgent byte is next.
		mark, markErr := unix.IoctlGetInt(int(fd), unix.SIOCATMARK)
		switch {
		case markErr == nil && mark != 0:
			p.urgent = true
			return p.fillBytes(int(fd), p.one[:])
		case err == nil:
			p.eof = true
			return true
		}
		p.release()
		p.haste.waited = true
		return false
	}
}

// grow makes the pipe a large one, once it is known that there is much to move.
func (p *pump) grow() {
	if p.large++; p.spliced < pipeSize/2 {
		p.large = 0
	}
	if p.large >= growAfter && p.pipe.size < largePipe {
		p.pipe.resize(largePipe)
		p.large = 0 // if that is refused, not at once again
	}
}

// fillBytes is fill by read(2). At the mark it gets the urgent byte, as the
// sockets have SO_OOBINLINE.
func (p *pump) fillBytes(fd int, buf []byte) bool {
	for {
		n, err := unix.Read(fd, buf)
		switch {
		case n > 0:
			p.bytes = buf[:n]
			return true
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			p.urgent = false
			return false
		case err != nil:
			p.err = os.NewSyscallError("read", err)
			return true
		}
		p.eof = true
		return true
	}
}

// drain gives the destination what fill took, and reports false while it has no
// room.
func (p *pump) drain(fd uintptr) bool {
	for p.err == nil && p.spliced+len(p.bytes) > 0 {
		var n int
		var err error
		if p.spliced > 0 {
			n, err = sock.Splice(uintptr(p.pipe.r), fd, p.spliced)
		} else {
			n, err = p.send(int(fd))
		}
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return false
		case err != nil:
			p.err = os.NewSyscallError("send", err)
		case n == 0:
			p.err = fmt.Errorf("send: %w", io.ErrShortWrite)
		case p.spliced > 0:
			p.spliced -= n
		default:
			p.bytes = p.bytes[n:]
		}
	}
	p.urgent = false
	return true
}

// send passes an urgent byte on as what it is.
func (p *pump) send(fd int) (int, error) {
	flags := unix.MSG_NOSIGNAL | unix.MSG_DONTWAIT
	if p.urgent {
		flags |= unix.MSG_OOB
	}
	return unix.SendmsgN(fd, p.bytes, nil, nil, flags)
}

// release gives the pipe back. One that is not empty would give its bytes to
// another connection.
func (p *pump) release() {
	if !p.held {
		return
	}
	p.held = false
	if p.spliced > 0 {
		p.pipe.close()
		return
	}
	p.pipes.put(p.pipe)
}

// awaitReset returns when a source that has ended is reset after all or lost, with
// what happened, or when its read deadline passes, with nil.
func (c *conn) awaitReset() error {
	var happened error
	err := c.raw.Read(func(fd uintptr) bool {
		happened = c.broken(fd)
		return happened != nil
	})
	if err != nil {
		return nil
	}
	return happened
}
