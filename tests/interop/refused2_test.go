package interop

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// frame is one of HTTP/2 (RFC 9113, section 4.1), whatever it says.
func frame(kind http2.FrameType, flags http2.Flags, stream uint32, payload string) string {
	head := binary.BigEndian.AppendUint32(nil, uint32(len(payload))<<8|uint32(kind))
	return string(binary.BigEndian.AppendUint32(append(head, byte(flags)), stream)) + payload
}

// block compresses names and values, whatever they are.
func block(pairs ...string) string {
	var out bytes.Buffer
	enc := hpack.NewEncoder(&out)
	for i := 0; i < len(pairs); i += 2 {
		_ = enc.WriteField(hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]})
	}
	return out.String()
}

// get are the fields of a request, and more.
func get(path string, more ...string) []string {
	return append([]string{":method", "GET", ":scheme", "http", ":authority", "a", ":path", path}, more...)
}

const (
	endStream  = http2.FlagHeadersEndStream
	endHeaders = http2.FlagHeadersEndHeaders
	whole      = endStream | endHeaders
	padded     = http2.FlagHeadersPadded
	priority   = http2.FlagHeadersPriority
)

// request is a whole one without a body, on the first stream.
func request(pairs ...string) string { return headers(1, whole, pairs...) }

func headers(stream uint32, flags http2.Flags, pairs ...string) string {
	return frame(http2.FrameHeaders, flags, stream, block(pairs...))
}

func data(flags http2.Flags, payload string) string { return frame(http2.FrameData, flags, 1, payload) }

// number is one of 32 bits on the wire.
func number(n uint32) string { return string(binary.BigEndian.AppendUint32(nil, n)) }

// setting is one of a SETTINGS frame.
func setting(id http2.SettingID, value uint32) string {
	return frame(http2.FrameSettings, 0, 0, string(binary.BigEndian.AppendUint16(nil, uint16(id)))+number(value))
}

// greeting is what a client begins with.
var greeting = http2.ClientPreface + frame(http2.FrameSettings, 0, 0, "")

// brokenRequests break a rule that is about one request (RFC 9113, sections 8.1 to
// 8.5, and RFC 9110).
var brokenRequests = []string{
	// Pseudo-header fields.
	request(":scheme", "http", ":authority", "a", ":path", "/"),
	request(":method", "GET", ":authority", "a", ":path", "/"),
	request(":method", "GET", ":scheme", "http", ":authority", "a"),
	request(get("")...),
	request(get("a")...),
	request(get("*")...),
	request(get("/", ":method", "GET")...),
	request(get("/", ":scheme", "http")...),
	request(get("/", ":path", "/b")...),
	request(get("/", ":authority", "b")...),
	request(get("/", ":protocol", "websocket")...),
	request(get("/", ":status", "200")...),
	request(get("/", ":x", "y")...),
	request(get("/", ":", "y")...),
	request(append([]string{"x", "y"}, get("/")...)...),
	request(":method", "GET", ":scheme", "http", "x", "y", ":authority", "a", ":path", "/"),
	request(":Method", "GET", ":scheme", "http", ":authority", "a", ":path", "/"),
	request(":method", "", ":scheme", "http", ":authority", "a", ":path", "/"),
	request(":method", "G T", ":scheme", "http", ":authority", "a", ":path", "/"),
	request(":method", "GET / HTTP/1.1\r\nx: y\r\n\r\nGET", ":scheme", "http", ":authority", "a", ":path", "/"),
	request(get("/\x01")...),
	request(get("/ HTTP/1.1\r\nHost: a\r\n\r\n")...),
	request(get("/a b")...),
	request(":method", "GET", ":scheme", "http", ":authority", "a b", ":path", "/"),
	request(":method", "GET", ":scheme", "http", ":authority", "a/b", ":path", "/"),
	request(":method", "GET", ":scheme", "http", ":authority", "u@a", ":path", "/"),
	request(":method", "GET", ":scheme", "http", ":path", "/"),
	request(":method", "GET", ":scheme", "http", ":path", "/", ":authority", ""),
	request(":method", "GET", ":scheme", "", ":path", "/", ":authority", "a"),
	request(":method", "GET", ":scheme", "http://b/?", ":path", "/", ":authority", "a"),
	request(":method", "CONNECT", ":scheme", "http", ":authority", "a:1", ":path", "/"),
	request(":method", "CONNECT"),
	// Who is asked.
	request(get("/", "host", "b")...),
	request(get("/", "host", "a", "host", "a")...),
	request(":method", "GET", ":scheme", "http", ":path", "/", "host", "a", "host", "b"),
	// Names and values.
	request(get("/", "X", "y")...),
	request(get("/", "xY", "y")...),
	request(get("/", "", "y")...),
	request(get("/", "x y", "z")...),
	request(get("/", "x ", "y")...),
	request(get("/", "x:y", "z")...),
	request(get("/", "x\x00", "y")...),
	request(get("/", "x\r\ny", "z")...),
	request(get("/", "x\x7f", "y")...),
	request(get("/", "x\x80", "y")...),
	request(get("/", "x", "a\x00b")...),
	request(get("/", "x", "a\rb")...),
	request(get("/", "x", "a\nb")...),
	request(get("/", "x", "a\r\ntransfer-encoding: chunked")...),
	// What is of a connection.
	request(get("/", "connection", "close")...),
	request(get("/", "connection", "content-length")...),
	request(get("/", "proxy-connection", "keep-alive")...),
	request(get("/", "keep-alive", "timeout=5")...),
	request(get("/", "transfer-encoding", "chunked")...),
	request(get("/", "upgrade", "h2c")...),
	request(get("/", "te", "gzip")...),
	request(get("/", "te", "trailers, gzip")...),
	request(get("/", "te", "")...),
	// Lengths.
	request(get("/", "content-length", "1")...),
	request(get("/", "content-length", "+0")...),
	request(get("/", "content-length", "-1")...),
	request(get("/", "content-length", "0x0")...),
	request(get("/", "content-length", "")...),
	request(get("/", "content-length", "0, 0")...),
	request(get("/", "content-length", "99999999999999999999")...),
	request(get("/", "content-length", "0", "content-length", "1")...),
	// A stream that depends on itself (section 5.3.1 of RFC 7540).
	frame(http2.FrameHeaders, whole|priority, 1, number(1)+"\x10"+block(get("/")...)),
}

