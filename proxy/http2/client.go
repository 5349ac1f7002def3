package http2

import (
	"context"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
)

// Client holds the connections to one endpoint, made as they are needed: one, and
// another where the upstream takes no more streams. Dial is needed.
type Client struct {
	// Dial makes a connection. It is called on a goroutine of its own, one at a time,
	// and its context ends with Close.
	Dial func(context.Context) (net.Conn, error)
	// Ready, if set, is called when there is another connection, and the streams that
	// waited for it have begun.
	Ready func()
	// Usable, if set, says of a connection whether streams may begin on it. One that is not
	// ends with those it has.
	Usable func(net.Conn) bool
	// Poller is as the Server's.
	Poller func() *Poller
	// Connections is how many there may be; 0: no limit.
	Connections int
	Timeouts    Timeouts

	// takes is how many streams the upstream said last that it takes on a connection;
	// 0: it has not said, or takes none for now.
	takes atomic.Uint32

	mu      sync.Mutex
	conns   []*clientConn
	waiting []waiter           // for a connection
	dialing context.CancelFunc // nil: nobody is
	closed  bool
	running sync.WaitGroup
}

// waiter is a stream that waits for a connection.
type waiter struct {
	stream *Stream
	fields []Field
}

// Open sends a stream's request on, as these fields, with the body that the client
// has sent and sends. They are valid until Open returns. Before the answer begins
// it may be called again, after Observer.Failed: for a failure that was Replayable.
// A stream for which there is no connection yet waits. What goes wrong is told to
// Observer.Failed, maybe before Open returns.
func (c *Client) Open(t *Turn, s *Stream, fields []Field) {
	for {
		c.mu.Lock()
		if c.closed {
			c.mu.Unlock()
			s.notOpened(ErrClosed, t)
			return
		}
		cc := c.pick()
		if cc == nil {
			err := c.enqueue(s, fields)
			c.mu.Unlock()
			if err != nil {
				s.notOpened(err, t)
			}
			return
		}
		c.mu.Unlock()
		if cc.open(s, fields, t) {
			return
		}
		// It has filled up, or gone, in the meantime.
	}
}

// pick returns a connection with room for a stream. c.mu is held.
func (c *Client) pick() *clientConn {
	for _, cc := range c.conns {
		c.retire(cc)
		if cc.room() {
			return cc
		}
	}
	return nil
}

// Review has those connections end that are not Usable any more.
func (c *Client) Review() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, cc := range c.conns {
		c.retire(cc)
	}
}

// retire has a connection end with its streams if none may begin on it. c.mu is held.
func (c *Client) retire(cc *clientConn) {
	if c.Usable != nil && !c.Usable(cc.nc) {
		cc.finish()
	}
}

// enqueue has a stream wait for a connection. c.mu is held.
func (c *Client) enqueue(s *Stream, fields []Field) error {
	if c.dialing == nil {
		if c.Connections > 0 && c.lasting() >= c.Connections {
			return ErrBusy
		}
		ctx, cancel := context.WithCancel(context.Background())
		c.dialing = cancel
		c.running.Add(1)
		go c.connect(ctx)
	}
	c.waiting = append(c.waiting, waiter{s, slices.Clone(fields)})
	return nil
}

// Room reports whether a stream would find a connection that is there already.
func (c *Client) Room() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pick() != nil
}

// CloseIdle closes a connection that has no stream, and reports whether there was
// one.
func (c *Client) CloseIdle() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.ContainsFunc(c.conns, (*clientConn).closeIdle)
}

// closeIdle closes the connection if it has no stream, and reports whether it did.
func (c *clientConn) closeIdle() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead || len(c.streams) > 0 {
		return false
	}
	c.killLocked(ErrClosed)
	return true
}

// finish has the connection end with its streams.
func (c *clientConn) finish() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.finishing = true
	c.finishIfIdle()
}

// lasting is how many connections there are that do not end with their streams.
// c.mu is held.
func (c *Client) lasting() int {
	n := 0
	for _, cc := range c.conns {
		cc.mu.Lock()
		if !cc.finishing && !cc.dead {
			n++
		}
		cc.mu.Unlock()
	}
	return n
}

// connect makes a connection and serves it.
func (c *Client) connect(ctx context.Context) {
	defer c.running.Done()
	nc, err := c.Dial(ctx)
	c.mu.Lock()
	c.dialing()
	c.dialing = nil
	waiting := c.waiting
	c.waiting = nil
	var t Turn
	var cc *clientConn
	switch {
	case err != nil:
		err = fmt.Errorf("%w: %w", ErrDial, err)
	case c.closed:
		nc.Close()
		err = ErrClosed
	default:
		cc = &clientConn{owner: c, next: 1, max: c.assumed()}
		cc.init(nc, nil, cc, c.Timeouts, c.Poller)
		cc.greet(http2.ClientPreface, &t)
		c.conns = append(c.conns, cc)
	}
	c.mu.Unlock()
	for _, w := range waiting {
		if err != nil {
			w.stream.notOpened(err, &t)
		} else {
			c.Open(&t, w.stream, w.fields)
		}
	}
	t.Flush()
	if cc != nil {
		if c.Ready != nil {
			c.Ready()
		}
		c.serve(cc)
	}
}

