package http2

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"time"

	"golang.org/x/net/http2"
)

// Server says how connections of clients are served. Handler is needed.
type Server struct {
	// Handler is called once per new stream, on the goroutine that reads its
	// connection: it must not block. It sets the stream's Observer, and answers it or
	// opens it upstream; or lets another goroutine do so, with a Turn of its own.
	Handler func(*Turn, *Stream)
	// Refused is told of requests that break a rule of HTTP and get no further;
	// ErrHeaderTooLarge is answered 431, others with RST_STREAM. It may be nil.
	Refused func(error)
	// Poller chooses who reads a connection while there is nothing to wait for; nil, or
	// nil returned: its goroutine does.
	Poller func() *Poller
	// MaxStreams is how many a client may have open; 0: 256.
	MaxStreams int
	Timeouts   Timeouts
}

// ServerConn is a client's connection.
type ServerConn struct {
	conn
	server Server

	// Of conn.mu.
	seen     uint32        // the last stream that the client opened
	accepted uint32        // the last that was acted on
	draining bool          // the first GOAWAY has been sent
	called   time.Duration // how long ago
}

// NewConn makes ready to serve a connection. Head is what has been read from it
// already.
func (s *Server) NewConn(nc net.Conn, head []byte) *ServerConn {
	c := &ServerConn{server: *s}
	if c.server.MaxStreams == 0 {
		c.server.MaxStreams = 256
	}
	c.init(nc, head, c, s.Timeouts, s.Poller)
	return c
}

// Serve serves the connection until it ends, closes it and returns why: nil after
// Drain and after Timeouts.Idle, io.EOF if the client hung up. Streams that are
// open then are cancelled.
func (c *ServerConn) Serve() error {
	err := c.run(c.preface)
	why := err
	if why == nil {
		why = ErrClosed // no stream is left to be told
	}
	c.abandon(why)
	return err
}

func (c *ServerConn) preface() error {
	c.greet("", c.turn)
	var got [len(http2.ClientPreface)]byte
	if _, err := io.ReadFull(c.in, got[:]); err != nil {
		return err
	}
	if string(got[:]) != http2.ClientPreface {
		return protocolError("no preface")
	}
	return nil
}

// Drain asks the client to open no more streams, in two steps (RFC 9113, section
// 6.8), so that none that is under way is lost. The connection ends with its last
// stream.
func (c *ServerConn) Drain() {
	var t Turn
	c.mu.Lock()
	if !c.draining && !c.dead && !c.finishing {
		c.draining = true
		c.out.goAway(maxStreamID, http2.ErrCodeNo)
		c.out.ping(false, drainPing)
		t.add(&c.conn)
	}
	c.mu.Unlock()
	t.Flush()
}

// drainPing is answered when the client has seen the first GOAWAY.
var drainPing = [8]byte{'d', 'r', 'a', 'i', 'n'}

// lastCall is how long the client may take for that.
const lastCall = 2 * time.Second

func (c *ServerConn) pong(data [8]byte) {
	if data == drainPing {
		c.lastCall(c.turn)
	}
}

// ticked also ends the wait for clients that do not answer.
func (c *ServerConn) ticked(every time.Duration, t *Turn) {
	c.mu.Lock()
	late := false
	if c.draining {
		c.called += every
		late = c.called >= lastCall
	}
	c.mu.Unlock()
	if late {
		c.lastCall(t)
	}
}

// lastCall is Drain's second step.
func (c *ServerConn) lastCall(t *Turn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.draining || c.finishing || c.dead {
		return
	}
	c.finishing = true
	c.out.goAway(c.accepted, http2.ErrCodeNo)
	t.add(&c.conn)
	c.finishIfIdle()
}

// Close ends the connection at once, and with it its streams.
func (c *ServerConn) Close() { c.kill(ErrClosed) }

func (c *ServerConn) client() bool              { return false }
func (c *ServerConn) opened(id uint32) bool     { return id%2 == 1 && id <= c.seen }
func (c *ServerConn) lastStream() uint32        { return c.accepted }
func (c *ServerConn) goAway(uint32, Code) error { return nil } // of streams that we would open

func (c *ServerConn) own() []http2.Setting {
	return []http2.Setting{
		{ID: http2.SettingMaxConcurrentStreams, Val: uint32(c.server.MaxStreams)},
		{ID: http2.SettingInitialWindowSize, Val: streamWindow},
		{ID: http2.SettingMaxHeaderListSize, Val: maxHeaderList},
	}
}

// headers begins a stream, or ends one.
func (c *ServerConn) headers(id uint32, ended bool, malformed error) error {
	if id%2 == 0 {
		return protocolError("a client's stream with an even number")
	}
	c.mu.Lock()
	h := c.streams[id]
	known, refused := id <= c.seen, c.finishing
	if !known {
		c.seen = id
		if !refused {
			c.accepted = id
		}
	}
	full := len(c.streams) >= c.server.MaxStreams
	c.mu.Unlock()
	switch {
	case h != nil && malformed != nil:
		return &streamError{id, http2.ErrCodeProtocol, malformed}
	case h != nil:
		return h.stream.trailers(h, c.block.fields, ended, c.turn)
	case known:
		return &connError{http2.ErrCodeStreamClosed, fmt.Errorf("%w: HEADERS of a stream that was closed", ErrMalformed)}
	case refused:
		return nil // section 6.8: the client has been told
	case full:
		return &streamError{id, http2.ErrCodeRefusedStream, fmt.Errorf("%w: more than %d streams", ErrAbuse, c.server.MaxStreams)}
	}
	length := int64(-1)
	if malformed == nil {
		length, malformed = checkRequest(c.block.fields)
	}
	if malformed == nil && ended && length > 0 {
		malformed = fmt.Errorf("%w: no body, content-length %d", ErrMalformed, length)
	}
	if malformed != nil && c.server.Refused != nil {
		c.server.Refused(malformed)
	}
	tooLarge := errors.Is(malformed, ErrHeaderTooLarge)
	if malformed != nil && !tooLarge {
		return &streamError{id, http2.ErrCodeProtocol, malformed}
	}
	s := &Stream{}
	s.req.length, s.req.ended, s.bare = length, ended, ended
	c.mu.Lock()
	c.openHalf(&s.down, s, id)
	c.mu.Unlock()
	if tooLarge {
		s.Respond(c.turn, 431, nil, nil)
		return nil
	}
	s.Request = slices.Clone(c.block.fields)
	s.head = get(s.Request, ":method") == "HEAD"
	c.server.Handler(c.turn, s)
	return nil
}

// abandon ends the streams of a connection that is gone.
func (c *conn) abandon(err error) {
	c.mu.Lock()
	left := make([]*half, 0, len(c.streams))
	for _, h := range c.streams {
		left = append(left, h)
	}
	sent := c.out.sent
	c.mu.Unlock()
	var t Turn
	for _, h := range left {
		h.stream.connLost(h, err, h.at >= sent, &t)
	}
	t.Flush()
}
