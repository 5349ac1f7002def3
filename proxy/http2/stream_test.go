package http2_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"

	"github.com/weirmesh/weir/proxy/http2"
)

// A client that does not take one answer still gets the others of its connection,
// and the upstream is held back: no more than 256 KiB are on the way.
func TestSlowClientStream(t *testing.T) {
	var wrote atomic.Int64
	backend := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/large" {
			_, _ = io.WriteString(w, "quick")
			return
		}
		for part := make([]byte, 4096); ; {
			n, err := w.Write(part)
			wrote.Add(int64(n))
			if err != nil {
				return
			}
		}
	})
	r := newRelay(t, backend, nil)
	c := dialRaw(t, r.addr, xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 100})
	c.request(1, true, "/large")
	for id := uint32(3); id < 400; id += 2 {
		c.request(id, true, "/quick")
		if got := c.status(id); got != 200 {
			t.Fatalf("stream %d: %d", id, got)
		}
	}
	var last int64
	eventually(t, "the upstream waits", func() bool {
		now := wrote.Load()
		defer func() { last = now }()
		time.Sleep(50 * time.Millisecond)
		return now > 0 && now == last
	})
	if last > 256<<10 {
		t.Errorf("%d bytes are on the way", last)
	}
	// Given its window, it moves again.
	_ = c.WriteWindowUpdate(1, 1<<20)
	_ = c.WriteWindowUpdate(0, 1<<20)
	eventually(t, "the upstream goes on", func() bool { return wrote.Load() > last+512<<10 })
}

// A fast sender is held back while the application does not read: the proxy takes
// 256 KiB at most. It gets the rest when the application reads on.
func TestSlowApplication(t *testing.T) {
	addr, accept := upstreams(t)
	r := newRelay(t, addr, nil)
	c := dialRaw(t, r.addr)
	c.request(1, false, "/upload")
	up := accept() // with a window of 65,535
	next[*xhttp2.MetaHeadersFrame](up)

	var window, conn, sent int
	window, conn = 65535, 65535
	part := make([]byte, 1000)
	stuck := false
	push := func(limit int) {
		for stuck = false; sent < limit && !stuck; {
			for min(window, conn) >= len(part) && sent < limit {
				if err := c.WriteData(1, false, part); err != nil {
					t.Fatal(err)
				}
				sent, window, conn = sent+len(part), window-len(part), conn-len(part)
			}
			_ = c.nc.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
			f, err := c.ReadFrame()
			var late net.Error
			switch {
			case errors.As(err, &late) && late.Timeout():
				stuck = true
			case err != nil:
				t.Fatal(err)
			}
			switch f := f.(type) {
			case *xhttp2.SettingsFrame:
				if v, ok := f.Value(xhttp2.SettingInitialWindowSize); ok {
					window += int(v) - 65535
					_ = c.WriteSettingsAck()
				}
			case *xhttp2.WindowUpdateFrame:
				if f.StreamID == 0 {
					conn += int(f.Increment)
				} else {
					window += int(f.Increment)
				}
			}
		}
	}
	push(10 << 20)
	if held := sent - 65535; !stuck || held > 256<<10 || held < 16<<10 {
		t.Errorf("stuck %v, the proxy holds %d bytes", stuck, held)
	}
	before := sent
	_ = up.WriteWindowUpdate(0, 1<<20)
	_ = up.WriteWindowUpdate(1, 1<<20)
	go func() { _, _ = io.Copy(io.Discard, up.nc) }()
	push(before + 512<<10)
	if stuck {
		t.Error("nothing moves although the application reads")
	}
}

// A RST_STREAM goes through with its code, in both directions.
func TestResets(t *testing.T) {
	addr, accept := upstreams(t)
	r := newRelay(t, addr, nil)
	c := dialRaw(t, r.addr)
	c.request(1, false, "/")
	up := accept()
	got := next[*xhttp2.MetaHeadersFrame](up)
	up.fields(got.StreamID, false, ":status", "200")
	if c.status(1) != 200 {
		t.Fatal("no answer")
	}
	_ = up.WriteRSTStream(got.StreamID, xhttp2.ErrCodeEnhanceYourCalm)
	if f := next[*xhttp2.RSTStreamFrame](c); f.ErrCode != xhttp2.ErrCodeEnhanceYourCalm {
		t.Errorf("the client is told %v", f.ErrCode)
	}
	var reset *http2.ResetError
	if o := r.outcome(t); !errors.As(o.Err, &reset) || !reset.Upstream || o.Status != 200 {
		t.Errorf("outcome %+v", o)
	}
	c.request(3, false, "/")
	got = next[*xhttp2.MetaHeadersFrame](up)
	_ = c.WriteRSTStream(3, xhttp2.ErrCodeInternal)
	if f := next[*xhttp2.RSTStreamFrame](up); f.ErrCode != xhttp2.ErrCodeInternal || f.StreamID != got.StreamID {
		t.Errorf("the upstream is told %v", f.ErrCode)
	}
}

