// Package poll has one goroutine wait for many sockets and serve each as something
// comes, as an event loop does.
//
// A goroutine for each connection costs, for each thing that comes, a read in vain, a
// wait that the runtime must be told of, and a switch there and back: with a request
// of 1 KB a quarter of what a proxy takes. The poller has an epoll of its own, which is
// itself a descriptor that the runtime's poller watches: while there is nothing to do
// no thread is held, and whoever is busy with other goroutines hears of it as of any
// other descriptor.
//
// Sockets stay in the runtime's poller as well: the goroutine that a socket belongs to
// may take over at any time, with reads that wait, deadlines and all.
package poll

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"

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
	epoll *os.File
	raw   syscall.RawConn
	again int // an eventfd(2): written to, it is an event of the epoll
	after func()

	mu      sync.Mutex
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
	// So that the runtime watches it.
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("poll: %w", os.NewSyscallError("fcntl", err))
	}
	p := &Poller{epoll: os.NewFile(uintptr(fd), "epoll"), after: after}
	if p.raw, err = p.epoll.SyscallConn(); err != nil {
		p.epoll.Close()
		return nil, fmt.Errorf("poll: %w", err)
	}
	if p.again, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		p.epoll.Close()
		return nil, fmt.Errorf("poll: %w", os.NewSyscallError("eventfd", err))
	}
	if err := p.Add(p.again, nobody{}); err != nil {
		p.Close()
		unix.Close(p.again)
		return nil, err
	}
	return p, nil
}

// nobody handles nothing.
type nobody struct{}

func (nobody) Ready(bool) {}

// Add has h told of what comes for a socket from now on, and of what is there.
func (p *Poller) Add(fd int, h Handler) error {
	p.mu.Lock()
	for fd >= len(p.watched) {
		p.watched = append(p.watched, watched{})
	}
	p.round++
	round := p.round
	p.watched[fd] = watched{h, round}
	p.mu.Unlock()
	event := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLET, Fd: int32(fd), Pad: round}
	var err error
	if failed := p.raw.Control(func(epoll uintptr) {
		err = unix.EpollCtl(int(epoll), unix.EPOLL_CTL_ADD, fd, &event)
	}); failed != nil {
		err = failed
	}
	if err != nil {
		p.forget(fd)
		return fmt.Errorf("poll: %w", os.NewSyscallError("epoll_ctl", err))
	}
	return nil
}

// Remove has nobody told any more, but of what is being told already.
func (p *Poller) Remove(fd int) {
	p.forget(fd)
	_ = p.raw.Control(func(epoll uintptr) {
		_ = unix.EpollCtl(int(epoll), unix.EPOLL_CTL_DEL, fd, nil) // fails once the Poller is closed
	})
}

func (p *Poller) forget(fd int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.watched[fd] = watched{}
}

// Close ends Run, which must have been called.
func (p *Poller) Close() error { return p.epoll.Close() }

const (
	// batch is how many events are taken at a time.
	batch = 128
	// turn is how long the poller goes on before it lets other goroutines have a turn,
	// for which the runtime looks at the descriptors that these wait for.
	turn = 200 * time.Microsecond
)

// Run tells the handlers, until the Poller is closed.
func (p *Poller) Run() {
	defer unix.Close(p.again)
	events := make([]unix.EpollEvent, batch)
	handlers := make([]Handler, 0, batch)
	n, waited := 0, true
	var began time.Time
	take := func(epoll uintptr) bool {
		if !waited && time.Since(began) > turn {
			// There may be more: the runtime is told that there is, once it looks.
			waited = true
			_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(p.again), uintptr(unsafe.Pointer(&one[0])), uintptr(len(one)))
			return false
		}
		n = wait(epoll, events)
		waited = waited || n == 0
		return n > 0
	}
	for p.raw.Read(take) == nil {
		if waited {
			waited, began = false, time.Now()
		}
		handlers = p.who(events[:n], handlers[:0])
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

// one is what is written to an eventfd.
var one = binary.NativeEndian.AppendUint64(nil, 1)

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

// wait takes the events that are there, without telling the scheduler: it does not
// wait (see package sock).
func wait(epoll uintptr, events []unix.EpollEvent) int {
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, epoll, uintptr(unsafe.Pointer(&events[0])), uintptr(len(events)), 0, 0, 0)
	if errno != 0 {
		return 0
	}
	return int(n)
}
