package http2

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// conn is what the two kinds of connections have in common. One goroutine reads
// it, and acts on what it reads: its own, or a poller's (polls.go); any may queue frames.
//
// Locks: a Stream's before a conn's, never two conns' at a time.
type conn struct {
	nc    net.Conn
	raw   syscall.RawConn // nil: nc is no socket
	role  role
	times Timeouts

	// Of the goroutine that reads.
	in      *input
	framer  *http2.Framer
	large   bool // the framer has a large buffer by now
	greeted bool // the peer's SETTINGS have come
	block   headerBlock
	turn    *Turn // ownTurn, or the poller's
	ownTurn Turn
	abuse   meter

	now   nowWriter // of whoever has set out.writing
	watch watch
	polls polls

	mu         sync.Mutex
	out        output
	drains     int       // goroutines in drain: one that writes, others about to end
	stopped    sync.Cond // one of them has ended, or a turn has written
	encoder    *hpack.Encoder
	streams    map[uint32]*half
	blocked    []*half // bytes wait for this connection's window, or for room in out
	sendWindow int     // of the connection; the peer gives it
	recvWindow int     // what the peer may still send
	peerWindow int     // what new streams begin with, by the peer's SETTINGS
	ownWindow  int     // and by ours: defaultWindow until they are acknowledged
	shared     int     // of sharedWindow, what no stream has
	earned     int     // frames that were to the purpose, for abuse
	opens      uint64  // streams so far
	peerUp     bool    // its first SETTINGS have come
	pinged     bool    // a PING of ours is not answered yet
	dead       bool    // nothing is written any more
	failure    error   // why
	finishing  bool    // ends when the last stream has ended
}

// role is what is different between a server's and a client's connection. Methods are called on
// the goroutine that reads, unless they say otherwise.
type role interface {
	// headers is called with a whole block; malformed says what is wrong with it.
	headers(id uint32, ended bool, malformed error) error
	// goAway is called with a GOAWAY of the peer.
	goAway(last uint32, code Code) error
	// ticked is called now and then, on a goroutine of its own.
	ticked(every time.Duration, t *Turn)
	// pong is called when a PING of ours is answered.
	pong(data [8]byte)
	// opened reports whether a stream that is not in the table was ever opened.
	// c.mu is held.
	opened(id uint32) bool
	// lastStream is the last one of the peer's that was acted on. c.mu is held.
	lastStream() uint32
	// own are the SETTINGS to begin with.
	own() []http2.Setting
	client() bool
}

func (c *conn) init(nc net.Conn, head []byte, role role, times Timeouts, poller func() *Poller) {
	c.nc, c.role, c.times = nc, role, times.withDefaults()
	keepAlive(nc)
	var over direct
	// A socket, whatever it is wrapped in; crypto/tls has none to offer.
	if socket, ok := nc.(syscall.Conn); ok {
		if raw, err := socket.SyscallConn(); err == nil {
			c.raw = raw
			over, _ = nc.(direct)
		}
	}
	c.now.over, c.now.try = over, c.now.write
	c.stopped.L = &c.mu
	c.in = newInput(nc, c.raw, head, c.flushRead)
	c.in.over = over
	c.turn = &c.ownTurn
	c.polls.init(poller, c.raw)
	c.newFramer()
	c.block.init()
	c.encoder = hpack.NewEncoder(&c.out)
	c.encoder.SetMaxDynamicTableSizeLimit(headerTable)
	c.streams = make(map[uint32]*half)
	c.sendWindow, c.peerWindow = defaultWindow, defaultWindow
	c.recvWindow, c.ownWindow = connWindow, defaultWindow
	c.shared = sharedWindow
}

// direct is a connection on a socket that it fills in a way of its own, as TLS does.
// ReadNow and WriteNow are those of package sock, for who holds the socket. What
// WriteNow took may be Unsent: it sends that before anything else, and so does Write.
type direct interface {
	ReadNow([]byte) (int, error)
	WriteNow([]byte) (int, error)
	Unsent() bool
}

