package http2_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"strconv"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// raw is an end of a connection whose every frame a test writes itself.
type raw struct {
	*xhttp2.Framer
	t     testing.TB
	nc    net.Conn
	block bytes.Buffer
	enc   *hpack.Encoder

	gathered *bytes.Buffer
}

func newRaw(t testing.TB, nc net.Conn) *raw {
	t.Helper()
	t.Cleanup(func() { nc.Close() })
	_ = nc.SetDeadline(time.Now().Add(20 * time.Second))
	r := &raw{Framer: xhttp2.NewFramer(nc, nc), t: t, nc: nc}
	r.AllowIllegalWrites = true
	r.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	r.enc = hpack.NewEncoder(&r.block)
	return r
}

// dialRaw is a client.
func dialRaw(t testing.TB, addr string, settings ...xhttp2.Setting) *raw {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	r := newRaw(t, nc)
	_, _ = io.WriteString(nc, xhttp2.ClientPreface)
	_ = r.WriteSettings(settings...)
	return r
}

// gather has frames wait for send.
func (r *raw) gather() {
	r.gathered = &bytes.Buffer{}
	r.Framer = xhttp2.NewFramer(r.gathered, r.nc)
	r.AllowIllegalWrites = true
}

// send sends them at once.
func (r *raw) send() { _, _ = r.gathered.WriteTo(r.nc) }

// fields sends a header block of names and values.
func (r *raw) fields(id uint32, end bool, pairs ...string) {
	r.block.Reset()
	for i := 0; i < len(pairs); i += 2 {
		_ = r.enc.WriteField(hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]})
	}
	_ = r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, BlockFragment: r.block.Bytes(), EndHeaders: true, EndStream: end})
}

func (r *raw) request(id uint32, end bool, path string) {
	method := "GET"
	if !end {
		method = "POST"
	}
	r.fields(id, end, ":method", method, ":scheme", "http", ":authority", "shop.example", ":path", path)
}

// next returns the next frame that is of the type F, past all others.
func next[F xhttp2.Frame](r *raw) F {
	r.t.Helper()
	for {
		f, err := r.ReadFrame()
		if err != nil {
			r.t.Fatalf("waiting for a frame: %v", err)
		}
		if s, ok := f.(*xhttp2.SettingsFrame); ok && !s.IsAck() {
			_ = r.WriteSettingsAck()
		}
		if f, ok := f.(F); ok {
			return f
		}
	}
}

// status waits for a stream's answer.
func (r *raw) status(id uint32) int {
	r.t.Helper()
	for {
		if f := next[*xhttp2.MetaHeadersFrame](r); f.StreamID == id {
			n, _ := strconv.Atoi(f.PseudoValue("status"))
			return n
		}
	}
}

// last reads to the connection's end, and returns the GOAWAY's code.
func (r *raw) last() xhttp2.ErrCode {
	code := xhttp2.ErrCode(1 << 31)
	for {
		f, err := r.ReadFrame()
		if err != nil {
			return code
		}
		if f, ok := f.(*xhttp2.GoAwayFrame); ok {
			code = f.ErrCode
		}
	}
}

// upstreams is a backend whose connections a test speaks on itself.
func upstreams(t testing.TB) (string, func(...xhttp2.Setting) *raw) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln.Addr().String(), func(settings ...xhttp2.Setting) *raw {
		t.Helper()
		_ = ln.(*net.TCPListener).SetDeadline(time.Now().Add(10 * time.Second))
		nc, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		r := newRaw(t, nc)
		if _, err := io.ReadFull(nc, make([]byte, len(xhttp2.ClientPreface))); err != nil {
			t.Fatal(err)
		}
		_ = r.WriteSettings(settings...)
		return r
	}
}

func dialTCP(ctx context.Context, addr string) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "tcp", addr)
}
