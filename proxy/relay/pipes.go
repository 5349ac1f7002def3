package relay

import (
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// pipeSize bounds what one direction of a connection holds in the proxy.
	// Larger pipes are hardly faster, and an unprivileged user may have 64 MiB
	// in all (fs.pipe-user-pages-soft, pipe(7)).
	pipeSize = 256 << 10
	// maxIdlePipes are kept for the next bytes that come.
	maxIdlePipes = 32
)

// pipe is what splice(2) needs between two sockets.
type pipe struct{ r, w int }

// pipes lends out pipes, so that a connection holds one only while bytes move: an
// idle connection costs two descriptors, not six.
type pipes struct {
	mu     sync.Mutex
	idle   []pipe
	closed bool
}

// get returns an empty pipe, or false if there is no descriptor for one.
func (p *pipes) get() (pipe, bool) {
	p.mu.Lock()
	if n := len(p.idle); n > 0 {
		out := p.idle[n-1]
		p.idle = p.idle[:n-1]
		p.mu.Unlock()
		return out, true
	}
	p.mu.Unlock()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return pipe{}, false
	}
	// Refused past the user's limit; then the size is what the kernel gives.
	_, _ = unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeSize)
	return pipe{fds[0], fds[1]}, true
}

// put takes an empty pipe back.
func (p *pipes) put(x pipe) {
	p.mu.Lock()
	if !p.closed && len(p.idle) < maxIdlePipes {
		p.idle = append(p.idle, x)
		p.mu.Unlock()
		return
	}
	p.mu.Unlock()
	x.close()
}

// close lets go of the idle ones; those on loan are closed when they come back.
func (p *pipes) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, x := range p.idle {
		x.close()
	}
	p.idle = nil
}

func (x pipe) close() {
	unix.Close(x.r)
	unix.Close(x.w)
}