func (c *conn) newFramer() {
	c.framer = http2.NewFramer(nil, c.in)
	c.framer.SetReuseFrames()
	c.framer.SetMaxReadFrameSize(maxFrame)
	c.large = false
}

// keepAlive has the kernel notice within a minute that a peer is gone: while
// nothing is said, and while what was said is not acknowledged.
func keepAlive(nc net.Conn) {
	if t, ok := nc.(interface{ NetConn() net.Conn }); ok {
		nc = t.NetConn()
	}
	tcp, ok := nc.(interface {
		syscall.Conn
		SetKeepAliveConfig(net.KeepAliveConfig) error
	})
	if !ok {
		return
	}
	_ = tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 25 * time.Second, Interval: 10 * time.Second, Count: 3})
	setUserTimeout(tcp, 55*time.Second)
}

// greet queues what a connection begins with.
func (c *conn) greet(preface string, t *Turn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	buf := c.out.bytes()
	*buf = append(*buf, preface...)
	c.out.settings(c.role.own()...)
	c.out.windowUpdate(0, connWindow-defaultWindow)
	t.add(c)
}

// flushRead is what the reading goroutine does before it waits.
func (c *conn) flushRead() { c.turn.Flush() }

// run does preface and reads until the connection ends, closes it and returns why:
// nil, if it has come to its end in good order, io.EOF if the peer hung up.
func (c *conn) run(preface func() error) error {
	c.mu.Lock()
	c.watch.timer = time.AfterFunc(c.times.interval(), c.tick)
	c.mu.Unlock()
	err := preface()
	if err == nil {
		err = c.read()
	}
	c.turn.Flush() // other connections wait for this turn to write what it queued for them
	c.mu.Lock()
	finished := c.finished()
	if c.dead {
		err = c.failure
	}
	c.finishing = true // no more streams
	c.mu.Unlock()
	var fatal *connError
	switch {
	case errors.As(err, &fatal):
		c.sayGoodbye(fatal.code)
	case finished && errors.Is(err, os.ErrDeadlineExceeded):
		err = nil
		c.sayGoodbye(http2.ErrCodeNo)
	}
	c.kill(err)
	c.watch.timer.Stop()
	c.waitDrained()
	c.in.release()
	return err
}

// sayGoodbye ends a connection so that the peer gets to read why: a socket that is
// closed while bytes from the peer wait in it sends a reset, which may overtake
// what was written.
func (c *conn) sayGoodbye(code Code) {
	deadline := time.Now().Add(lingering)
	_ = c.nc.SetDeadline(deadline)
	c.mu.Lock()
	c.out.goAway(c.role.lastStream(), code)
	c.mu.Unlock()
	// Not by the turn alone: the last answer may be in the output of another
	// goroutine's turn, which has not come to write it.
	c.flush(c.turn)
	c.turn.Flush()
	c.waitDrained()
	if half, ok := c.nc.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		_, _ = io.Copy(io.Discard, c.nc)
	}
}

// read handles frames until one is fatal.
func (c *conn) read() error {
	for {
		if !c.greeted || !c.polled() || !c.in.room() {
			if err := c.frame(); err != nil {
				return err
			}
			continue
		}
		idle, err := c.act(1, true)
		c.turn.Flush()
		if err == nil && idle {
			err = c.rest()
		}
		if err != nil {
			return err
		}
	}
}

// frame reads a frame and acts on it. The error is fatal.
func (c *conn) frame() error {
	c.in.boundary()
	c.shrink()
	f, err := c.readFrame()
	if err != nil {
		return c.endStream(err)
	}
	c.watch.frames.Add(1)
	if !c.greeted {
		s, ok := f.(*http2.SettingsFrame)
		if !ok || s.IsAck() {
			return protocolError("SETTINGS do not come first")
		}
		c.greeted = true
	}
	return c.endStream(c.handle(f))
}

