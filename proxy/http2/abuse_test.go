package http2_test

import (
	"bytes"
	"errors"
	"net/http"
	"runtime"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/weirmesh/weir/proxy/http2"
)

// floods are what a hostile client does; each n times. A frame is written without
// regard for errors: the connection is to end.
var floods = map[string]struct {
	few, many int
	code      xhttp2.ErrCode
	begin     func(r *raw)
	frame     func(r *raw, i int)
	end       func(r *raw) // after few
}{
	"rapid reset": {500, 5000, xhttp2.ErrCodeEnhanceYourCalm, nil, func(r *raw, i int) {
		r.request(uint32(2*i+1), true, "/slow")
		_ = r.WriteRSTStream(uint32(2*i+1), xhttp2.ErrCodeCancel)
	}, nil},
	"CONTINUATION": {20, 1000, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
		_ = r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, EndStream: true, BlockFragment: literal("a", "b")})
	}, func(r *raw, _ int) {
		_ = r.WriteContinuation(1, false, literal("a", "b"))
	}, func(r *raw) { _ = r.WriteContinuation(1, true, literal("a", "b")) }},
	"empty CONTINUATION": {20, 1000, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
		_ = r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, EndStream: true, BlockFragment: literal("a", "b")})
	}, func(r *raw, _ int) {
		_ = r.WriteContinuation(1, false, nil)
	}, func(r *raw) { _ = r.WriteContinuation(1, true, nil) }},
	// One entry of 4,000 bytes in the compressor's table, named again and again.
	"HPACK bomb": {1, 2000, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
		r.fields(1, true, "bomb", string(bytes.Repeat([]byte("!"), 4000)))
	}, func(r *raw, i int) {
		_ = r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: uint32(2*i + 3), EndStream: true, EndHeaders: true,
			BlockFragment: bytes.Repeat([]byte{0x80 | 62}, 10+min(i, 1)*10000)})
	}, nil},
	"SETTINGS": {500, 5000, xhttp2.ErrCodeEnhanceYourCalm, nil, func(r *raw, _ int) { _ = r.WriteSettings() }, nil},
	"PING":     {500, 5000, xhttp2.ErrCodeEnhanceYourCalm, nil, func(r *raw, _ int) { _ = r.WritePing(false, [8]byte{}) }, nil},
	"PRIORITY": {500, 5000, xhttp2.ErrCodeEnhanceYourCalm, nil, func(r *raw, _ int) { _ = r.WritePriority(1, xhttp2.PriorityParam{}) }, nil},
	"empty DATA": {500, 5000, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) { r.request(1, false, "/slow") },
		func(r *raw, _ int) { _ = r.WriteData(1, false, nil) }, nil},
	"malformed requests": {500, 5000, xhttp2.ErrCodeEnhanceYourCalm, nil, func(r *raw, i int) {
		r.fields(uint32(2*i+1), true, ":method", "GET", "Upper", "case")
	}, nil},
}

// literal is a field that goes into no table.
func literal(name, value string) []byte {
	return append(append([]byte{0, byte(len(name))}, name...), append([]byte{byte(len(value))}, value...)...)
}

// Each flood ends the connection, with the code that says so, and leaves neither
// memory nor goroutines. A few of the same frames do no harm.
func TestFloods(t *testing.T) {
	stop := make(chan struct{})
	backend := serveHTTP(t, func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			select {
			case <-stop:
			case <-r.Context().Done():
			}
		}
	})
	t.Cleanup(func() { close(stop) })
	for name, flood := range floods {
		t.Run(name, func(t *testing.T) {
			r := newRelay(t, backend, nil)
			before, goroutines := heap(), runtime.NumGoroutine()
			c := dialRaw(t, r.addr)
			if flood.begin != nil {
				flood.begin(c)
			}
			for i := range flood.many {
				flood.frame(c, i)
			}
			if code := c.last(); code != flood.code {
				t.Errorf("GOAWAY says %v", code)
			}
			if err := r.end(t); !errors.Is(err, http2.ErrAbuse) {
				t.Errorf("the connection ends with %v", err)
			}
			if grown := heap() - before; grown > 1<<20 {
				t.Errorf("%d bytes more than before", grown)
			}
			if n := runtime.NumGoroutine(); n > goroutines+10 {
				t.Errorf("%d goroutines, before: %d", n, goroutines)
			}

			c = dialRaw(t, r.addr)
			if flood.begin != nil {
				flood.begin(c)
			}
			for i := range flood.few {
				flood.frame(c, i)
			}
			if flood.end != nil {
				flood.end(c)
			}
			id := uint32(2*flood.few + 11)
			c.request(id, true, "/")
			if got := c.status(id); got != 200 {
				t.Errorf("after %d frames: status %d", flood.few, got)
			}
		})
	}
}