// brokenConnections break a rule that is about the connection: what follows is not
// looked at (sections 4 to 6, RFC 7541). Each is followed by a request.
var brokenConnections = []string{
	// Numbers of streams.
	headers(0, whole, get("/")...),
	headers(2, whole, get("/")...),
	headers(5, whole, get("a")...) + headers(3, whole, get("/")...),
	// Header blocks that are not whole.
	frame(http2.FrameHeaders, whole|padded, 1, "\xff"+block(get("/")...)),
	frame(http2.FrameHeaders, whole|padded, 1, ""),
	frame(http2.FrameHeaders, whole|priority, 1, "\x00\x00"),
	frame(http2.FrameContinuation, endHeaders, 1, block(get("/")...)),
	headers(1, endStream, get("/")...) + data(0, "x"),
	headers(1, endStream, get("/")...) + frame(http2.FramePing, 0, 0, "12345678"),
	headers(1, endStream, get("/")...) + headers(1, whole, get("/")...),
	headers(1, endStream, get("/")...) + headers(3, whole, get("/")...),
	headers(1, endStream, get("/")...) + frame(http2.FrameContinuation, endHeaders, 3, block("x", "y")),
	headers(1, endStream, get("/")...) + frame(http2.FrameContinuation, endHeaders, 0, block("x", "y")),
	headers(1, endStream, get("/")...) + frame(0xfa, 0, 1, "unknown"),
	headers(1, endStream, get("/")...) + strings.Repeat(frame(http2.FrameContinuation, 0, 1, ""), 100),
	// Compression.
	frame(http2.FrameHeaders, whole, 1, "\x80"),
	frame(http2.FrameHeaders, whole, 1, block(get("/")...)+"\xff\x7f"),
	frame(http2.FrameHeaders, whole, 1, block(get("/")...)+"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f"),
	frame(http2.FrameHeaders, whole, 1, block(get("/")...)+"\x00\x7f"),
	frame(http2.FrameHeaders, whole, 1, block(get("/")...)+"\x00\x81\xff\x01y"),
	frame(http2.FrameHeaders, whole, 1, block(get("/")...)+"\x3f\xe1\xff\x03"),
	frame(http2.FrameHeaders, whole, 1, block(get("/")...)+"\x20"),
	// Frames that are not of a stream, or of none that is open.
	frame(http2.FrameData, http2.FlagDataEndStream, 0, "x"),
	data(http2.FlagDataEndStream, "x"),
	frame(http2.FrameRSTStream, 0, 0, number(8)),
	frame(http2.FrameRSTStream, 0, 1, number(8)),
	frame(http2.FrameWindowUpdate, 0, 1, number(1)),
	frame(http2.FramePriority, 0, 0, number(3)+"\x10"),
	frame(http2.FrameSettings, 0, 1, ""),
	frame(http2.FramePing, 0, 1, "12345678"),
	frame(http2.FrameGoAway, 0, 1, number(0)+number(0)),
	frame(http2.FramePushPromise, endHeaders, 1, number(2)+block(get("/")...)),
	// Sizes.
	frame(0xfa, 0, 0, strings.Repeat("x", 16<<10+1)),
	frame(http2.FrameRSTStream, 0, 1, "123"),
	frame(http2.FrameWindowUpdate, 0, 0, "123"),
	frame(http2.FramePing, 0, 0, "1234567"),
	frame(http2.FrameSettings, 0, 0, "12345"),
	frame(http2.FrameSettings, http2.FlagSettingsAck, 0, "123456"),
	frame(http2.FrameGoAway, 0, 0, "1234567"),
	// Values.
	setting(http2.SettingEnablePush, 2),
	setting(http2.SettingInitialWindowSize, 1<<31),
	setting(http2.SettingMaxFrameSize, 16<<10-1),
	setting(http2.SettingMaxFrameSize, 1<<24),
	frame(http2.FrameWindowUpdate, 0, 0, number(0)),
	frame(http2.FrameWindowUpdate, 0, 0, number(1<<31-1)),
}

