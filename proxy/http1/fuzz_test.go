package http1

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"
)

// FuzzRequest compares with net/http: where both take bytes for a request, they
// take them for the same one, with the same body, and find the next one at the
// same place.
func FuzzRequest(f *testing.F) {
	for _, c := range refused {
		f.Add([]byte(c.text))
	}
	for _, c := range brokenChunks {
		f.Add([]byte("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + c.text))
	}
	f.Add([]byte(get + "Content-Length: 3\r\n\r\nabcdef"))
	f.Add([]byte(get + "Transfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nX: y\r\n\r\nnext"))
	f.Add([]byte("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: " + strings.Repeat("y", MaxHead-10) + "\r\n\r\nnext"))
	f.Fuzz(func(t *testing.T, in []byte) {
		h, left, err := request(string(in))
		if err != nil || string(h.Method) == "CONNECT" {
			return
		}
		source := reader(in)
		theirs, err := http.ReadRequest(source)
		if err != nil {
			return // net/http wants targets that parse as URLs, and more
		}
		body, err := io.ReadAll(theirs.Body)
		if err != nil {
			t.Fatalf("net/http cannot read the body of %q: %v", in, err)
		}
		rest, _ := io.ReadAll(source)
		if theirs.Method != string(h.Method) || theirs.RequestURI != string(h.Target) || theirs.ProtoMinor != h.Minor || string(rest) != left {
			t.Fatalf("%q: net/http reads %s %s HTTP/1.%d and leaves %q; here %s %s HTTP/1.%d and %q",
				in, theirs.Method, theirs.RequestURI, theirs.ProtoMinor, rest, h.Method, h.Target, h.Minor, left)
		}
		if h.Body.Kind == Length && int64(len(body)) != h.Body.Left() {
			t.Fatalf("%q: net/http reads a body of %d bytes, here of %d", in, len(body), h.Body.Left())
		}
		if len(h.Host) > 0 && !strings.HasPrefix(string(h.Target), "http") && theirs.Host != string(h.Host) {
			t.Fatalf("%q: net/http reads the host %q, here %q", in, theirs.Host, h.Host)
		}
		if got := h.AppendTo(nil, Silent); !h.hop && !bytes.HasPrefix(in, got) {
			t.Fatalf("%q: passed on as %q", in, got)
		}
	})
}

// reader is one of in for net/http, which refuses a trailer section that is longer than its
// buffer (net/http, seeUpcomingDoubleCRLF): any that is taken here fits.
func reader(in []byte) *bufio.Reader { return bufio.NewReaderSize(bytes.NewReader(in), 2*MaxHead) }

// FuzzBody: however a body is cut, it is read alike.
func FuzzBody(f *testing.F) {
	for _, c := range brokenChunks {
		f.Add([]byte(c.text), uint8(1))
	}
	f.Add([]byte("3;x=y\r\nabc\r\n0\r\nX: y\r\n\r\nnext"), uint8(2))
	f.Fuzz(func(t *testing.T, in []byte, step uint8) {
		whole := Body{Kind: Chunked}
		n, err := whole.Next(in)
		cut, m := Body{Kind: Chunked}, 0
		for m < len(in) && !cut.Done() {
			k, failed := cut.Next(in[m:min(len(in), m+int(step)+1)])
			m += k
			if failed != nil {
				if err == nil || failed.Error() != err.Error() {
					t.Fatalf("whole: %v, cut: %v", err, failed)
				}
				return
			}
		}
		if err != nil || n != m || whole.Done() != cut.Done() {
			t.Fatalf("whole: %d, %v, %v; cut: %d, %v", n, whole.Done(), err, m, cut.Done())
		}
	})
}

// FuzzResponse: an answer that net/http reads too has the same body there.
func FuzzResponse(f *testing.F) {
	for _, text := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "HTTP/1.0 200 OK\r\n\r\nrest",
		"HTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
	} {
		f.Add([]byte(text), false)
	}
	f.Fuzz(func(t *testing.T, in []byte, head bool) {
		method := "GET"
		if head {
			method = "HEAD"
		}
		var s Scanner
		n, err := s.End(in)
		if err != nil || n == 0 {
			return
		}
		var h Head
		if h.ParseResponse(in[:n], []byte(method)) != nil || h.Status < 200 {
			return
		}
		body := h.Body
		m, err := body.Next(in[n:])
		if err != nil || !body.Done() && body.Kind != UntilClose {
			return
		}
		source := reader(in)
		theirs, err := http.ReadResponse(source, &http.Request{Method: method})
		if err != nil {
			return
		}
		defer theirs.Body.Close()
		if _, err := io.ReadAll(theirs.Body); err != nil {
			t.Fatalf("net/http cannot read the body of %q: %v", in, err)
		}
		rest, _ := io.ReadAll(source)
		if theirs.StatusCode != h.Status || string(rest) != string(in[n+m:]) {
			t.Fatalf("%q: net/http reads %d and leaves %q, here %d and %q", in, theirs.StatusCode, rest, h.Status, in[n+m:])
		}
	})
}
