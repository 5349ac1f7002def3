package interop

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	getHead     = "GET / HTTP/1.1\r\nHost: a\r\n"
	chunkedHead = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
	smuggled    = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
)

// brokenLines are requests whose first line is none: on a port that nobody
// declares they are not taken for HTTP.
var brokenLines = []string{
	"\r\n" + getHead + "\r\n",
	"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
	"GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
	"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n",
	" GET / HTTP/1.1\r\nHost: a\r\n\r\n",
	"GET / http/1.1\r\nHost: a\r\n\r\n",
	"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
	"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
	"GET / HTTP/01.1\r\nHost: a\r\n\r\n",
	"GET / HTTP/11.1\r\nHost: a\r\n\r\n",
	"GET /\r\n\r\n",
	"G(T / HTTP/1.1\r\nHost: a\r\n\r\n",
	"get\x00 / HTTP/1.1\r\nHost: a\r\n\r\n",
	"GET / HTTP/1.1\r\r\nHost: a\r\n\r\n",
	"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03 not for this port\r\n\r\n",
}

// brokenHeads, and bodies behind a head, are what two readers could take for two messages
// (RFC 9112, sections 2.2, 5 and 6), or what is no message.
var brokenHeads = []string{
	// Ends of lines.
	"GET / HTTP/1.1\nHost: a\n\n" + smuggled,
	"GET / HTTP/1.1\nHost: a\r\n\r\n",
	getHead + "X: y\n\r\n",
	getHead + "X: y\r\n\n" + smuggled,
	getHead + "X: a\rb\r\n\r\n",
	getHead + "X: a\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	getHead + "X: a\x00b\r\n\r\n",
	getHead + "X: a\x7fb\r\n\r\n",
	getHead + "X: a\x0bb\r\n\r\n",
	// Names and values.
	getHead + "X: a\r\n b\r\n\r\n",
	getHead + " X: a\r\n\r\n",
	getHead + "X : a\r\n\r\n",
	getHead + "X\t: a\r\n\r\n",
	getHead + ": a\r\n\r\n",
	getHead + "X\r\n\r\n",
	getHead + "X(y): a\r\n\r\n",
	getHead + "X\x80: a\r\n\r\n",
	getHead + "\x00X: a\r\n\r\n",
	getHead + "X: " + strings.Repeat("a", 256<<10) + "\r\n\r\n",
	// Host.
	"GET / HTTP/1.1\r\n\r\n",
	getHead + "host: b\r\n\r\n",
	getHead + "Host: a\r\n\r\n",
	"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
	"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
	"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n",
	"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n",
	"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
	// Two lengths (CL.CL, CL.TE, TE.CL).
	getHead + "Content-Length: 1\r\ncontent-length: 1\r\n\r\nx",
	getHead + "Content-Length: 0\r\nContent-Length: 36\r\n\r\n" + smuggled,
	getHead + "Content-Length: 0, 36\r\n\r\n" + smuggled,
	getHead + "Content-Length: 1, 1\r\n\r\nx",
	getHead + "Content-Length: +1\r\n\r\nx",
	getHead + "Content-Length: -1\r\n\r\nx",
	getHead + "Content-Length: 0x1\r\n\r\nx",
	getHead + "Content-Length: 1_0\r\n\r\nx",
	getHead + "Content-Length: 1 1\r\n\r\nx",
	getHead + "Content-Length: \r\n\r\nx",
	getHead + "Content-Length: \x0b1\r\n\r\nx",
	getHead + "Content-Length: 9223372036854775808\r\n\r\nx",
	getHead + "Content-Length: 99999999999999999999\r\n\r\nx",
	getHead + "Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled,
	getHead + "Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n0\r\n\r\n",
	// Codings that hide one (TE.TE).
	getHead + "Transfer-Encoding: identity\r\n\r\n",
	getHead + "Transfer-Encoding: xchunked\r\n\r\n",
	getHead + "Transfer-Encoding: gzip, chunked\r\n\r\n",
	getHead + "Transfer-Encoding: chunked, identity\r\n\r\n",
	getHead + "Transfer-Encoding: \x0bchunked\r\n\r\n",
	getHead + "Transfer-Encoding: \"chunked\"\r\n\r\n",
	getHead + "Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n",
	getHead + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	getHead + "Transfer-Encoding: chunked;a=b\r\n\r\n0\r\n\r\n",
	getHead + "Transfer-Encoding:\r\n\r\n",
	getHead + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
	getHead + "Transfer-Encoding\r\n: chunked\r\n\r\n0\r\n\r\n",
	"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	// Fields that the next hop would be told to forget.
	getHead + "Connection: content-length\r\nContent-Length: 36\r\n\r\n" + smuggled,
	getHead + "Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	getHead + "Connection: close, host\r\n\r\n",
	"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nContent-Length: 1\r\n\r\nx",
	// Bodies whose beginning came with the head.
	chunkedHead + "\r\n0\r\n\r\n",
	chunkedHead + "g\r\n",
	chunkedHead + "-1\r\n",
	chunkedHead + "+1\r\nx\r\n",
	chunkedHead + "0x1\r\nx\r\n",
	chunkedHead + "1 \r\nx\r\n",
	chunkedHead + " 1\r\nx\r\n",
	chunkedHead + "1\nx\r\n",
	chunkedHead + "1\rx\r\n",
	chunkedHead + "1;a\nb\r\nx\r\n",
	chunkedHead + "1;a\x00\r\nx\r\n",
	chunkedHead + "1\r\nxy\r\n",
	chunkedHead + "1\r\nx\n0\r\n\r\n" + smuggled,
	chunkedHead + "ffffffffffffffffff\r\n",
	chunkedHead + "10000000000000000\r\n",
	chunkedHead + strings.Repeat("0", 5000) + "1\r\nx\r\n",
	chunkedHead + "1;" + strings.Repeat("a", 5000) + "\r\nx\r\n",
	chunkedHead + "0\r\n: x\r\n\r\n",
	chunkedHead + "0\r\nx y: z\r\n\r\n",
	chunkedHead + "0\r\nx: a\nb\r\n\r\n",
	chunkedHead + "0\r\n\n" + smuggled,
	chunkedHead + "0\r\n\r" + smuggled,
	chunkedHead + "0\n\n" + smuggled,
}