// An upstream that has answered may not want the rest of the request: the client
// gets the whole answer, however slowly it takes it, and then the reset.
func TestAnswerBeforeTheRequestsEnd(t *testing.T) {
	addr, accept := upstreams(t)
	r := newRelay(t, addr, nil)
	c := dialRaw(t, r.addr, xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 1000})
	c.request(1, false, "/")
	up := accept()
	id := next[*xhttp2.MetaHeadersFrame](up).StreamID
	up.fields(id, false, ":status", "413")
	_ = up.WriteData(id, true, make([]byte, 5000))
	_ = up.WriteRSTStream(id, xhttp2.ErrCodeNo)
	if got := c.status(1); got != 413 {
		t.Fatal(got)
	}
	size := 0
	for ended := false; !ended; {
		f := next[*xhttp2.DataFrame](c)
		size, ended = size+len(f.Data()), f.StreamEnded()
		_ = c.WriteWindowUpdate(1, 1000)
	}
	if f := next[*xhttp2.RSTStreamFrame](c); f.ErrCode != xhttp2.ErrCodeNo || size != 5000 {
		t.Errorf("%d bytes, then %v", size, f.ErrCode)
	}
	if o := r.outcome(t); o.Err != nil || o.Status != 413 || o.Sent != 5000 {
		t.Errorf("outcome %+v", o)
	}
}

// What an upstream refused, or excludes with its GOAWAY, can be tried again, with
// the body that the client has sent until then; so can an answer that is declined.
func TestTriedAgain(t *testing.T) {
	for name, test := range map[string]struct {
		fail   func(up *raw, id uint32)
		err    error
		unsent bool
		size   int // of the body; 1000 are kept
		replay bool
	}{
		"REFUSED_STREAM": {func(up *raw, id uint32) { _ = up.WriteRSTStream(id, xhttp2.ErrCodeRefusedStream) }, nil, true, 700, true},
		"INTERNAL_ERROR": {func(up *raw, id uint32) { _ = up.WriteRSTStream(id, xhttp2.ErrCodeInternal) }, nil, false, 700, true},
		"GOAWAY":         {func(up *raw, _ uint32) { _ = up.WriteGoAway(0, xhttp2.ErrCodeNo, nil) }, http2.ErrGoAway, true, 700, true},
		"hung up":        {func(up *raw, _ uint32) { up.nc.Close() }, nil, false, 700, true},
		"declined":       {func(up *raw, id uint32) { up.fields(id, false, ":status", "503") }, http2.ErrDeclined, false, 700, true},
		"malformed":      {func(up *raw, id uint32) { up.fields(id, false, ":status", "2000") }, http2.ErrMalformed, false, 700, true},
		"no longer kept": {func(up *raw, id uint32) { _ = up.WriteRSTStream(id, xhttp2.ErrCodeRefusedStream) }, nil, true, 1001, false},
	} {
		t.Run(name, func(t *testing.T) {
			addr, accept := upstreams(t)
			second := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) })
			again := &http2.Client{Dial: func(ctx context.Context) (net.Conn, error) { return dialTCP(ctx, second) }}
			t.Cleanup(again.Close)
			failures := make(chan http2.Failure, 4)
			r := newRelay(t, addr, func(r *relay) {
				r.server.Handler = func(turn *http2.Turn, s *http2.Stream) {
					w := &watcher{relay: r}
					w.response = func(_ *http2.Turn, _ *http2.Stream, status int, fields []http2.Field) ([]http2.Field, bool) {
						return fields, status != 503
					}
					w.failed = func(turn *http2.Turn, s *http2.Stream, f http2.Failure) bool {
						failures <- f
						if f.Replayable {
							again.Open(turn, s, s.Request)
							return true
						}
						return s.Respond(turn, 503, nil, []byte("not again"))
					}
					s.Observer = w
					s.Keep(1000)
					r.client.Open(turn, s, s.Request)
				}
			})
			c := dialRaw(t, r.addr)
			body := bytes.Repeat([]byte("x"), test.size)
			c.request(1, false, "/")
			_ = c.WriteData(1, false, body)
			up := accept()
			id := next[*xhttp2.MetaHeadersFrame](up).StreamID
			for got := 0; got < test.size; {
				got += len(next[*xhttp2.DataFrame](up).Data())
			}
			test.fail(up, id)
			f := <-failures
			if f.Unsent != test.unsent || f.Replayable != test.replay || test.err != nil && !errors.Is(f.Err, test.err) {
				t.Errorf("failure %+v", f)
			}
			if !test.replay {
				if got := c.status(1); got != 503 {
					t.Errorf("status %d", got)
				}
				return
			}
			_ = c.WriteData(1, true, []byte("end"))
			if got := c.status(1); got != 200 {
				t.Fatalf("status %d", got)
			}
			var got []byte
			for ended := false; !ended; {
				f := next[*xhttp2.DataFrame](c)
				got, ended = append(got, f.Data()...), f.StreamEnded()
			}
			if want := string(body) + "end"; string(got) != want {
				t.Errorf("the second upstream got %d bytes, want %d", len(got), len(want))
			}
			if o := r.outcome(t); o.Err != nil || o.Received != uint64(test.size+3) {
				t.Errorf("outcome %+v", o)
			}
		})
	}
}