// shrink gives a large buffer of the framer to the collector, once there is nothing to
// be read into it.
func (c *conn) shrink() {
	if c.large && c.in.buf == nil && c.idle() {
		c.newFramer()
	}
}

func (c *conn) idle() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.streams) == 0
}

// readFrame returns a frame, a streamError or what ends the connection.
func (c *conn) readFrame() (http2.Frame, error) {
	head, err := c.framer.ReadFrameHeader()
	var f http2.Frame
	if err == nil && tooShort(head) {
		return nil, &connError{http2.ErrCodeFrameSize, fmt.Errorf("%w: %v frame of %d bytes", ErrMalformed, head.Type, head.Length)}
	}
	if err == nil {
		c.large = c.large || head.Length > maxFrame/4
		f, err = c.framer.ReadFrameForHeader(head)
	}
	if err == nil {
		return f, nil
	}
	var stream http2.StreamError
	var fatal http2.ConnectionError
	switch {
	case errors.As(err, &stream) && head.Type != http2.FrameHeaders:
		return nil, &streamError{stream.StreamID, stream.Code, ErrMalformed}
	case errors.As(err, &stream): // the compressor's state is lost with the frame
		return nil, protocolError("HEADERS")
	case errors.As(err, &fatal):
		if detail := c.framer.ErrorDetail(); detail != nil {
			err = detail
		}
		return nil, &connError{Code(fatal), fmt.Errorf("%w: %w", ErrMalformed, err)}
	case errors.Is(err, http2.ErrFrameTooLarge):
		return nil, &connError{http2.ErrCodeFrameSize, fmt.Errorf("%w: %w", ErrMalformed, err)}
	}
	return nil, err
}

// tooShort reports a frame without room for what its flags say is in it, which the
// framer would take for the connection's end (RFC 9113, sections 6.1, 6.2 and 6.6).
func tooShort(head http2.FrameHeader) bool {
	least := uint32(0)
	switch head.Type {
	case http2.FrameData:
	case http2.FrameHeaders:
		if head.Flags.Has(http2.FlagHeadersPriority) {
			least = 5
		}
	case http2.FramePushPromise:
		least = 4
	default:
		return false
	}
	if head.Flags.Has(http2.FlagDataPadded) { // the same bit of all three
		least++
	}
	return head.Length < least
}

// streamError ends a stream with RST_STREAM.
type streamError struct {
	id   uint32
	code Code
	err  error
}

func (e *streamError) Error() string { return fmt.Sprintf("stream %d: %v: %v", e.id, e.code, e.err) }
func (e *streamError) Unwrap() error { return e.err }

// endStream resets the stream on which the peer broke a rule. It returns what ends
// the connection.
func (c *conn) endStream(err error) error {
	if err == nil {
		return nil
	}
	var e *streamError
	if !errors.As(err, &e) {
		return err
	}
	if err := c.abuse.count(c); err != nil {
		return err
	}
	c.mu.Lock()
	h := c.streams[e.id]
	if h == nil {
		if !c.role.opened(e.id) {
			c.mu.Unlock()
			return protocolError("a frame of a stream that is not open")
		}
		c.out.reset(e.id, e.code)
		c.turn.add(c)
	}
	c.mu.Unlock()
	if h != nil {
		h.stream.broken(h, e.code, e.err, c.turn)
	}
	return nil
}

func (c *conn) handle(f http2.Frame) error {
	switch f := f.(type) {
	case *http2.DataFrame:
		return c.handleData(f)
	case *http2.HeadersFrame:
		return c.handleHeaders(f)
	case *http2.WindowUpdateFrame:
		return c.handleWindowUpdate(f)
	case *http2.SettingsFrame:
		return c.handleSettings(f)
	case *http2.RSTStreamFrame:
		return c.handleReset(f)
	case *http2.PingFrame:
		return c.handlePing(f)
	case *http2.GoAwayFrame:
		return c.role.goAway(f.LastStreamID, f.ErrCode)
	case *http2.PushPromiseFrame:
		return protocolError("PUSH_PROMISE")
	case *http2.PriorityFrame:
		if f.StreamDep == f.StreamID {
			return &streamError{f.StreamID, http2.ErrCodeProtocol, fmt.Errorf("%w: it depends on itself", ErrMalformed)}
		}
	}
	return c.abuse.count(c) // PRIORITY, and what RFC 9113 does not know
}

