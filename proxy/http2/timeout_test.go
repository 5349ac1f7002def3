package http2_test

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	xhttp2 "golang.org/x/net/http2"

	"github.com/weirmesh/weir/proxy/http2"
)

// A client that is slow in what it must do is cut off in time; one that sits idle
// in good order is told, and one that answers is kept.
func TestTimeouts(t *testing.T) {
	limits := http2.Timeouts{Frame: 20 * time.Second, Write: time.Minute, Idle: 10 * time.Minute, Ping: 30 * time.Second}
	open := func(r *raw) {
		_, _ = io.WriteString(r.nc, xhttp2.ClientPreface)
		_ = r.WriteSettings()
	}
	drip := func(r *raw, p []byte) {
		for _, b := range p {
			time.Sleep(5 * time.Second)
			if _, err := r.nc.Write([]byte{b}); err != nil {
				return
			}
		}
	}
	header := []byte{0, 0, 50, byte(xhttp2.FrameHeaders), byte(xhttp2.FlagHeadersEndHeaders), 0, 0, 0, 1}
	for name, test := range map[string]struct {
		client      func(r *raw)
		read        bool // the client reads
		pong        bool // and answers
		least, most time.Duration
		err         error
	}{
		"says nothing":         {func(*raw) {}, true, true, 20 * time.Second, 25 * time.Second, http2.ErrTimeout},
		"a slow preface":       {func(r *raw) { drip(r, []byte(xhttp2.ClientPreface)) }, true, true, 20 * time.Second, 30 * time.Second, http2.ErrTimeout},
		"a slow header frame":  {func(r *raw) { open(r); drip(r, append(header, make([]byte, 50)...)) }, true, true, 20 * time.Second, 35 * time.Second, http2.ErrTimeout},
		"a slow CONTINUATION":  {func(r *raw) { open(r); slowBlock(r) }, true, true, 20 * time.Second, 35 * time.Second, http2.ErrTimeout},
		"does not read":        {open, false, false, 40 * time.Second, 75 * time.Second, http2.ErrTimeout},
		"vanishes":             {open, true, false, 40 * time.Second, 60 * time.Second, http2.ErrTimeout},
		"is idle, and answers": {open, true, true, 10 * time.Minute, 11 * time.Minute, nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				here, there := net.Pipe()
				server := &http2.Server{Handler: func(*http2.Turn, *http2.Stream) {}, Timeouts: limits}
				ended := make(chan error)
				start := time.Now()
				go func() { ended <- server.NewConn(there, nil).Serve() }()
				r := newRaw(t, here)
				_ = here.SetDeadline(time.Time{})
				reading := make(chan struct{})
				go func() {
					defer close(reading)
					for test.read {
						f, err := r.ReadFrame()
						if err != nil {
							return
						}
						if p, ok := f.(*xhttp2.PingFrame); ok && test.pong && !p.IsAck() {
							_ = xhttp2.NewFramer(here, nil).WritePing(true, p.Data)
						}
					}
				}()
				speaking := make(chan struct{})
				go func() {
					defer close(speaking)
					test.client(r)
				}()
				err := <-ended
				if took := time.Since(start); !errors.Is(err, test.err) || took < test.least || took > test.most {
					t.Errorf("after %v: %v", took, err)
				}
				here.Close()
				<-reading
				<-speaking
			})
		})
	}
}

// slowBlock never comes to its end.
func slowBlock(r *raw) {
	_ = r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: literal("a", "b")})
	for range 20 {
		time.Sleep(5 * time.Second)
		if r.WriteContinuation(1, false, literal("a", "b")) != nil {
			return
		}
	}
}

// An upstream connection that nobody uses ends after a while; the next request
// makes another. One whose peer has vanished is noticed within a minute.
func TestIdleUpstream(t *testing.T) {
	for name, test := range map[string]struct {
		pong        bool
		least, most time.Duration
	}{
		"in good order": {true, 10 * time.Minute, 11 * time.Minute},
		"vanished":      {false, 40 * time.Second, time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ups := make(chan net.Conn, 1)
				client := &http2.Client{
					Dial: func(context.Context) (net.Conn, error) {
						here, there := net.Pipe()
						ups <- there
						return here, nil
					},
					Timeouts: http2.Timeouts{Ping: 30 * time.Second},
				}
				server := &http2.Server{Handler: func(turn *http2.Turn, s *http2.Stream) { client.Open(turn, s, s.Request) }}
				here, there := net.Pipe()
				ended := make(chan error)
				conn := server.NewConn(there, nil)
				go func() { ended <- conn.Serve() }()
				c := newRaw(t, here)
				_ = here.SetDeadline(time.Time{})
				go func() { _, _ = io.Copy(io.Discard, here) }()
				_, _ = io.WriteString(here, xhttp2.ClientPreface)
				_ = c.WriteSettings()
				for i := range 2 {
					c.request(uint32(2*i+1), true, "/")
					nc := <-ups
					up := newRaw(t, nc)
					_ = nc.SetDeadline(time.Time{})
					_, _ = io.ReadFull(nc, make([]byte, len(xhttp2.ClientPreface)))
					// Before anything else, an answer to the client's SETTINGS among it.
					_ = xhttp2.NewFramer(nc, nil).WriteSettings()
					up.fields(next[*xhttp2.MetaHeadersFrame](up).StreamID, true, ":status", "200")
					start := time.Now()
					for {
						f, err := up.ReadFrame()
						if err != nil {
							break
						}
						if p, ok := f.(*xhttp2.PingFrame); ok && test.pong {
							_ = up.WritePing(true, p.Data)
						}
					}
					if took := time.Since(start); took < test.least || took > test.most {
						t.Errorf("it ends after %v", took)
					}
				}
				conn.Close()
				<-ended
				client.Close()
				here.Close()
			})
		})
	}
}
