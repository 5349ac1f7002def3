package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/http1"
	"github.com/weirmesh/weir/proxy/sock"
	"github.com/weirmesh/weir/tests/pod"
)

const (
	// senders share a rate.
	senders = 16
	// overdue is how long an answer is waited for.
	overdue = 10 * time.Second
)

// steady is a load of requests at a fixed rate, each sent at its time whatever became of the
// one before; times are how long they took from that time on, in the order of the answers.
//
// It is one thread that waits for the next time and for answers at once, to the
// microsecond: a goroutine that sleeps is woken up to a millisecond late, together with
// all others that were to be woken in it, and what is measured then is the crowd.
type steady struct {
	epoll    int
	request  []byte
	interval time.Duration
	end      time.Time // of this turn
	senders  []sender
	times    []time.Duration
}

func newSteady(l lane, rate int) (*steady, error) {
	s := &steady{
		interval: time.Second * senders / time.Duration(rate),
		request:  fmt.Appendf(nil, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", l.target),
	}
	var err error
	if s.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if err := pod.In(l.client, func() error { return s.dial(l.target) }); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// work sends for that long, and waits for the last answer.
func (s *steady) work(ctx context.Context, length time.Duration) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	slack, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	if err != nil {
		return os.NewSyscallError("prctl", err)
	}
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	defer func() { _ = unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(slack), 0, 0, 0) }()

	began := time.Now()
	s.end = began.Add(length)
	for i := range s.senders {
		s.senders[i].next = began.Add(s.interval * time.Duration(i) / senders)
	}
	return s.run(ctx)
}

func (s *steady) await(context.Context) error { return nil }

func (s *steady) finish() (float64, error) { return float64(len(s.times)), nil }

// sender has one connection, and one request at a time.
type sender struct {
	fd      int
	next    time.Time // when its next request is due
	due     time.Time // when the one was that is under way
	waiting bool      // for its answer
	answer  [4 << 10]byte
	n       int // of answer
	head    http1.Head
}

func (s *steady) close() {
	unix.Close(s.epoll)
	for i := range s.senders {
		unix.Close(s.senders[i].fd)
	}
}

func (s *steady) dial(to netip.AddrPort) error {
	for i := range senders {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		s.senders = append(s.senders, sender{fd: fd})
		if err := unix.Connect(fd, inet4(to)); err != nil {
			return os.NewSyscallError("connect", err)
		}
		event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(i)}
		if err := errors.Join(unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1), unix.SetNonblock(fd, true),
			unix.EpollCtl(s.epoll, unix.EPOLL_CTL_ADD, fd, &event)); err != nil {
			return err
		}
	}
	return nil
}

func (s *steady) run(ctx context.Context) error {
	var events [senders]unix.EpollEvent
	for {
		wake, err := s.send(time.Now())
		if wake.IsZero() || err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := await(s.epoll, events[:], time.Until(wake))
		if err != nil {
			return err
		}
		for _, e := range events[:n] {
			if err := s.receive(&s.senders[e.Fd]); err != nil {
				return err
			}
		}
	}
}

// send sends what is due, and says when to look again; never, once all are answered.
func (s *steady) send(now time.Time) (time.Time, error) {
	var wake time.Time
	for i := range s.senders {
		one := &s.senders[i]
		at := one.next
		switch {
		case one.waiting:
			at = one.due.Add(overdue)
			if now.After(at) {
				return wake, fmt.Errorf("no answer in %s", overdue)
			}
		case !at.Before(s.end):
			continue
		case !now.Before(at):
			if n, err := sock.Write(uintptr(one.fd), s.request); n < len(s.request) {
				return wake, fmt.Errorf("%d of %d bytes of a request are sent: %w", n, len(s.request), err)
			}
			one.waiting, one.due, one.next = true, at, at.Add(s.interval)
			at = one.due.Add(overdue)
		}
		if wake.IsZero() || at.Before(wake) {
			wake = at
		}
	}
	return wake, nil
}

// await is epoll_pwait2(2): the time is exact.
func await(epoll int, events []unix.EpollEvent, d time.Duration) (int, error) {
	t := unix.NsecToTimespec(max(0, d.Nanoseconds()))
	n, _, errno := unix.Syscall6(unix.SYS_EPOLL_PWAIT2, uintptr(epoll), uintptr(unsafe.Pointer(&events[0])), uintptr(len(events)), uintptr(unsafe.Pointer(&t)), 0, 0)
	switch errno {
	case 0:
		return int(n), nil
	case unix.EINTR:
		return 0, nil
	}
	return 0, os.NewSyscallError("epoll_pwait2", errno)
}

// receive reads what there is of an answer.
func (s *steady) receive(one *sender) error {
	n, err := sock.Read(uintptr(one.fd), one.answer[one.n:])
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		return nil
	case err != nil:
		return os.NewSyscallError("read", err)
	case n == 0:
		return io.ErrUnexpectedEOF
	}
	one.n += n
	whole, err := one.whole()
	if err != nil || !whole {
		return err
	}
	s.times = append(s.times, time.Since(one.due))
	one.waiting, one.n = false, 0
	return nil
}

// whole reports whether all of the answer is there, of 1 KB as all are.
func (one *sender) whole() (bool, error) {
	var scan http1.Scanner
	b := one.answer[:one.n]
	end, err := scan.End(b)
	if end == 0 || err != nil {
		return false, err
	}
	if err := one.head.ParseResponse(b[:end], []byte(http.MethodGet)); err != nil {
		return false, err
	}
	if one.head.Status != http.StatusOK {
		return false, fmt.Errorf("answer %q", b[:end])
	}
	body := one.head.Body
	_, err = body.Next(b[end:])
	return body.Done(), err
}