// post is the head of a request that has a body.
func post(more ...string) string {
	return headers(1, endHeaders, append([]string{":method", "POST", ":scheme", "http", ":authority", "a", ":path", "/"}, more...)...)
}

// trailers end a body.
func trailers(flags http2.Flags, pairs ...string) string { return headers(1, flags, pairs...) }

// brokenBodies are requests whose head is in order, and on its way before the rest
// shows that the request is none.
var brokenBodies = []string{
	post("content-length", "5") + data(endStream, "1234"),
	post("content-length", "5") + data(endStream, ""),
	post("content-length", "5") + data(0, "1234") + data(endStream, "56"),
	post("content-length", "5") + data(0, "123456") + data(endStream, ""),
	post("content-length", "0") + data(endStream, "1"),
	post("content-length", "5") + data(0, "1234") + trailers(whole, "x", "y"),
	post() + data(endStream|padded, "\x05123"),
	post() + data(endStream|padded, ""),
	post() + data(0, "1234") + trailers(whole, ":path", "/"),
	post() + data(0, "1234") + trailers(whole, "x", "y", ":status", "200"),
	post() + data(0, "1234") + trailers(whole, "X", "y"),
	post() + data(0, "1234") + trailers(whole, "x", "a\r\nb"),
	post() + data(0, "1234") + trailers(whole, "transfer-encoding", "chunked"),
	post() + data(0, "1234") + trailers(endHeaders, "x", "y") + data(endStream, "5"),
	post() + data(0, "1234") + frame(http2.FrameHeaders, whole, 1, "\x80"),
	post() + data(0, "1234") + headers(1, endStream, "x", "y") + data(endStream, "5"),
	post() + data(0, "1234") + frame(http2.FrameWindowUpdate, 0, 1, number(0)) + data(endStream, "5"),
	post() + data(0, "1234") + frame(http2.FrameWindowUpdate, 0, 1, number(1<<31-1)) + data(endStream, "5"),
	post() + data(0, "1234") + frame(http2.FramePriority, 0, 1, number(1)+"\x10") + data(endStream, "5"),
	post() + data(0, "1234") + frame(http2.FrameRSTStream, 0, 1, "12") + data(endStream, "5"),
	// More than a window that nobody gives.
	post() + strings.Repeat(data(0, strings.Repeat("x", 16<<10)), 64) + data(endStream, ""),
}

// recorder2 is a server of HTTP/2 that keeps all it gets, and answers what is whole.
// It takes as much of a body as a client may send unasked, and no more.
type recorder2 struct {
	recorder
	complete []string // paths of whole requests
}

// record2 starts a recorder2 on a port of called.
func record2(t *testing.T, port uint16) *recorder2 {
	t.Helper()
	r := &recorder2{}
	r.serve(t, port, r.keep)
	return r
}

// Write keeps what a connection has read.
func (r *recorder2) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.seen.Write(p)
}