// assumed is how many streams a new connection takes until the upstream says. One
// that takes few would refuse the others, of which each has a few attempts only.
func (c *Client) assumed() int {
	if said := c.takes.Load(); said > 0 && said < assumedStreams {
		return int(said)
	}
	return assumedStreams
}

func (c *Client) serve(cc *clientConn) {
	err := cc.run(func() error { return nil })
	c.mu.Lock()
	c.conns = slices.DeleteFunc(c.conns, func(other *clientConn) bool { return other == cc })
	c.mu.Unlock()
	if err == nil {
		err = ErrClosed
	}
	cc.abandon(err)
}

// Close ends all connections at once, and with them their streams. It returns when
// the last goroutine has ended.
func (c *Client) Close() {
	c.mu.Lock()
	c.closed = true
	if c.dialing != nil {
		c.dialing()
	}
	for _, cc := range c.conns {
		cc.kill(ErrClosed)
	}
	c.mu.Unlock()
	c.running.Wait()
}

// clientConn is a connection to the endpoint.
type clientConn struct {
	conn
	owner *Client

	// Of conn.mu.
	next uint32 // the next stream's number
	max  int    // how many streams the upstream takes
}

// room reports whether there is room for a stream.
func (c *clientConn) room() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.roomLocked()
}

func (c *clientConn) roomLocked() bool {
	return !c.dead && !c.finishing && len(c.streams) < c.max && c.next <= maxStreamID
}

// open begins a stream, and reports false if there is no room for it.
func (c *clientConn) open(s *Stream, fields []Field, t *Turn) bool {
	s.mu.Lock()
	defer s.unlock()
	if s.done || s.answered || s.up != nil {
		return true
	}
	if s.lost {
		s.abort(true, http2.ErrCodeInternal, false, 0, ErrNotReplayable, t)
		return true
	}
	h := &s.first
	if h.c != nil {
		h = new(half)
	}
	// An empty body stays one, although it would mean the same without: there are
	// upstreams (nginx 1.22, PUT) that tell them apart.
	end := s.bare
	c.mu.Lock()
	if !c.roomLocked() {
		c.mu.Unlock()
		return false
	}
	c.openHalf(h, s, c.next)
	c.next += 2
	h.at = c.out.sent + uint64(c.out.pending())
	c.encode(h.id, fields, end)
	t.add(&c.conn)
	c.mu.Unlock()
	s.begun(h)
	if end {
		s.req.finished = true
		return true
	}
	if n := s.pump(&s.req, h, t); n > 0 && !s.req.ended {
		s.down.c.credit(&s.down, n, s.req.waiting.size == 0, t)
	}
	return true
}

// limit is the upstream's SETTINGS_MAX_CONCURRENT_STREAMS.
func (c *clientConn) limit(n uint32) {
	c.owner.takes.Store(n)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.max = int(n)
}

// goAway opens no more streams, and gives up on those that the upstream will not
// act on.
func (c *clientConn) goAway(last uint32, code Code) error {
	var excluded []*half
	c.mu.Lock()
	c.finishing = true
	for id, h := range c.streams {
		if id > last {
			excluded = append(excluded, h)
		}
	}
	c.mu.Unlock()
	for _, h := range excluded {
		h.stream.connLost(h, fmt.Errorf("%w: %v", ErrGoAway, code), true, c.turn)
	}
	c.mu.Lock()
	c.finishIfIdle()
	c.mu.Unlock()
	return nil
}

func (c *clientConn) client() bool                { return true }
func (c *clientConn) pong([8]byte)                {}
func (c *clientConn) ticked(time.Duration, *Turn) {}
func (c *clientConn) opened(id uint32) bool       { return id%2 == 1 && id < c.next }
func (c *clientConn) lastStream() uint32          { return 0 }

func (c *clientConn) own() []http2.Setting {
	return []http2.Setting{
		{ID: http2.SettingEnablePush, Val: 0},
		{ID: http2.SettingInitialWindowSize, Val: streamWindow},
		{ID: http2.SettingMaxHeaderListSize, Val: maxHeaderList},
	}
}

// headers takes an answer's header block, or its trailers.
func (c *clientConn) headers(id uint32, ended bool, malformed error) error {
	c.mu.Lock()
	h := c.streams[id]
	opened := h != nil || c.opened(id)
	c.mu.Unlock()
	switch {
	case !opened:
		return protocolError("HEADERS of a stream that is not open")
	case h == nil:
		return nil // it was reset, and these were under way
	case malformed != nil:
		return &streamError{id, http2.ErrCodeProtocol, malformed}
	}
	return h.stream.response(h, c.block.fields, ended, c.turn)
}