func (c *conn) handleData(f *http2.DataFrame) error {
	data, size := f.Data(), int(f.Length) // padding counts
	c.mu.Lock()
	if c.recvWindow -= size; c.recvWindow < 0 {
		c.mu.Unlock()
		return &connError{http2.ErrCodeFlowControl, fmt.Errorf("%w: more than the connection's window", ErrMalformed)}
	}
	if c.recvWindow < connWindow/2 {
		c.out.windowUpdate(0, connWindow-c.recvWindow)
		c.recvWindow = connWindow
		c.turn.add(c)
	}
	h := c.streams[f.StreamID]
	if h == nil {
		opened := c.role.opened(f.StreamID)
		c.mu.Unlock()
		switch {
		case !opened:
			return protocolError("DATA of a stream that is not open")
		case c.role.client():
			return nil // it was reset, and these were under way
		}
		return &streamError{f.StreamID, http2.ErrCodeStreamClosed, ErrMalformed}
	}
	h.recv -= size
	// Below zero a window may be by SETTINGS alone (RFC 9113, section 6.9.2), and an
	// empty frame needs none.
	overrun := size > 0 && h.recv < 0
	if len(data) > 0 {
		c.earned++
	}
	c.mu.Unlock()
	if overrun {
		return &streamError{f.StreamID, http2.ErrCodeFlowControl, fmt.Errorf("%w: more than the stream's window", ErrMalformed)}
	}
	if len(data) == 0 && !f.StreamEnded() {
		if err := c.abuse.count(c); err != nil {
			return err
		}
	}
	return h.stream.data(h, data, size-len(data), f.StreamEnded(), c.turn)
}

// handleHeaders reads a whole block, with its CONTINUATION frames.
func (c *conn) handleHeaders(f *http2.HeadersFrame) error {
	id, ended, selfish := f.StreamID, f.StreamEnded(), f.HasPriority() && f.Priority.StreamDep == f.StreamID
	c.block.begin(c.role.client())
	fragment, last := f.HeaderBlockFragment(), f.HeadersEnded()
	for more := 0; ; more++ {
		if err := c.block.write(fragment); err != nil {
			return err
		}
		if last {
			break
		}
		if more == maxContinuations {
			return &connError{http2.ErrCodeEnhanceYourCalm, fmt.Errorf("%w: CONTINUATION", ErrAbuse)}
		}
		next, err := c.readFrame()
		if err != nil {
			return err
		}
		f := next.(*http2.ContinuationFrame) // the framer lets nothing else through
		fragment, last = f.HeaderBlockFragment(), f.HeadersEnded()
	}
	malformed, err := c.block.end()
	if err != nil {
		return err
	}
	if selfish && malformed == nil {
		malformed = fmt.Errorf("%w: it depends on itself", ErrMalformed)
	}
	return c.role.headers(id, ended, malformed)
}

var errWindow = &connError{http2.ErrCodeFlowControl, fmt.Errorf("%w: window over 2^31-1", ErrMalformed)}

