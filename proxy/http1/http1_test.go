package http1

import (
	"errors"
	"strings"
	"testing"
)

// request parses the first request in text and follows its body. It returns the
// head, and what is left behind the message.
func request(text string) (*Head, string, error) {
	buf := []byte(text)
	var s Scanner
	n, err := s.End(buf)
	if err != nil {
		return nil, "", err
	}
	if n == 0 {
		return nil, "", errIncomplete
	}
	h := &Head{}
	if err := h.ParseRequest(buf[:n]); err != nil {
		return nil, "", err
	}
	body := h.Body
	m, err := body.Next(buf[n:])
	if err != nil {
		return h, "", err
	}
	if !body.Done() && body.Kind != Tunnel {
		return h, "", errIncomplete
	}
	return h, text[n+m:], nil
}

var errIncomplete = errors.New("incomplete")

const get = "GET / HTTP/1.1\r\nHost: a\r\n"

// refused are requests that no upstream may see, each with the rule it breaks.
var refused = []struct{ text, rule string }{
	{"GET / HTTP/1.1\nHost: a\r\n\r\n", "LF without CR"},
	{get + "X: y\n\r\n", "LF without CR"},
	{get + "\n", "LF without CR"},
	{"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", "an empty line"},
	{get + "X: a\rb\r\n\r\n", "control character"},
	{get + "X: a\x00b\r\n\r\n", "control character"},
	{get + "X: a\x7fb\r\n\r\n", "control character"},
	{get + "X: a\r\n b\r\n\r\n", "obs-fold"},
	{get + "X : a\r\n\r\n", "NAME:"},
	{get + " X: a\r\n\r\n", "obs-fold"},
	{get + ": a\r\n\r\n", "NAME:"},
	{get + "X\r\n\r\n", "NAME:"},
	{get + "X(y): a\r\n\r\n", "NAME:"},
	{get + "X\x80: a\r\n\r\n", "NAME:"},
	{"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", "METHOD TARGET VERSION"},
	{"GET / HTTP/1.1 \r\nHost: a\r\n\r\n", "version"},
	{"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", "version"},
	{"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", "method"},
	{" GET / HTTP/1.1\r\nHost: a\r\n\r\n", "method"},
	{"GET / http/1.1\r\nHost: a\r\n\r\n", "version"},
	{"GET / HTTP/1.2\r\nHost: a\r\n\r\n", "version"},
	{"GET / HTTP/2.0\r\nHost: a\r\n\r\n", "version"},
	{"GET / HTTP/01.1\r\nHost: a\r\n\r\n", "version"},
	{"GET /\r\n\r\n", "METHOD TARGET VERSION"},
	{"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n", "control character"},
	{"G(T / HTTP/1.1\r\nHost: a\r\n\r\n", "method"},
	{"GET / HTTP/1.1\r\n\r\n", "no Host"},
	{get + "host: b\r\n\r\n", "more than one Host"},
	{get + "Host: a\r\n\r\n", "more than one Host"},
	{"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", "no host has"},
	{"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", "no host has"},
	{"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", "no host has"},
	{get + "Content-Length: 1\r\ncontent-length: 1\r\n\r\nx", "more than one Content-Length"},
	{get + "Content-Length: 1\r\nContent-Length: 2\r\n\r\nxy", "more than one Content-Length"},
	{get + "Content-Length: 1, 1\r\n\r\nx", "not a number"},
	{get + "Content-Length: +1\r\n\r\nx", "not a number"},
	{get + "Content-Length: -1\r\n\r\nx", "not a number"},
	{get + "Content-Length: 0x1\r\n\r\nx", "not a number"},
	{get + "Content-Length: 1 1\r\n\r\nx", "not a number"},
	{get + "Content-Length: \r\n\r\nx", "not a number"},
	{get + "Content-Length: 99999999999999999999\r\n\r\nx", "not a number"},
	{get + "Content-Length: 9223372036854775808\r\n\r\nx", "not a number"},
	{get + "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "Transfer-Encoding and Content-Length"},
	{get + "Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n0\r\n\r\n", "Transfer-Encoding and Content-Length"},
	{get + "Transfer-Encoding: identity\r\n\r\n", "Transfer-Encoding"},
	{get + "Transfer-Encoding: xchunked\r\n\r\n", "Transfer-Encoding"},
	{get + "Transfer-Encoding: gzip, chunked\r\n\r\n", "Transfer-Encoding"},
	{get + "Transfer-Encoding: chunked, identity\r\n\r\n", "Transfer-Encoding"},
	{get + "Transfer-Encoding: \x0bchunked\r\n\r\n", "control character"},
	{get + "Transfer-Encoding: \"chunked\"\r\n\r\n", "Transfer-Encoding"},
	{get + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", "Transfer-Encoding"},
	{get + "Transfer-Encoding: chunked;a=b\r\n\r\n", "Transfer-Encoding"},
	{get + "Transfer-Encoding:\r\n\r\n", "Transfer-Encoding"},
	{"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "HTTP/1.0"},
	{get + "Connection: content-length\r\nContent-Length: 1\r\n\r\nx", "Connection names"},
	{get + "Connection: Transfer-Encoding\r\n\r\n", "Connection names"},
	{get + "Connection: close, host\r\n\r\n", "Connection names"},
	{get + "Connection: a b\r\n\r\n", "list of names"},
	{"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nContent-Length: 1\r\n\r\nx", "CONNECT"},
}

// brokenChunks are bodies behind a chunked head, each with the rule it breaks.
var brokenChunks = []struct{ text, rule string }{
	{"\r\n0\r\n\r\n", "begin with its size"},
	{"g\r\n", "begin with its size"},
	{"-1\r\n", "begin with its size"},
	{"+1\r\nx\r\n", "begin with its size"},
	{"0x1\r\nx\r\n", "not a number"},
	{"1 \r\nx\r\n", "not a number"},
	{" 1\r\nx\r\n", "begin with its size"},
	{"1\nx\r\n", "not a number"},
	{"1\rx\r\n", "CR without LF"},
	{"1;a\nb\r\nx\r\n", "control character"},
	{"1;a\x00\r\nx\r\n", "control character"},
	{"1\r\nxy\r\n", "longer than its size"},
	{"1\r\nx\n", "longer than its size"},
	{"1\r\nx\rz", "CR without LF"},
	{"ffffffffffffffffff\r\n", "too large"},
	{strings.Repeat("0", 5000) + "1\r\nx\r\n", "longer than 4096"},
	{"1;" + strings.Repeat("a", 5000) + "\r\nx\r\n", "longer than 4096"},
	{"0\r\n: x\r\n\r\n", "NAME:"},
	{"0\r\nx y: z\r\n\r\n", "NAME:"},
	{"0\r\nx: a\nb\r\n\r\n", "control character"},
	{"0\r\n\nGET", "NAME:"},
	{"0\r\n\rGET", "CR without LF"},
	{"0\r\nx: " + strings.Repeat("a", MaxHead) + "\r\n\r\n", "larger than"},
}

func TestWhatTwoReadersCouldTakeForTwoMessagesIsRefused(t *testing.T) {
	const chunked = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
	cases := refused
	for _, c := range brokenChunks {
		cases = append(cases, struct{ text, rule string }{chunked + c.text, c.rule})
	}
	for _, c := range cases {
		if _, _, err := request(c.text); err == nil || !strings.Contains(err.Error(), c.rule) {
			t.Errorf("%.120q: %v, want %q", c.text, err, c.rule)
		}
	}
}

func TestRequestsAreReadToTheirEnd(t *testing.T) {
	for _, c := range []struct {
		text, left string
		check      func(*Head) bool
	}{
		{get + "\r\nGET /next", "GET /next", func(h *Head) bool {
			return string(h.Method) == "GET" && string(h.Host) == "a" && h.Minor == 1 && !h.Close && h.Body.Kind == None
		}},
		{get + "Content-Length: 3\r\n\r\nabcdef", "def", func(h *Head) bool { return h.Body.Left() == 3 }},
		{get + "content-LENGTH:\t 0 \r\n\r\nx", "x", func(h *Head) bool { return h.Body.Kind == None }},
		{get + "Transfer-Encoding: Chunked\r\n\r\n3;x=y\r\nabc\r\n0a\r\n0123456789\r\n0\r\nX: y\r\n\r\nnext", "next",
			func(h *Head) bool { return h.Body.Kind == Chunked && h.Body.Left() == -1 }},
		{get + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nnext", "next", func(*Head) bool { return true }},
		{get + "Connection: close\r\n\r\n", "", func(h *Head) bool { return h.Close }},
		{get + "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\r\n", "", func(h *Head) bool { return h.Upgrade && !h.Close }},
		{get + "Connection: upgrade\r\n\r\n", "", func(h *Head) bool { return !h.Upgrade }},
		{get + "Upgrade: h2c\r\n\r\n", "", func(h *Head) bool { return !h.Upgrade }},
		{get + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: websocket, H2C\r\nHTTP2-Settings: x\r\n\r\n", "", func(h *Head) bool { return !h.Upgrade }},
		{"GET / HTTP/1.0\r\n\r\n", "", func(h *Head) bool { return h.Close && h.Host == nil }},
		{"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", "", func(h *Head) bool { return !h.Close }},
		{"PUT / HTTP/1.0\r\nExpect: 100-continue\r\n\r\n", "", func(h *Head) bool { return !h.Expect }},
		{"PUT / HTTP/1.1\r\nHost: \r\nExpect: 100-Continue\r\n\r\n", "", func(h *Head) bool { return h.Expect && h.Host != nil }},
		{"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", "", func(h *Head) bool { return string(h.Target) == "a:1" }},
		{"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", "", func(h *Head) bool { p, _ := h.Path(); return string(p) == "*" }},
		{"GET http://h:1/p?q HTTP/1.1\r\nHost: h:1\r\n\r\n", "", func(h *Head) bool {
			p, q := h.Path()
			return string(p) == "/p" && string(q) == "q"
		}},
		{"GET http://h?q=/ HTTP/1.1\r\nHost: h\r\n\r\n", "", func(h *Head) bool {
			p, q := h.Path()
			return string(p) == "/" && string(q) == "q=/"
		}},
		{"GET /a?b=http://c/ HTTP/1.1\r\nHost: h\r\n\r\n", "", func(h *Head) bool {
			p, q := h.Path()
			return string(p) == "/a" && string(q) == "b=http://c/"
		}},
		{"M-SEARCH /\xc3\xa9 HTTP/1.1\r\nHost: [::1]:80\r\nX: \xc3\xa9\r\n\r\n", "", func(h *Head) bool {
			v, ok := h.Get("x")
			return ok && string(v) == "\xc3\xa9"
		}},
	} {
		h, left, err := request(c.text)
		if err != nil || left != c.left || !c.check(h) {
			t.Errorf("%q: %v, left %q, head %+v", c.text, err, left, h)
		}
	}
}

func TestAnswersAreReadToTheirEnd(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\n"
	for _, c := range []struct {
		method, text string
		kind         Kind
		left         int64
		close        bool
	}{
		{"GET", ok + "Content-Length: 5\r\n\r\n", Length, 5, false},
		{"HEAD", ok + "Content-Length: 5\r\n\r\n", None, 0, false},
		{"GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", None, 0, false},
		{"GET", "HTTP/1.1 204 No Content\r\n\r\n", None, 0, false},
		{"GET", "HTTP/1.1 100 Continue\r\n\r\n", None, 0, false},
		{"GET", ok + "Transfer-Encoding: chunked\r\n\r\n", Chunked, -1, false},
		{"GET", ok + "\r\n", UntilClose, -1, true},
		{"GET", "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n", Length, 5, true},
		{"GET", "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\n", Length, 5, false},
		{"GET", "HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", None, 0, false},
		{"GET", "HTTP/1.1 200 \r\nContent-Length: 0\r\nConnection: close\r\n\r\n", None, 0, true},
		{"GET", "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", Tunnel, -1, false},
		{"CONNECT", ok + "\r\n", Tunnel, -1, false},
		{"CONNECT", "HTTP/1.1 407 No\r\nContent-Length: 5\r\n\r\n", Length, 5, false},
	} {
		var s Scanner
		n, err := s.End([]byte(c.text))
		if err != nil || n != len(c.text) {
			t.Fatalf("%q: %d, %v", c.text, n, err)
		}
		var h Head
		if err := h.ParseResponse([]byte(c.text), []byte(c.method)); err != nil {
			t.Errorf("%q: %v", c.text, err)
			continue
		}
		if h.Body.Kind != c.kind || h.Body.Left() != c.left || h.Close != c.close {
			t.Errorf("%s %q: %+v", c.method, c.text, h)
		}
	}
	for text, rule := range map[string]string{
		"HTTP/1.1 20 OK\r\n\r\n":                                       "not a number",
		"HTTP/1.1 099 OK\r\n\r\n":                                      "status line",
		"HTTP/1.1 2000 OK\r\n\r\n":                                     "status line",
		"HTTP/1.1  200 OK\r\n\r\n":                                     "not a number",
		"HTTP/2 200 OK\r\n\r\n":                                        "status line",
		"ICY 200 OK\r\n\r\n":                                           "status line",
		"HTTP/1.1 200 O\x00K\r\n\r\n":                                  "status line",
		ok + "Content-Length: a\r\n\r\n":                               "not a number",
		ok + "Content-Length: 1\r\nContent-Length: 1\r\n\r\n":          "more than one",
		ok + "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n": "Transfer-Encoding and",
	} {
		var h Head
		if err := h.ParseResponse([]byte(text), []byte("GET")); err == nil || !strings.Contains(err.Error(), rule) {
			t.Errorf("%q: %v, want %q", text, err, rule)
		}
	}
}

// TestBytesMayComeOneByOne: where a buffer was cut makes no difference.
func TestBytesMayComeOneByOne(t *testing.T) {
	text := []byte(get + "Transfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0a\r\n0123456789\r\n0\r\nX: y\r\n\r\nnext")
	var s Scanner
	head := 0
	for i := range len(text) + 1 {
		n, err := s.End(text[:i])
		if err != nil {
			t.Fatal(err)
		}
		if n > 0 {
			head = n
			break
		}
	}
	var h Head
	if err := h.ParseRequest(text[:head]); err != nil {
		t.Fatal(err)
	}
	body, pos := h.Body, head
	for !body.Done() {
		n, err := body.Next(text[pos : pos+1])
		if n != 1 || err != nil {
			t.Fatalf("at %d: %d, %v", pos, n, err)
		}
		pos++
	}
	if string(text[pos:]) != "next" {
		t.Errorf("left %q", text[pos:])
	}
}

func TestALargeHeadIsRefused(t *testing.T) {
	for _, end := range []string{"\r\n\r\n", ""} {
		var s Scanner
		if _, err := s.End([]byte(get + "X: " + strings.Repeat("a", MaxHead) + end)); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%q: %v", end, err)
		}
	}
	var s Scanner
	fits := []byte(get + "X: " + strings.Repeat("a", MaxHead-len(get)-len("X: \r\n\r\n")) + "\r\n\r\n")
	if n, err := s.End(fits); n != MaxHead || err != nil {
		t.Errorf("%d, %v", n, err)
	}
}

func TestAHeadIsPassedOnAsItCame(t *testing.T) {
	none := func(*Head) {}
	for _, c := range []struct {
		promise, text string
		edit          func(*Head)
		hop           Hop
		want          string
	}{
		{"order, case and whitespace too", get + "x-B:  c \r\nX-a:d\r\n\r\n", none, Silent, get + "x-B:  c \r\nX-a:d\r\n\r\n"},
		{"but for what is for one hop", get + "Connection: close, x-Own\r\nX-own: 1\r\nKeep-Alive: 5\r\nProxy-Connection: x\r\nY: 2\r\n\r\n", none, Silent, get + "Y: 2\r\n\r\n"},
		{"an upgrade goes on", get + "Connection: Upgrade, x\r\nUpgrade: websocket\r\nX: 1\r\n\r\n", none, Close, get + "Upgrade: websocket\r\nConnection: upgrade\r\n\r\n"},
		{"an upgrade that Connection does not name is none", get + "Connection: x\r\nUpgrade: h2c\r\n\r\n", none, Silent, get + "\r\n"},
		{"an upgrade to HTTP/2 is none", get + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\nY: 2\r\n\r\n", none, Silent, get + "Y: 2\r\n\r\n"},
		{"what was added is not for one hop, whatever Connection names", get + "Connection: x, close\r\nX: y\r\n\r\n", func(h *Head) { h.Add("x", "z") }, Silent, get + "x: z\r\n\r\n"},
		{"with another target", "GET /a HTTP/1.0\r\nX: y\r\n\r\n", func(h *Head) { h.SetTarget([]byte("/b?c")) }, Silent, "GET /b?c HTTP/1.0\r\nX: y\r\n\r\n"},
		{"with other fields", get + "X: y\r\nZ: 1\r\nY:  1\r\n\r\n", func(h *Head) {
			h.Remove(1)
			h.Append(1, "2")
			h.Add("a", "b")
			h.Set(0, "c")
		}, Silent, "GET / HTTP/1.1\r\nHost: c\r\nZ: 1,2\r\nY:  1\r\na: b\r\n\r\n"},
		{"what Connection names goes, though the field itself was taken out", get + "Connection: x\r\nX: y\r\n\r\n", func(h *Head) { h.Remove(1) }, Silent, get + "\r\n"},
		{"asking for a close", get + "Connection: keep-alive\r\n\r\n", none, Close, get + "Connection: close\r\n\r\n"},
		{"asking for more", get + "\r\n", none, KeepAlive, get + "Connection: keep-alive\r\n\r\n"},
	} {
		h, _, err := request(c.text)
		if err != nil {
			t.Fatal(err)
		}
		c.edit(h)
		if got := string(h.AppendTo(nil, c.hop)); got != c.want {
			t.Errorf("%s: %q, want %q", c.promise, got, c.want)
		}
		if h.Unchanged(c.hop) != (c.want == c.text) {
			t.Errorf("%s: unchanged %v", c.promise, h.Unchanged(c.hop))
		}
	}
}

func BenchmarkRequest(b *testing.B) {
	text := []byte("GET /index.html HTTP/1.1\r\nHost: back.shop:8080\r\nUser-Agent: wrk\r\nAccept: */*\r\nX-Request-Id: 0123456789\r\n\r\n")
	var h Head
	b.ReportAllocs()
	for b.Loop() {
		var s Scanner
		n, err := s.End(text)
		if err != nil || n != len(text) {
			b.Fatal(err)
		}
		if err := h.ParseRequest(text); err != nil {
			b.Fatal(err)
		}
	}
}
