package http2

import (
	"fmt"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// watch holds a connection's deadlines. One timer looks at what has happened since
// it last did; nothing is set per read, frame or stream.
type watch struct {
	timer  *time.Timer   // of conn.mu
	frames atomic.Uint64 // read

	// What was seen the last time, and for how long it has been so. Of conn.mu.
	lastFrames, lastReads, lastSent, lastOpens uint64
	mute, stuck, unread, quiet, idle           time.Duration
}

// tick is run by the timer.
func (c *conn) tick() {
	every := c.times.interval()
	c.mu.Lock()
	if c.dead {
		c.mu.Unlock()
		return
	}
	w := &c.watch
	since := func(d *time.Duration, same bool) time.Duration {
		if *d += every; !same {
			*d = 0
		}
		return *d
	}
	frames, reads := w.frames.Load(), c.in.reads.Load()
	mute := since(&w.mute, !c.peerUp)
	stuck := since(&w.stuck, c.in.stuck.Load() && frames == w.lastFrames)
	unread := since(&w.unread, c.out.writing && c.out.sent == w.lastSent)
	quiet := since(&w.quiet, reads == w.lastReads)
	idle := since(&w.idle, len(c.streams) == 0 && c.opens == w.lastOpens)
	w.lastFrames, w.lastReads, w.lastSent, w.lastOpens = frames, reads, c.out.sent, c.opens

	var t Turn
	ping := c.times.Ping
	switch {
	case mute >= c.times.Frame, stuck >= c.times.Frame:
		c.killLocked(fmt.Errorf("%w: a frame took longer than %v", ErrTimeout, c.times.Frame))
	case unread >= c.times.Write:
		c.killLocked(fmt.Errorf("%w: nothing was taken for %v", ErrTimeout, c.times.Write))
	case ping > 0 && c.pinged && quiet >= ping+ping/2:
		c.killLocked(fmt.Errorf("%w: the peer is gone", ErrTimeout))
	case ping > 0 && !c.pinged && quiet >= ping:
		c.pinged = true
		c.out.ping(false, [8]byte{})
		t.add(c)
	case idle >= c.times.Idle:
		c.finishing = true
		c.finishIfIdle()
	}
	c.repoll()
	w.timer.Reset(every)
	c.mu.Unlock()
	c.role.ticked(every, &t)
	t.Flush()
}

// setUserTimeout bounds how long sent bytes may go unacknowledged (tcp(7),
// TCP_USER_TIMEOUT).
func setUserTimeout(tcp syscall.Conn, d time.Duration) {
	raw, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(d.Milliseconds()))
	})
}