func (c *conn) handleWindowUpdate(f *http2.WindowUpdateFrame) error {
	n := int(f.Increment)
	c.mu.Lock()
	if f.StreamID == 0 {
		c.sendWindow += n
		over := c.sendWindow > maxWindow
		waiting := len(c.blocked) > 0
		c.mu.Unlock()
		if over {
			return errWindow
		}
		if waiting {
			c.unblock(c.turn)
		}
		return nil
	}
	h := c.streams[f.StreamID]
	if h == nil {
		opened := c.role.opened(f.StreamID)
		c.mu.Unlock()
		if !opened {
			return protocolError("WINDOW_UPDATE of a stream that is not open")
		}
		return nil
	}
	h.send += n
	over := h.send > maxWindow
	c.mu.Unlock()
	if over {
		return &streamError{f.StreamID, errWindow.code, errWindow.err}
	}
	h.stream.pumpTo(h, c.turn)
	return nil
}

func (c *conn) handleSettings(f *http2.SettingsFrame) error {
	if f.IsAck() {
		c.mu.Lock()
		if c.ownWindow != streamWindow {
			for _, h := range c.streams {
				h.recv += streamWindow - c.ownWindow
			}
			c.ownWindow = streamWindow
		}
		c.mu.Unlock()
		return nil
	}
	if err := c.abuse.count(c); err != nil {
		return err
	}
	window := -1
	err := f.ForeachSetting(func(s http2.Setting) error {
		if err := s.Valid(); err != nil {
			var code http2.ConnectionError
			errors.As(err, &code)
			return &connError{Code(code), fmt.Errorf("%w: %v", ErrMalformed, s)}
		}
		switch s.ID {
		case http2.SettingHeaderTableSize:
			c.mu.Lock()
			c.encoder.SetMaxDynamicTableSize(min(s.Val, headerTable))
			c.mu.Unlock()
		case http2.SettingInitialWindowSize:
			window = int(s.Val)
		case http2.SettingMaxConcurrentStreams:
			if c, ok := c.role.(*clientConn); ok {
				c.limit(s.Val)
			}
		case http2.SettingEnablePush:
			if c.role.client() && s.Val != 0 {
				return protocolError("a server's SETTINGS_ENABLE_PUSH")
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	var grown []*half
	c.mu.Lock()
	if window >= 0 {
		change := window - c.peerWindow
		c.peerWindow = window
		for _, h := range c.streams {
			h.send += change
			if h.send > maxWindow {
				c.mu.Unlock()
				return errWindow
			}
			if change > 0 {
				grown = append(grown, h)
			}
		}
	}
	c.peerUp = true
	c.out.settingsAck()
	c.turn.add(c)
	c.mu.Unlock()
	for _, h := range grown {
		h.stream.pumpTo(h, c.turn)
	}
	return nil
}

func (c *conn) handleReset(f *http2.RSTStreamFrame) error {
	if !c.role.client() { // a server can reset no more than it was sent
		if err := c.abuse.count(c); err != nil {
			return err
		}
	}
	c.mu.Lock()
	h := c.streams[f.StreamID]
	opened := h != nil || c.role.opened(f.StreamID)
	c.mu.Unlock()
	switch {
	case !opened:
		return protocolError("RST_STREAM of a stream that is not open")
	case h != nil:
		h.stream.wasReset(h, f.ErrCode, c.turn)
	}
	return nil
}

func (c *conn) handlePing(f *http2.PingFrame) error {
	if f.IsAck() {
		c.mu.Lock()
		c.pinged = false
		c.mu.Unlock()
		c.role.pong(f.Data)
		return nil
	}
	if err := c.abuse.count(c); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.out.ping(true, f.Data)
	c.turn.add(c)
	return nil
}

// sendData queues as much of a body as the peer's windows and the output have room
// for, and returns how much; with the last of it, if end is set, the stream's end.
// What a stream that has been closed is sent is gone.
func (c *conn) sendData(h *half, p []byte, end bool, t *Turn) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case h.closed:
		return len(p)
	case c.dead: // all its streams are about to end
		return 0
	}
	sent := 0
	for sent < len(p) {
		if c.sendWindow <= 0 || c.out.pending() >= outputLimit {
			if !h.blocked {
				h.blocked = true
				c.blocked = append(c.blocked, h)
			}
			break
		}
		n := min(len(p)-sent, h.send, c.sendWindow, maxFrame)
		if n <= 0 {
			break
		}
		c.out.data(h.id, p[sent:sent+n], end && sent+n == len(p))
		sent += n
		h.send -= n
		c.sendWindow -= n
		c.earned++
	}
	if sent > 0 {
		t.add(c)
	}
	return sent
}

// sendHeaders queues a header block. It reports false on a connection that is gone.
func (c *conn) sendHeaders(h *half, fields []Field, end bool, t *Turn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !h.closed && !c.dead {
		c.encode(h.id, fields, end)
		t.add(c)
	}
	return !c.dead
}

// encode queues a header block. c.mu is held.
func (c *conn) encode(id uint32, fields []Field, end bool) {
	c.out.beginHeaders()
	for _, f := range fields {
		_ = c.encoder.WriteField(f) // output.Write does not fail
	}
	c.out.endHeaders(id, end)
}

// sendEnd queues a stream's end. It reports false on a connection that is gone.
func (c *conn) sendEnd(h *half, t *Turn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !h.closed && !c.dead {
		c.out.data(h.id, nil, true)
		t.add(c)
	}
	return !c.dead
}

// credit gives a sender window back: n bytes of its stream have been taken. While
// they go on at once, moving, its window grows.
func (c *conn) credit(h *half, n int, moving bool, t *Turn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	h.taken += n
	if h.taken < h.window/2 || h.closed || c.dead {
		return
	}
	if grow := min(maxStreamWindow-h.window, c.shared); moving && grow > 0 {
		c.shared -= grow
		h.window += grow
		h.taken += grow
	}
	c.out.windowUpdate(h.id, h.taken)
	h.recv += h.taken
	h.taken = 0
	t.add(c)
}

// closeHalf takes a stream out of the table, with RST_STREAM if reset is set.
func (c *conn) closeHalf(h *half, reset bool, code Code, t *Turn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h.closed {
		return
	}
	h.closed = true
	delete(c.streams, h.id)
	c.shared += h.window - streamWindow
	if reset && !c.dead {
		c.out.reset(h.id, code)
		t.add(c)
	}
	c.finishIfIdle()
}

// finished reports whether the last stream of a connection has ended that takes no more.
// c.mu is held.
func (c *conn) finished() bool { return c.finishing && len(c.streams) == 0 }

// finishIfIdle ends a connection whose last stream has ended. c.mu is held.
func (c *conn) finishIfIdle() {
	if c.finished() && !c.dead {
		// Whoever reads notices, and does the rest.
		_ = c.nc.SetReadDeadline(time.Unix(1, 0))
		c.wake()
	}
}

// unblock gives streams that waited for the connection another go, in the order in
// which they came.
func (c *conn) unblock(t *Turn) {
	c.mu.Lock()
	rounds := len(c.blocked)
	for range rounds {
		if len(c.blocked) == 0 || c.dead || c.sendWindow <= 0 || c.out.pending() >= outputLimit {
			break
		}
		h := c.blocked[0]
		c.blocked = c.blocked[1:]
		h.blocked = false
		c.mu.Unlock()
		h.stream.pumpTo(h, t)
		c.mu.Lock()
	}
	if len(c.blocked) == 0 {
		c.blocked = nil
	}
	c.mu.Unlock()
}

// kill ends the connection at once. Whoever reads it does the rest. The first
// reason counts.
func (c *conn) kill(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.killLocked(err)
}

func (c *conn) killLocked(err error) {
	if !c.dead {
		c.dead = true
		c.failure = err
		c.unwatch() // of a descriptor that may be another's then
		closeNow(c.nc)
		c.wake()
	}
}

// closeNow closes what is under TLS, which would want to say so first.
func closeNow(nc net.Conn) {
	if t, ok := nc.(interface{ NetConn() net.Conn }); ok {
		nc = t.NetConn()
	}
	nc.Close()
}