// A client that makes work and does not read what comes of it is cut off before it
// fills the proxy.
func TestClientThatDoesNotRead(t *testing.T) {
	backend := serveHTTP(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("x", string(bytes.Repeat([]byte("!"), 30000)))
	})
	r := newRelay(t, backend, nil)
	c := dialRaw(t, r.addr)
	_ = c.nc.SetWriteDeadline(time.Now().Add(5 * time.Second))
	for id := uint32(1); id < 2000; id += 2 {
		c.request(id, true, "/")
	}
	if err := r.end(t); !errors.Is(err, http2.ErrAbuse) {
		t.Errorf("the connection ends with %v", err)
	}
}

// Clients of gRPC send a PING for every frame of a body while they measure: no
// flood.
func TestPingsAmongBodies(t *testing.T) {
	backend := serveHTTP(t, func(w http.ResponseWriter, _ *http.Request) {
		for range 1000 {
			_, _ = w.Write([]byte("some"))
			_ = http.NewResponseController(w).Flush()
		}
	})
	r := newRelay(t, backend, nil)
	c := dialRaw(t, r.addr)
	for id := uint32(1); id < 10; id += 2 {
		c.request(id, true, "/")
		for ended := false; !ended; {
			f := next[*xhttp2.DataFrame](c)
			ended = f.StreamEnded()
			_ = c.WritePing(false, [8]byte{1})
			if n := uint32(len(f.Data())); n > 0 {
				_ = c.WriteWindowUpdate(0, n)
			}
		}
	}
	if o := r.outcome(t); o.Err != nil {
		t.Error(o.Err)
	}
}

// A header block over 64 KiB is answered 431, whether in one field or in many; one
// just below goes through, and so does the next request.
func TestHeadersTooLarge(t *testing.T) {
	backend := serveHTTP(t, func(http.ResponseWriter, *http.Request) {})
	refused := make(chan error, 10)
	r := newRelay(t, backend, func(r *relay) {
		r.server.Refused = func(err error) { refused <- err }
	})
	c := dialRaw(t, r.addr)
	for i, test := range []struct{ fields, size, status int }{{10, 6000, 200}, {11, 6000, 431}, {1, 70000, 431}, {1, 10, 200}} {
		id := uint32(2*i + 1)
		pairs := []string{":method", "GET", ":scheme", "http", ":authority", "a", ":path", "/"}
		for range test.fields {
			pairs = append(pairs, "x", string(bytes.Repeat([]byte("a"), test.size)))
		}
		c.block.Reset()
		for j := 0; j < len(pairs); j += 2 {
			_ = c.enc.WriteField(hpack.HeaderField{Name: pairs[j], Value: pairs[j+1], Sensitive: true})
		}
		for first := true; c.block.Len() > 0 || first; first = false {
			part := c.block.Next(16 << 10)
			if last := c.block.Len() == 0; first {
				_ = c.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, BlockFragment: part, EndStream: true, EndHeaders: last})
			} else {
				_ = c.WriteContinuation(id, last, part)
			}
		}
		if got := c.status(id); got != test.status {
			t.Errorf("%d fields of %d bytes: %d", test.fields, test.size, got)
		}
	}
	if n, err := len(refused), <-refused; n != 2 || !errors.Is(err, http2.ErrHeaderTooLarge) {
		t.Errorf("%d refused, the first: %v", n, err)
	}
}

// heap is what is in use after a collection.
func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
