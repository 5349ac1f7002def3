package sniff

import (
	"strings"
	"testing"
)

func TestProtocolsAreToldByTheirFirstBytes(t *testing.T) {
	for _, c := range []struct {
		name, first string
		want        Protocol
	}{
		{"nothing yet", "", Undecided},
		{"a request", "GET /a?b HTTP/1.1\r\n", HTTP1},
		{"an old request", "GET / HTTP/1.0\r\nX: y\r\n\r\n", HTTP1},
		{"a request that the parser will refuse", "GET / HTTP/1.1\nHost: a\n\n", HTTP1},
		{"a request for a proxy", "CONNECT a:443 HTTP/1.1\r\n", HTTP1},
		{"a method with a hyphen", "M-SEARCH * HTTP/1.1\r\n", HTTP1},
		{"half a request line", "GET /a HTTP/1", Undecided},
		{"half a method", "PO", Undecided},
		{"HTTP/2", string(preface) + "\x00\x00", HTTP2},
		{"half of HTTP/2's preface", "PRI * HTTP/2.0\r\n\r\nS", Undecided},
		{"HTTP/2's preface gone wrong", "PRI * HTTP/2.0\r\n\r\nXX", Opaque},
		{"TLS", "\x16\x03\x01\x02\x00", Opaque},
		{"Redis", "*1\r\n$4\r\nPING\r\n", Opaque},
		{"Redis, inline", "GET key\r\n", Opaque},
		{"memcached", "get a\r\n", Opaque},
		{"SMTP", "EHLO example.com\r\n", Opaque},
		{"HTTP/0.9", "GET /\r\n", Opaque},
		{"PostgreSQL", "\x00\x00\x00\x08\x04\xd2\x16\x2f", Opaque},
		{"a word alone", "PING\r\n", Opaque},
		{"a line without end", "GET /" + strings.Repeat("a", MaxLine), Opaque},
		{"a long method", strings.Repeat("A", maxMethod+1), Opaque},
		{"an empty line", "\r\nGET / HTTP/1.1\r\n", Opaque},
	} {
		if got := Look([]byte(c.first)); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}

func TestAServerOfHTTP2IsToldByItsSettings(t *testing.T) {
	for _, c := range []struct {
		name, first string
		want        bool
	}{
		{"SETTINGS without any", "\x00\x00\x00\x04\x00\x00\x00\x00\x00", true},
		{"SETTINGS, and what follows", "\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x05\x00\x00\x40\x00", true},
		{"half a head", "\x00\x00\x06\x04\x00\x00\x00\x00", false},
		{"half a setting", "\x00\x00\x07\x04\x00\x00\x00\x00\x00", false},
		{"too many settings", "\x00\x40\x02\x04\x00\x00\x00\x00\x00", false},
		{"SETTINGS that are acknowledged", "\x00\x00\x00\x04\x01\x00\x00\x00\x00", false},
		{"SETTINGS of a stream", "\x00\x00\x00\x04\x00\x00\x00\x00\x01", false},
		{"another frame", "\x00\x00\x06\x06\x00\x00\x00\x00\x00", false},
		{"MySQL", "\x4a\x00\x00\x00\x0a8.0.36\x00", false},
		{"SMTP", "220 example.com ESMTP\r\n", false},
		{"SSH", "SSH-2.0-OpenSSH_9.2\r\n", false},
		{"nothing", "", false},
	} {
		if got := SpeaksHTTP2([]byte(c.first)); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

// FuzzLook: more bytes never change what was decided.
func FuzzLook(f *testing.F) {
	f.Add([]byte("GET / HTTP/1.1\r\n"))
	f.Add(preface)
	f.Fuzz(func(t *testing.T, in []byte) {
		decided := Undecided
		for i := range len(in) + 1 {
			got := Look(in[:i])
			if decided != Undecided && got != decided {
				t.Fatalf("%q is %d, %q is %d", in[:i-1], decided, in[:i], got)
			}
			decided = got
		}
	})
}
