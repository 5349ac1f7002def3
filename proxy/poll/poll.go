// Package poll has one goroutine wait for many sockets and serve each as something
// comes, as an event loop does.
//
// A goroutine for each connection costs, for each thing that comes, a read in vain, a
// wait that the runtime must be told of, and a switch there and back: with a request
// of 1 KB a quarter of what a proxy takes. The poller has an epoll of its own.
//
// It waits in one of two ways. While little comes, the runtime's epoll has the poller's
// in it: no thread is held, and whoever is busy with other goroutines hears of it as of
// any other descriptor. But that is to wait in two epolls, one after the other, and to be
// found by the scheduler in between: with a request of 1 KB a twentieth of what a proxy
// takes. While much comes, and there is one processor to the process, the poller keeps it:
// it waits in its epoll and nowhere else. Goroutines have their turn before it does, and
// when something comes that they wait for (Waited), the poller gives way, and the scheduler
// looks whom it is for. Timers ring up to 5 ms late then.
//
// Sockets stay in the runtime's poller as well: the goroutine that a socket belongs to
// may take over at any time, with reads that wait, deadlines and all.
package poll

import (
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Handler is told that something has come for a socket: bytes, its end, or a failure.
type Handler interface {
	// Ready is called by the poller's goroutine, and must not wait for anything. ended:
	// what has come is, or is followed by, the peer's end or a failure. It is told of
	// each thing once, so all there is must be taken; and it may be told in vain.
	Ready(ended bool)
}

// Poller watches sockets.
type Poller struct {
	epoll int
	waits waits
	after func()

	mu      sync.Mutex
	closed  bool
	watched []watched // by descriptor
	round   int32     // of the last one that was added
}

// watched is a socket's handler. An event of an earlier socket with the same
// descriptor is of an earlier round.
type watched struct {
	handler Handler
	round   int32
}

// New makes a Poller; Run serves it. after, if not nil, is called by its goroutine when it
// has told of all that it has found at a time.
func New(after func()) (*Poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("poll: %w", os.NewSyscallError("epoll_create1", err))
	}
	p := &Poller{epoll: fd, after: after}
	if err := p.waits.open(p); err != nil {
		p.end()
		return nil, fmt.Errorf("poll: %w", err)
	}
	return p, nil
}

// Add has h told of what comes for a socket from now on, and of what is there.
func (p *Poller) Add(fd int, h Handler) error {
	unwaited(fd)
	if err := p.add(fd, h, unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLET); err != nil {
		waited(fd)
		return fmt.Errorf("poll: %w", err)
	}
	return nil
}

func (p *Poller) add(fd int, h Handler, events uint32) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return os.ErrClosed
	}
	for fd >= len(p.watched) {
		p.watched = append(p.watched, watched{})
	}
	p.round++
	event := unix.EpollEvent{Events: events, Fd: int32(fd), Pad: p.round}
	if err := unix.EpollCtl(p.epoll, unix.EPOLL_CTL_ADD, fd, &event); err != nil {
		return os.NewSyscallError("epoll_ctl", err)
	}
	p.watched[fd] = watched{h, p.round}
	return nil
}

// modify has a handler told of other events from now on.
func (p *Poller) modify(fd int, events uint32) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return os.ErrClosed
	}
	event := unix.EpollEvent{Events: events, Fd: int32(fd), Pad: p.watched[fd].round}
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(p.epoll, unix.EPOLL_CTL_MOD, fd, &event))
}

// Remove has nobody told any more, but of what is being told already.
func (p *Poller) Remove(fd int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if fd < len(p.watched) {
		p.watched[fd] = watched{}
	}
	if !p.closed {
		_ = unix.EpollCtl(p.epoll, unix.EPOLL_CTL_DEL, fd, nil)
	}
	waited(fd)
}

// Close ends Run, which must have been called.
func (p *Poller) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	return p.waits.close()
}

// end closes what Close does not, once nobody waits.
func (p *Poller) end() {
	_ = p.Close()
	unix.Close(p.epoll)
	p.waits.end()
}

// Run tells the handlers, until the Poller is closed.
func (p *Poller) Run() {
	defer p.end()
	handlers := make([]Handler, 0, batch)
	for {
		events, err := p.waits.next()
		if err != nil {
			return
		}
		handlers = p.who(events, handlers[:0])
		for i, h := range handlers {
			if h != nil {
				h.Ready(events[i].Events&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0)
			}
		}
		if p.after != nil {
			p.after()
		}
	}
}

// who finds the events' handlers; nil: nobody's any more.
func (p *Poller) who(events []unix.EpollEvent, out []Handler) []Handler {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, e := range events {
		w := p.watched[e.Fd]
		if w.round != e.Pad {
			w.handler = nil
		}
		out = append(out, w.handler)
	}
	return out
}
