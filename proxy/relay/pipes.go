package relay

import (
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// pipeSize bounds what one direction of a connection holds in the proxy, and
	// largePipe what one does that has much to move: growAfter fills of half a pipe in
	// a row. In a large one a byte costs a third less CPU; 1 MiB is what an
	// unprivileged user may have at most (fs.pipe-max-size). Not all are large, as a
	// user's pipes are to be within 64 MiB (fs.pipe-user-pages-soft, pipe(7)), and
	// those beyond that hold next to nothing.
	pipeSize  = 256 << 10
	largePipe = 1 << 20
	growAfter = 8
	// maxIdlePipes are kept for the next bytes that come, maxIdleLarge of them large.
	maxIdlePipes = 32
	maxIdleLarge = 4
)

// pipe is what splice(2) needs between two sockets.
type pipe struct{ r, w, size int }

// resize makes it larger or smaller. Refused past the user's limit; then its size is
// what it was.
func (x *pipe) resize(size int) {
	if got, err := unix.FcntlInt(uintptr(x.r), unix.F_SETPIPE_SZ, size); err == nil {
		x.size = got
	}
}

// pipes lends out pipes, so that a connection holds one only while bytes move: an
// idle connection costs two descriptors, not six.
type pipes struct {
	mu     sync.Mutex
	idle   []pipe
	large  int // of idle
	closed bool
}

// get returns an empty pipe, or false if there is no descriptor for one.
func (p *pipes) get() (pipe, bool) {
	p.mu.Lock()
	if n := len(p.idle); n > 0 {
		out := p.idle[n-1]
		p.idle = p.idle[:n-1]
		if out.size > pipeSize {
			p.large--
		}
		p.mu.Unlock()
		return out, true
	}
	p.mu.Unlock()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return pipe{}, false
	}
	out := pipe{r: fds[0], w: fds[1], size: pipeSize}
	out.resize(pipeSize)
	return out, true
}

// put takes an empty pipe back.
func (p *pipes) put(x pipe) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || len(p.idle) == maxIdlePipes {
		x.close()
		return
	}
	if x.size > pipeSize && p.large == maxIdleLarge {
		x.resize(pipeSize)
	}
	if x.size > pipeSize {
		p.large++
	}
	p.idle = append(p.idle, x)
}

// close lets go of the idle ones; those on loan are closed when they come back.
func (p *pipes) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, x := range p.idle {
		x.close()
	}
	p.idle, p.large = nil, 0
}

func (x pipe) close() {
	unix.Close(x.r)
	unix.Close(x.w)
}