func (r *recorder2) keep(conn net.Conn) {
	defer conn.Close()
	in := io.TeeReader(conn, r)
	if _, err := io.ReadFull(in, make([]byte, len(http2.ClientPreface))); err != nil {
		return
	}
	framer := http2.NewFramer(conn, in)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	_ = framer.WriteSettings()
	paths := map[uint32]string{}
	for {
		f, err := framer.ReadFrame()
		if err != nil {
			return
		}
		ended := false
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				_ = framer.WriteSettingsAck()
			}
		case *http2.MetaHeadersFrame:
			if paths[f.StreamID] == "" {
				paths[f.StreamID] = f.PseudoValue("path")
			}
			ended = f.StreamEnded()
		case *http2.DataFrame:
			ended = f.StreamEnded()
		}
		if id := f.Header().StreamID; ended {
			r.mu.Lock()
			r.complete = append(r.complete, paths[id])
			r.mu.Unlock()
			_ = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: []byte(block(":status", "200")), EndHeaders: true, EndStream: true})
		}
	}
}

// take returns what came since it was called last, and the paths of whole requests.
func (r *recorder2) take() (string, []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	seen, complete := r.seen.String(), r.complete
	r.seen.Reset()
	r.complete = nil
	return seen, complete
}

// What is answered to what is broken: the stream's end, the connection's, or a status.
const (
	reset      = "RST_STREAM"
	goAway     = "GOAWAY"
	badRequest = "400"
)

// say2 sends text and waits for an answer that is wanted.
func say2(conn net.Conn, text string, want ...string) error {
	_ = conn.SetDeadline(time.Now().Add(refusal))
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		_, _ = io.WriteString(conn, text) // it may be refused before its end
	}()
	defer func() {
		conn.Close()
		<-sent
	}()
	framer := http2.NewFramer(io.Discard, conn)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	var said []string
	for {
		f, err := framer.ReadFrame()
		if err != nil {
			return fmt.Errorf("answered %q, then %w; want one of %q", said, err, want)
		}
		answer := ""
		switch f := f.(type) {
		case *http2.MetaHeadersFrame:
			answer = f.PseudoValue("status")
		case *http2.RSTStreamFrame:
			answer = reset
		case *http2.GoAwayFrame:
			answer = goAway
		default:
			continue
		}
		if slices.Contains(want, answer) {
			return nil
		}
		said = append(said, answer)
	}
}

const recorder2Port = 8101

var toRecorder2 = declare("recorder2", recorder2Port, "kubernetes.io/h2c")

// TestNothingOfWhatIsBrokenGetsThroughInHTTP2: as in HTTP/1. A request
// whose head was in order the server never sees whole.
func TestNothingOfWhatIsBrokenGetsThroughInHTTP2(t *testing.T) {
	throughBoth(t)
	after := headers(7, whole, get("/smuggled")...)
	var connections []string
	for _, broken := range brokenConnections {
		connections = append(connections, greeting+broken+after)
	}
	// SETTINGS come first.
	for _, first := range []string{"", frame(http2.FramePing, 0, 0, "12345678"), frame(http2.FrameSettings, http2.FlagSettingsAck, 0, "")} {
		connections = append(connections, http2.ClientPreface+first+after)
	}
	var requests, bodies []string
	for _, broken := range brokenRequests {
		requests = append(requests, greeting+broken)
	}
	for _, broken := range brokenBodies {
		bodies = append(bodies, greeting+broken)
	}
	for name, dial := range map[string]func() net.Conn{
		"declared":       func() net.Conn { return fromCaller(t, toRecorder2) },
		"undeclared":     func() net.Conn { return fromCaller(t, on(recorder2Port)) },
		"from elsewhere": func() net.Conn { return fromNode(t, on(recorder2Port)) },
	} {
		t.Run(name, func(t *testing.T) {
			server := record2(t, recorder2Port)
			refuse := func(text string, want ...string) {
				if err := say2(dial(), text, want...); err != nil {
					t.Errorf("%s: %v", show(text), err)
				}
				if seen, _ := server.take(); seen != "" {
					t.Errorf("%s: the server saw %.200q", show(text), seen)
				}
			}
			for _, text := range requests {
				refuse(text, reset, badRequest)
			}
			for _, text := range connections {
				refuse(text, goAway)
			}
			for _, text := range bodies {
				if err := say2(dial(), text, reset, goAway, badRequest); err != nil {
					t.Errorf("%s: %v", show(text), err)
				}
				if _, complete := server.take(); len(complete) > 0 {
					t.Errorf("%s: the server saw a whole request", show(text))
				}
			}
			// What comes next finds nothing left of all that, and nothing came late.
			if err := say2(dial(), greeting+request(get("/whole")...), "200"); err != nil {
				t.Errorf("a request that is whole: %v", err)
			}
			if _, complete := server.take(); fmt.Sprint(complete) != "[/whole]" {
				t.Errorf("the server saw the whole requests %q, want one of /whole", complete)
			}
		})
	}
}

// show is what follows the preface.
func show(text string) string { return fmt.Sprintf("%.200q", text[len(http2.ClientPreface):]) }