// TestAnAttemptThatTakesTooLong fails as any other while there is no answer, later it
// breaks off the answer. The time of another attempt begins anew.
func TestAnAttemptThatTakesTooLong(t *testing.T) {
	addr, accept := upstreams(t)
	failures := make(chan http2.Failure, 4)
	r := newRelay(t, addr, func(r *relay) {
		r.server.Handler = func(turn *http2.Turn, s *http2.Stream) {
			s.Observer = &watcher{relay: r, failed: func(turn *http2.Turn, s *http2.Stream, f http2.Failure) bool {
				failures <- f
				r.client.Open(turn, s, s.Request)
				return true
			}}
			s.Attempt = 300 * time.Millisecond
			r.client.Open(turn, s, s.Request)
		}
	})
	c := dialRaw(t, r.addr)
	c.request(1, true, "/")
	up := accept()
	first := next[*xhttp2.MetaHeadersFrame](up).StreamID
	if reset := next[*xhttp2.RSTStreamFrame](up); reset.StreamID != first || reset.ErrCode != xhttp2.ErrCodeCancel {
		t.Errorf("the upstream gets %v", reset)
	}
	if f := <-failures; !errors.Is(f.Err, http2.ErrAttemptTimeout) || f.Unsent || !f.Replayable {
		t.Errorf("failure %+v", f)
	}
	second := next[*xhttp2.MetaHeadersFrame](up).StreamID
	up.fields(second, false, ":status", "200")
	if got := c.status(1); got != 200 {
		t.Fatalf("status %d", got)
	}
	if f := next[*xhttp2.RSTStreamFrame](c); f.StreamID != 1 || f.ErrCode != xhttp2.ErrCodeCancel {
		t.Errorf("the client gets %v", f)
	}
	if o := r.outcome(t); !errors.Is(o.Err, http2.ErrAttemptTimeout) || o.Status != 200 || len(failures) > 0 {
		t.Errorf("outcome %+v, %d failures more", o, len(failures))
	}
}

// TestDoneIsTheLast: a stream may be over while its observer looks at an answer, or
// while somebody holds it. Done waits for them, so that nothing is begun that nobody
// ends.
func TestDoneIsTheLast(t *testing.T) {
	addr, accept := upstreams(t)
	looking, goOn := make(chan struct{}), make(chan struct{})
	held := make(chan *http2.Stream, 1)
	r := newRelay(t, addr, func(r *relay) {
		r.server.Handler = func(turn *http2.Turn, s *http2.Stream) {
			w := &watcher{relay: r}
			w.response = func(_ *http2.Turn, _ *http2.Stream, _ int, fields []http2.Field) ([]http2.Field, bool) {
				close(looking)
				<-goOn
				return fields, true
			}
			s.Observer = w
			if !s.Hold() {
				t.Error("a stream that has just begun cannot be held")
			}
			held <- s
			r.client.Open(turn, s, s.Request)
		}
	})
	c := dialRaw(t, r.addr)
	c.request(1, true, "/")
	up := accept()
	up.fields(next[*xhttp2.MetaHeadersFrame](up).StreamID, true, ":status", "200")
	<-looking
	_ = c.WriteRSTStream(1, xhttp2.ErrCodeCancel)
	_ = c.WritePing(false, [8]byte{})
	next[*xhttp2.PingFrame](c) // the reset has been read
	over := func() bool { return len(r.outcomes) > 0 }
	if over() {
		t.Error("it is done while its answer is looked at")
	}
	close(goOn)
	s := <-held
	time.Sleep(10 * time.Millisecond)
	if over() {
		t.Error("it is done while it is held")
	}
	if s.Hold() {
		t.Error("a stream that is over can be held")
	}
	s.Release()
	if o := r.outcome(t); o.Err == nil || o.Status != 0 {
		t.Errorf("outcome %+v", o)
	}
}