// recorder is a server that keeps all it gets, and answers what ends like a request.
type recorder struct {
	mu    sync.Mutex
	seen  bytes.Buffer
	conns []net.Conn
}

// record starts a recorder on a port of called.
func record(t *testing.T, port uint16) *recorder {
	t.Helper()
	r := &recorder{}
	r.serve(t, port, r.keep)
	return r
}

// serve has connections to a port of called kept until the test ends.
func (r *recorder) serve(t *testing.T, port uint16, keep func(net.Conn)) {
	t.Helper()
	l := listen(t, port)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			r.mu.Lock()
			r.conns = append(r.conns, conn)
			r.mu.Unlock()
			go keep(conn)
		}
	}()
	t.Cleanup(r.close)
}

func (r *recorder) keep(conn net.Conn) {
	defer conn.Close()
	buf := make([]byte, 4<<10)
	for {
		n, err := conn.Read(buf)
		r.mu.Lock()
		r.seen.Write(buf[:n])
		r.mu.Unlock()
		if bytes.HasSuffix(buf[:n], []byte("\r\n\r\n")) {
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		}
		if err != nil {
			return
		}
	}
}

// close ends the connections, which the proxies would keep.
func (r *recorder) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, conn := range r.conns {
		conn.Close()
	}
}

func (r *recorder) take() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	defer r.seen.Reset()
	return r.seen.String()
}

// refusal is how long it may take until what is broken is refused, and the
// connection closed.
const refusal = 5 * time.Second

// say sends text, then nothing more, and returns all that is answered until the
// other side closes, and an error if it does not.
func say(conn net.Conn, text string) (string, error) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(refusal))
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		_, _ = io.WriteString(conn, text) // it may be refused before its end
	}()
	answer, err := io.ReadAll(conn)
	<-sent
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return string(answer), err
	}
	return string(answer), nil // a reset follows an answer to what was not read
}

const recorderPort = 8100

var toRecorder = declare("recorder", recorderPort, "http")

// TestNothingOfWhatIsBrokenGetsThrough: the server sees no byte of it, of no
// connection; the client is told, and the connection closed. It is refused by the
// first proxy it meets: the caller's, or the server's own for a caller that has
// none.
func TestNothingOfWhatIsBrokenGetsThrough(t *testing.T) {
	throughBoth(t)
	server := record(t, recorderPort)
	for name, c := range map[string]struct {
		requests []string
		dial     func(t *testing.T) net.Conn
	}{
		"declared":       {append(brokenLines, brokenHeads...), func(t *testing.T) net.Conn { return fromCaller(t, toRecorder) }},
		"undeclared":     {brokenHeads, func(t *testing.T) net.Conn { return fromCaller(t, on(recorderPort)) }},
		"from elsewhere": {brokenHeads, func(t *testing.T) net.Conn { return fromNode(t, on(recorderPort)) }},
	} {
		t.Run(name, func(t *testing.T) {
			const whole = "GET /whole HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
			for _, request := range c.requests {
				answer, err := say(c.dial(t), request)
				if err != nil || !strings.HasPrefix(answer, "HTTP/1.1 4") || strings.Count(answer, "Proxy-Status:") != 1 {
					t.Errorf("%.80q: answered %.60q, %v", request, answer, err)
				}
				if seen := server.take(); seen != "" {
					t.Errorf("%.80q: the server saw %.200q", request, seen)
				}
			}
			// What comes next finds nothing left of all that.
			if answer, err := say(c.dial(t), whole); err != nil || !strings.HasPrefix(answer, "HTTP/1.1 200 ") {
				t.Errorf("a request that is whole: answered %q, %v", answer, err)
			}
			if seen := server.take(); !strings.HasPrefix(seen, "GET /whole HTTP/1.1\r\n") || strings.Count(seen, "HTTP/1.1") != 1 {
				t.Errorf("a request that is whole: the server saw %q", seen)
			}
		})
	}
}

func fromCaller(t *testing.T, to netip.AddrPort) net.Conn {
	t.Helper()
	conn, err := dial(t.Context(), to.String())
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// fromNode connects from the node itself, where no proxy is.
func fromNode(t *testing.T, to netip.AddrPort) net.Conn {
	t.Helper()
	conn, err := net.DialTimeout("tcp4", to.String(), patience)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}
