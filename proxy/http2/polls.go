package http2

import (
	"os"
	"runtime"
	"sync"
	"syscall"

	"github.com/weirmesh/weir/proxy/poll"
)

// A connection's goroutine does what begins it and what ends it, and rests in between:
// a poller reads frames, and acts on them, as they come. What the goroutine has to wait
// for, or is too much for a poller that has others to look after, wakes it.

const (
	// reads is how many in a row a poller does that each find as much as there is room
	// for; of what is more the goroutine does the rest.
	reads = 16
	// gathers is up to how many bytes are read for what they bring to be gathered with
	// what others bring; bodies move on at once.
	gathers = 4 << 10
)

// Poller is a poll.Poller, and its goroutine's turn at connections: what it queues is
// written when it has acted on all that it has found at a time, so that what many
// connections bring for one goes in one piece.
type Poller struct {
	*poll.Poller
	turn Turn
}

// NewPoller makes one; Run serves it. after is called when it has written that.
func NewPoller(after func()) (*Poller, error) {
	p := &Poller{}
	var err error
	p.Poller, err = poll.New(func() {
		p.turn.Flush()
		after()
	})
	if err != nil {
		return nil, err
	}
	return p, nil
}

// polls is what a poller and the connection's goroutine share.
type polls struct {
	choose func() *Poller // nil: nobody polls
	fd     int            // good until the connection is dead
	woken  chan struct{}

	// mu is over what is of the goroutine that reads. Before any Stream's.
	mu      sync.Mutex
	resting bool  // the goroutine is: the poller reads
	by      *ear  // which one does
	failed  error // what the poller met

	// Of conn.mu.
	poller     *Poller // that watches; nil: none
	processors int     // that were used when it was chosen
}

func (p *polls) init(choose func() *Poller, raw syscall.RawConn) {
	if choose == nil || raw == nil || raw.Control(func(fd uintptr) { p.fd = int(fd) }) != nil {
		return
	}
	p.choose, p.woken = choose, make(chan struct{}, 1)
}

func (c *conn) polled() bool { return c.polls.choose != nil }

// act handles the frames that are there, and those that come, and does not wait: until
// there are no more, or it has read so many times, or what comes next has to be waited
// for; then it reports false. sure: the socket is read until it has nothing; else until
// it had less than there was room for. What comes of little that was read is queued, and left to who
// has the turn to write.
func (c *conn) act(reads int, sure bool) (bool, error) {
	for empty := false; ; reads-- {
		for c.in.whole() {
			if err := c.frame(); err != nil {
				return false, err
			}
		}
		if c.in.took > gathers {
			c.turn.Flush()
		}
		if empty {
			c.shrink()
			c.in.stuck.Store(c.in.buf != nil)
			return true, nil
		}
		if reads == 0 || !c.in.room() {
			return false, nil
		}
		if err := c.in.take(); err != nil {
			return false, err
		}
		empty = c.in.took == 0 || !sure && !c.in.full()
	}
}

// ear is one poller's of a connection. What an earlier one was about to tell of, the
// later one finds itself: each poller has its own Turn.
type ear struct{ c *conn }

// Ready is poll.Handler's.
func (e *ear) Ready(ended bool) {
	c, p := e.c, &e.c.polls
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.resting || p.by != e {
		return
	}
	idle, err := c.act(reads, ended)
	if err != nil || !idle {
		p.resting, p.failed = false, err
		c.wake()
	}
}

// rest has a poller read until the goroutine is to go on. The error is fatal.
func (c *conn) rest() error {
	p := &c.polls
	p.mu.Lock()
	p.resting = c.watched()
	if !p.resting {
		p.mu.Unlock()
		p.choose = nil // from now on the goroutine waits
		return nil
	}
	p.mu.Unlock()
	<-p.woken
	p.mu.Lock()
	defer p.mu.Unlock()
	p.resting, c.turn = false, &c.ownTurn
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unwatch()
	if p.failed == nil && c.finished() {
		return os.ErrDeadlineExceeded
	}
	return p.failed
}

// wake has the goroutine go on, now or when it is about to rest.
func (c *conn) wake() {
	select {
	case c.polls.woken <- struct{}{}:
	default:
	}
}

// watched has a poller tell what comes. It reports false if there is none. polls.mu is
// held.
func (c *conn) watched() bool {
	p := &c.polls
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead {
		return true // the goroutine has been woken
	}
	p.processors = runtime.GOMAXPROCS(0)
	poller, by := p.choose(), &ear{c}
	if poller == nil || poller.Add(p.fd, by) != nil {
		return false
	}
	p.poller, p.by, c.turn = poller, by, &poller.turn
	return true
}

// unwatch has the poller forget the connection. c.mu is held.
func (c *conn) unwatch() {
	if c.polls.poller != nil {
		c.polls.poller.Remove(c.polls.fd)
		c.polls.poller = nil
	}
}

// repoll has the connection find another poller if there are more processors by now, or
// less. c.mu is held.
func (c *conn) repoll() {
	if c.polls.poller != nil && c.polls.processors != runtime.GOMAXPROCS(0) {
		c.wake()
	}
}
