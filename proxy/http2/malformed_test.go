package http2_test

import (
	"errors"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"

	xhttp2 "golang.org/x/net/http2"

	"github.com/weirmesh/weir/proxy/http2"
)

// TestRequestsThatNameNothing: who is asked, and for what, is text that no other
// version of HTTP would read otherwise.
func TestRequestsThatNameNothing(t *testing.T) {
	backend := serveHTTP(t, func(http.ResponseWriter, *http.Request) {})
	r := newRelay(t, backend, nil)
	c := dialRaw(t, r.addr)
	for i, pairs := range [][]string{
		{":method", "GET", ":scheme", "http", ":path", "/"},
		{":method", "GET", ":scheme", "http", ":path", "/", ":authority", ""},
		{":method", "GET", ":scheme", "http", ":path", "/", "host", ""},
		{":method", "GET", ":scheme", "http", ":path", "/", ":authority", "", "host", "a"},
		{":method", "GET", ":scheme", "http", ":path", "/", ":authority", "a b"},
		{":method", "GET", ":scheme", "http", ":path", "/", ":authority", "a/b"},
		{":method", "GET", ":scheme", "http", ":path", "/", ":authority", "u@a"},
		{":method", "GET", ":scheme", "http", ":path", "/", "host", "u@a"},
		{":method", "CONNECT", ":authority", "u@a:1"},
		{":method", "GET", ":scheme", "http", ":path", "/a b", ":authority", "a"},
		{":method", "GET", ":scheme", "http", ":path", "/a\tb", ":authority", "a"},
		{":method", "GET", ":scheme", "", ":path", "/", ":authority", "a"},
		{":method", "GET", ":scheme", "1http", ":path", "/", ":authority", "a"},
		{":method", "GET", ":scheme", "http://b/", ":path", "/", ":authority", "a"},
	} {
		id := uint32(2*i + 1)
		c.fields(id, true, pairs...)
		if reset := next[*xhttp2.RSTStreamFrame](c); reset.StreamID != id || reset.ErrCode != xhttp2.ErrCodeProtocol {
			t.Errorf("%q: %v", pairs, reset)
		}
	}
	for i, pairs := range [][]string{
		{":method", "GET", ":scheme", "http", ":path", "/", "host", "a"},
		{":method", "GET", ":scheme", "http", ":path", "/", ":authority", "A:80", "host", "a:80"},
		{":method", "GET", ":scheme", "http", ":path", "/%20?b#c", ":authority", "[fd00::1]:80"},
	} {
		id := uint32(2*i + 101)
		c.fields(id, true, pairs...)
		if got := c.status(id); got != 200 {
			t.Errorf("%q: status %d", pairs, got)
		}
	}
}

// TestFramesTooShortForTheirFlags end the connection, which is told, and that one
// alone: what the client has under way is cancelled upstream, and other clients'
// streams on the same connection go on.
func TestFramesTooShortForTheirFlags(t *testing.T) {
	var cancelled atomic.Int32
	backend := serveHTTP(t, func(_ http.ResponseWriter, r *http.Request) {
		if r.Method == "POST" {
			_, _ = io.Copy(io.Discard, r.Body)
			cancelled.Add(1)
		}
	})
	r := newRelay(t, backend, nil)
	other := dialRaw(t, r.addr)
	other.request(1, true, "/")
	if got := other.status(1); got != 200 {
		t.Fatalf("status %d", got)
	}
	for i, short := range []struct {
		kind  xhttp2.FrameType
		flags xhttp2.Flags
	}{
		{xhttp2.FrameData, xhttp2.FlagDataPadded},
		{xhttp2.FrameHeaders, xhttp2.FlagHeadersPadded},
		{xhttp2.FrameHeaders, xhttp2.FlagHeadersPriority},
		{xhttp2.FramePushPromise, 0},
	} {
		c := dialRaw(t, r.addr)
		c.gather() // so that they are read at once
		c.request(1, false, "/")
		_ = c.WriteRawFrame(short.kind, short.flags, 1, nil)
		c.send()
		if code := c.last(); code != xhttp2.ErrCodeFrameSize {
			t.Errorf("%v: GOAWAY says %v", short, code)
		}
		eventually(t, "it is cancelled upstream", func() bool { return cancelled.Load() == int32(i+1) })
		id := uint32(2*i + 3)
		other.request(id, true, "/")
		if got := other.status(id); got != 200 {
			t.Errorf("%v: another client gets status %d", short, got)
		}
	}
}

// TestWhoseFaultItWas: what a client does wrong is no failure of the upstream.
func TestWhoseFaultItWas(t *testing.T) {
	backend := serveHTTP(t, func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
	for name, c := range map[string]struct {
		do        func(*raw)
		malformed bool
	}{
		"less than it said": {func(c *raw) {
			c.fields(1, false, ":method", "POST", ":scheme", "http", ":authority", "a", ":path", "/", "content-length", "5")
			_ = c.WriteData(1, true, []byte("1234"))
		}, true},
		"a frame of nothing": {func(c *raw) {
			c.request(1, false, "/")
			_ = c.WriteData(0, true, nil)
		}, true},
		"hangs up": {func(c *raw) {
			c.request(1, false, "/")
			_ = c.nc.(*net.TCPConn).CloseWrite()
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRelay(t, backend, nil)
			c.do(dialRaw(t, r.addr))
			if err := r.outcome(t).Err; !errors.Is(err, http2.ErrClient) || errors.Is(err, http2.ErrMalformed) != c.malformed {
				t.Errorf("%v", err)
			}
		})
	}
}
