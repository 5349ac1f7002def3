package mux

import (
	"os"
	"sync"
	"time"
)

// waiter is who waits for a stream in one direction: one goroutine at a time.
type waiter struct {
	woken chan struct{} // holds one call to look again

	mu    sync.Mutex
	timer *time.Timer
	sets  int  // how often the deadline was set
	late  bool // it has passed
	shut  bool
}

func (w *waiter) init() { w.woken = make(chan struct{}, 1) }

// wake has who waits look again, now or when he is about to wait.
func (w *waiter) wake() {
	select {
	case w.woken <- struct{}{}:
	default:
	}
}

// wait calls f until it reports true, and waits in between. What that queued is sent.
func (w *waiter) wait(s *Session, f func(uintptr) bool) error {
	for {
		if err := w.state(); err != nil {
			return err
		}
		done := f(0)
		s.Flush()
		if done {
			return nil
		}
		<-w.woken
	}
}

func (w *waiter) state() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.shut:
		return os.ErrClosed
	case w.late:
		return os.ErrDeadlineExceeded
	}
	return nil
}

// by sets until when to wait; the zero time: for good.
func (w *waiter) by(t time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.timer != nil {
		w.timer.Stop()
		w.timer = nil
	}
	w.sets++
	w.late = false
	if t.IsZero() || w.shut {
		return
	}
	left := time.Until(t)
	if left <= 0 {
		w.late = true
		w.wake()
		return
	}
	set := w.sets
	w.timer = time.AfterFunc(left, func() { w.passed(set) })
}

// passed is when a deadline has, unless another one was set since.
func (w *waiter) passed(set int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.sets == set {
		w.late = true
		w.wake()
	}
}

// end is when the stream is closed.
func (w *waiter) end() {
	w.by(time.Time{})
	w.mu.Lock()
	defer w.mu.Unlock()
	w.shut = true
	w.wake()
}
