package poll

import (
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// batch is how many events are taken at a time.
	batch = 128
	// turn is how long the poller goes on before it lets other goroutines have a turn,
	// for which the runtime looks at the descriptors that these wait for.
	turn = 200 * time.Microsecond

	// A wait that is shorter than patience is a short one. After heats of these in a row
	// the poller is hot: it waits for patience at a time, until it has done so cools times
	// in a row with nothing to come for its sockets.
	patience = 5 * time.Millisecond
	heats    = 8
	cools    = 2
	// calm is how long other Pollers must have had nothing to do.
	calm = time.Second
)

// waits is how the goroutine of Run waits.
type waits struct {
	p *Poller

	// outer is an epoll that the runtime watches, with the Poller's in it, which has others
	// in it if it may become hot. Both stay, as epoll_ctl(2) walks all that is in an epoll
	// that it adds to another; asked for is one of them at a time.
	// again is an eventfd(2) that the runtime watches: the goroutine waits for it after it
	// has written to it, so that the runtime looks whom else there is something for.
	outer, again       *os.File
	rawOuter, rawAgain syscall.RawConn

	events []unix.EpollEvent
	n      int  // of events, what was found
	first  bool // it may become hot
	hot    bool
	most   time.Duration // patience
	few    int           // of waits in a row: short ones, or if hot, those for nothing
	waited bool          // there was nothing at first
	began  time.Time     // when there was something again, or it became hot
	owing  bool          // something has come for others
	given  bool          // the runtime has looked

	look, give func(uintptr) bool // as values, an allocation less
}

func (w *waits) open(p *Poller) error {
	w.p, w.events, w.most = p, make([]unix.EpollEvent, batch), patience
	w.look, w.give = w.looks, w.gives
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("epoll_create1", err)
	}
	if w.outer, w.rawOuter, err = seen(fd, "epoll"); err != nil {
		return err
	}
	if fd, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		return os.NewSyscallError("eventfd", err)
	}
	if w.again, w.rawAgain, err = seen(fd, "eventfd"); err != nil {
		return err
	}
	if err := w.ofOuter(unix.EPOLL_CTL_ADD, unix.EPOLLIN); err != nil {
		return err
	}
	w.first = others() >= 0 && first.CompareAndSwap(false, true)
	if !w.first {
		return nil
	}
	return p.add(others(), w, 0)
}

// first is that there is a Poller that may become hot. There is one of them: another one
// would not hear of its sockets meanwhile.
var first atomic.Bool

// stirred is when there was something for another Poller, in nanoseconds since epoch. At
// first that is long ago.
var stirred atomic.Int64

var epoch = time.Now().Add(-2 * calm)

// seen has the runtime watch a descriptor.
func seen(fd int, name string) (*os.File, syscall.RawConn, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, nil, os.NewSyscallError("fcntl", err)
	}
	f := os.NewFile(uintptr(fd), name)
	raw, err := f.SyscallConn()
	return f, raw, err
}

func (w *waits) close() error { return errors.Join(w.outer.Close(), w.again.Close()) }

// end has another Poller be the first.
func (w *waits) end() {
	if w.first {
		first.Store(false)
	}
}

// next waits, and returns what has come. The error is that the Poller is closed.
func (w *waits) next() ([]unix.EpollEvent, error) {
	var err error
	if w.hot {
		err = w.waitHot()
	} else {
		err = w.waitCold()
	}
	return w.events[:w.n], err
}

// waitCold waits as goroutines do.
func (w *waits) waitCold() error {
	if !w.waited && time.Since(w.began) > turn {
		if err := w.giveWay(); err != nil {
			return err
		}
		w.began = time.Now()
	}
	w.waited = false
	err := w.rawOuter.Read(w.look)
	if w.waited {
		w.woke(time.Now())
	}
	return err
}

// looks takes what is there, and reports whether there is something.
func (w *waits) looks(uintptr) bool {
	w.n = w.wait(0)
	w.waited = w.waited || w.n == 0
	return w.n > 0
}

// woke counts short waits, and has the Poller become hot.
func (w *waits) woke(now time.Time) {
	w.few++
	if now.Sub(w.began) >= patience {
		w.few = 0
	}
	w.began = now
	switch {
	case !w.first:
		stirred.Store(now.Sub(epoch).Nanoseconds())
	case w.few >= heats && runtime.GOMAXPROCS(0) == 1 && now.Sub(epoch) > time.Duration(stirred.Load())+calm:
		w.few = 0
		if w.hot = w.ask(0, unix.EPOLLIN|unix.EPOLLET) == nil; !w.hot {
			_ = w.ask(unix.EPOLLIN, 0)
		}
	}
}

// ask has outer hear of those events of the sockets, and the Poller of those of others.
func (w *waits) ask(ofSockets, ofOthers uint32) error {
	return errors.Join(w.ofOuter(unix.EPOLL_CTL_MOD, ofSockets), w.p.modify(others(), ofOthers))
}

func (w *waits) ofOuter(op int, events uint32) error {
	var err error
	failed := w.rawOuter.Control(func(outer uintptr) {
		err = os.NewSyscallError("epoll_ctl", unix.EpollCtl(int(outer), op, w.p.epoll, &unix.EpollEvent{Events: events}))
	})
	return errors.Join(failed, err)
}

// Ready is Handler's, of others.
func (w *waits) Ready(bool) { w.owing = true }

// waitHot waits, and keeps the processor meanwhile. It may find nothing.
func (w *waits) waitHot() error {
	w.few++
	if w.n > 1 || w.n == 1 && !w.owing {
		w.few = 0
	}
	if w.owing || w.n == 0 {
		w.owing = false
		if err := w.giveWay(); err != nil {
			return err
		}
	}
	// Whom this one woke, and whom they did, go first. Once in 61 times the scheduler takes
	// who comes last, but not twice in a row (schedtick, findRunnable).
	runtime.Gosched()
	runtime.Gosched()
	w.n = 0
	if w.few >= cools || runtime.GOMAXPROCS(0) > 1 || time.Duration(stirred.Load()) > w.began.Sub(epoch) {
		w.few, w.hot = 0, false
		return w.ask(unix.EPOLLIN, 0)
	}
	w.n = w.wait(w.most)
	return nil
}

// giveWay lets others have their turn, and the runtime look who they are.
func (w *waits) giveWay() error {
	w.given = false
	return w.rawAgain.Read(w.give)
}

func (w *waits) gives(again uintptr) bool {
	if !w.given {
		w.given = true
		_, _, _ = unix.RawSyscall(unix.SYS_WRITE, again, uintptr(unsafe.Pointer(&one[0])), uintptr(len(one)))
		return false
	}
	return true
}

// one is what is written to an eventfd.
var one = binary.NativeEndian.AppendUint64(nil, 1)

// wait takes what there is, or comes within that time, without telling the scheduler: its
// processor is not given away meanwhile. A signal ends it, so the runtime, which sends one
// to stop whoever goes on for long (SIGURG, preemptM), is not kept waiting.
func (w *waits) wait(most time.Duration) int {
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(w.p.epoll), uintptr(unsafe.Pointer(&w.events[0])),
		uintptr(len(w.events)), uintptr(most.Milliseconds()), 0, 0)
	if errno != 0 {
		return 0
	}
	return int(n)
}
