package http2_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/weirmesh/weir/proxy/http2"
)

// FuzzServerConn feeds bytes to a client's connection that is relayed to an
// upstream which sends bytes as well. Nothing panics, both connections end when
// their peers do, every stream is reported once and no goroutine is left.
func FuzzServerConn(f *testing.F) {
	var buf bytes.Buffer
	r := &raw{Framer: xhttp2.NewFramer(&buf, nil)}
	r.enc = hpack.NewEncoder(&r.block)
	buf.WriteString(xhttp2.ClientPreface)
	_ = r.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 10})
	_ = r.WriteSettingsAck()
	r.request(1, false, "/")
	_ = r.WriteData(1, false, []byte("body"))
	_ = r.WritePing(false, [8]byte{})
	_ = r.WriteWindowUpdate(1, 10)
	r.fields(1, true, "trailer", "x")
	r.request(3, true, "/")
	_ = r.WriteRSTStream(3, xhttp2.ErrCodeCancel)
	_ = r.WriteGoAway(0, xhttp2.ErrCodeNo, nil)
	client := bytes.Clone(buf.Bytes())

	buf.Reset()
	r.enc = hpack.NewEncoder(&r.block)
	_ = r.WriteSettings()
	r.fields(1, false, ":status", "103")
	r.fields(1, false, ":status", "200")
	_ = r.WriteData(1, false, []byte("a longer body"))
	r.fields(1, true, "grpc-status", "0")
	f.Add(client, bytes.Clone(buf.Bytes()))
	f.Add([]byte(xhttp2.ClientPreface), []byte{})

	f.Fuzz(func(t *testing.T, fromClient, fromUpstream []byte) {
		defer goleak.VerifyNone(t, goleak.IgnoreCurrent(), goleak.IgnoreAnyFunction("net.(*pipeDeadline).set.func1"))
		counts := &counter{open: make(map[*http2.Stream]bool)}
		var upstreams sync.WaitGroup
		client := &http2.Client{Dial: func(context.Context) (net.Conn, error) {
			here, there := net.Pipe()
			upstreams.Go(func() { feed(there, fromUpstream) })
			return here, nil
		}, Connections: 1}
		server := &http2.Server{Handler: func(turn *http2.Turn, s *http2.Stream) {
			s.Observer = counts
			counts.set(s, true)
			client.Open(turn, s, s.Request)
		}, Timeouts: http2.Timeouts{Frame: time.Second, Write: time.Second}}
		here, there := net.Pipe()
		fed := make(chan struct{})
		go func() {
			defer close(fed)
			feed(here, fromClient)
		}()
		_ = server.NewConn(there, nil).Serve()
		client.Close()
		<-fed
		upstreams.Wait()
		for s, open := range counts.open {
			if open {
				t.Errorf("never reported: %v", s.Request)
			}
		}
	})
}

// feed writes p, reads for a moment and hangs up.
func feed(nc net.Conn, p []byte) {
	read := make(chan struct{})
	go func() {
		defer close(read)
		_, _ = io.Copy(io.Discard, nc)
	}()
	_, _ = nc.Write(p)
	time.Sleep(time.Millisecond)
	nc.Close()
	<-read
}

// counter counts how often each stream is reported.
type counter struct {
	mu   sync.Mutex
	open map[*http2.Stream]bool
}

func (c *counter) set(s *http2.Stream, open bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	was := c.open[s]
	c.open[s] = open
	return was
}

func (c *counter) Response(_ *http2.Turn, _ *http2.Stream, _ int, fields []http2.Field) ([]http2.Field, bool) {
	return fields, true
}

func (c *counter) Failed(*http2.Turn, *http2.Stream, http2.Failure) bool { return false }

func (c *counter) Done(s *http2.Stream, _ http2.Outcome) {
	if !c.set(s, false) {
		panic("reported twice")
	}
}