// TestAGoodbyeComesAfterTheLastAnswer: also if that is still in the turn of another
// goroutine when the connection has nothing left to wait for.
func TestAGoodbyeComesAfterTheLastAnswer(t *testing.T) {
	streams := make(chan *http2.Stream, 1)
	r := newRelay(t, "", func(r *relay) {
		r.server.Handler = func(_ *http2.Turn, s *http2.Stream) {
			s.Observer = &watcher{relay: r}
			streams <- s
		}
	})
	c := dialRaw(t, r.addr)
	c.request(1, true, "/")
	s := <-streams
	r.drain()
	_ = c.WritePing(true, next[*xhttp2.PingFrame](c).Data) // has the server say the last number
	for last := uint32(0); last != 1; {
		last = next[*xhttp2.GoAwayFrame](c).LastStreamID
	}
	var turn http2.Turn
	s.Respond(&turn, 200, nil, []byte("the last answer"))
	_ = r.outcome(t)
	time.Sleep(50 * time.Millisecond) // the connection's own goroutine ends it
	turn.Flush()
	if got := c.status(1); got != 200 {
		t.Errorf("status %d", got)
	}
}

// An upstream that hangs up in the middle of its answer: the client sees a reset,
// not an end.
func TestUpstreamHangsUp(t *testing.T) {
	addr, accept := upstreams(t)
	r := newRelay(t, addr, nil)
	c := dialRaw(t, r.addr)
	c.request(1, true, "/")
	up := accept()
	up.fields(next[*xhttp2.MetaHeadersFrame](up).StreamID, false, ":status", "200")
	if c.status(1) != 200 {
		t.Fatal("no answer")
	}
	up.nc.Close()
	if f := next[*xhttp2.RSTStreamFrame](c); f.ErrCode != xhttp2.ErrCodeInternal {
		t.Errorf("the client is told %v", f.ErrCode)
	}
}

// An upstream's limit of streams opens another connection, up to the limit of
// those; beyond it the attempt fails, unsent.
func TestUpstreamFull(t *testing.T) {
	addr, accept := upstreams(t)
	failures := make(chan http2.Failure, 4)
	r := newRelay(t, addr, func(r *relay) {
		r.client.Connections = 2
		r.server.Handler = func(turn *http2.Turn, s *http2.Stream) {
			s.Observer = &watcher{relay: r, failed: func(_ *http2.Turn, _ *http2.Stream, f http2.Failure) bool {
				failures <- f
				return false
			}}
			r.client.Open(turn, s, s.Request)
		}
	})
	c := dialRaw(t, r.addr)
	for id := uint32(1); id <= 3; id += 2 {
		c.request(id, true, "/")
		up := accept(xhttp2.Setting{ID: xhttp2.SettingMaxConcurrentStreams, Val: 1})
		next[*xhttp2.SettingsFrame](up)
		for !next[*xhttp2.SettingsFrame](up).IsAck() {
			t.Log("settings")
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.request(5, true, "/")
	if f := <-failures; !errors.Is(f.Err, http2.ErrBusy) || !f.Unsent {
		t.Errorf("failure %+v", f)
	}
	if f := next[*xhttp2.RSTStreamFrame](c); f.StreamID != 5 {
		t.Errorf("reset: %v", f)
	}
}

// No connection: told with the cause, and answerable; from another goroutine too,
// such as a timer's, which also ends an attempt that takes too long.
func TestAnsweredByTheProxy(t *testing.T) {
	addr, accept := upstreams(t)
	broken := errors.New("port closed")
	nowhere := &http2.Client{Dial: func(context.Context) (net.Conn, error) { return nil, broken }}
	t.Cleanup(nowhere.Close)
	failures := make(chan error, 4)
	streams := make(chan *http2.Stream, 4)
	r := newRelay(t, addr, func(r *relay) {
		r.server.Handler = func(turn *http2.Turn, s *http2.Stream) {
			client := r.client
			if s.Request[3].Value == "/nowhere" {
				client = nowhere
			}
			s.Observer = &watcher{relay: r, failed: func(turn *http2.Turn, s *http2.Stream, f http2.Failure) bool {
				failures <- f.Err
				return s.Respond(turn, 503, []http2.Field{{Name: "x-reason", Value: "connect_refused"}}, []byte("no"))
			}}
			client.Open(turn, s, s.Request)
			streams <- s
		}
	})
	c := dialRaw(t, r.addr)
	c.request(1, true, "/nowhere")
	if got := c.status(1); got != 503 {
		t.Errorf("status %d", got)
	}
	if err := <-failures; !errors.Is(err, broken) || !errors.Is(err, http2.ErrDial) {
		t.Errorf("cause: %v", err)
	}
	<-streams
	r.outcome(t)

	c.request(3, true, "/")
	up := accept()
	id := next[*xhttp2.MetaHeadersFrame](up).StreamID
	var turn http2.Turn
	if s := <-streams; !s.Respond(&turn, 504, nil, nil) || s.Respond(&turn, 500, nil, nil) {
		t.Error("answered not once")
	}
	turn.Flush()
	if got := c.status(3); got != 504 {
		t.Errorf("status %d", got)
	}
	if f := next[*xhttp2.RSTStreamFrame](up); f.StreamID != id || f.ErrCode != xhttp2.ErrCodeCancel {
		t.Errorf("the upstream is told %v", f)
	}
	if o := r.outcome(t); o.Status != 504 {
		t.Errorf("outcome %+v", o)
	}
}

// TestAnEmptyBodyStaysOne: a request that ends with an empty DATA frame is not made
// one without a body, though both were there before the upstream was.
func TestAnEmptyBodyStaysOne(t *testing.T) {
	addr, accept := upstreams(t)
	read := make(chan struct{})
	r := newRelay(t, addr, func(r *relay) {
		r.client.Dial = func(ctx context.Context) (net.Conn, error) {
			<-read
			return dialTCP(ctx, addr)
		}
	})
	client := dialRaw(t, r.addr)
	for _, bare := range []bool{true, false} {
		id := map[bool]uint32{true: 1, false: 3}[bare]
		client.fields(id, bare, ":method", "PUT", ":scheme", "http", ":authority", "shop.example", ":path", "/"+strconv.FormatBool(bare))
		if !bare {
			_ = client.WriteData(id, true, nil)
		}
	}
	_ = client.WritePing(false, [8]byte{})
	next[*xhttp2.PingFrame](client)
	close(read)
	up := accept()
	for range 2 {
		f := next[*xhttp2.MetaHeadersFrame](up)
		if want := f.PseudoValue("path") == "/true"; f.StreamEnded() != want {
			t.Errorf("%s: the header block ends the stream: %v", f.PseudoValue("path"), f.StreamEnded())
		}
	}
}

// TestAnEndNeedsNoWindow: what a client sent before it knew of our window may be
// more than that; it may end the stream all the same (RFC 9113, section 6.9.2).
func TestAnEndNeedsNoWindow(t *testing.T) {
	addr, accept := upstreams(t)
	r := newRelay(t, addr, nil)
	client := dialRaw(t, r.addr)
	client.request(1, false, "/")
	up := accept(xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 0})
	next[*xhttp2.MetaHeadersFrame](up)
	next[*xhttp2.SettingsFrame](up) // the acknowledgement: nothing of the body goes on
	const sent = 65535              // the window until SETTINGS
	for left := sent; left > 0; left -= min(left, 16<<10) {
		_ = client.WriteData(1, false, make([]byte, min(left, 16<<10)))
	}
	next[*xhttp2.SettingsFrame](client) // and is acknowledged
	_ = client.WriteData(1, true, nil)
	_ = client.WritePing(false, [8]byte{})
	next[*xhttp2.PingFrame](client)
	_ = up.WriteWindowUpdate(1, sent)
	got := 0
	for {
		f := next[*xhttp2.DataFrame](up)
		if got += len(f.Data()); f.StreamEnded() {
			break
		}
	}
	if got != sent {
		t.Errorf("%d bytes, want %d", got, sent)
	}
	up.fields(1, true, ":status", "200")
	if status := client.status(1); status != 200 {
		t.Errorf("status %d", status)
	}
}
