// Package sniff tells by a connection's first bytes what it carries. Pure: who
// reads the bytes, and for how long, is package relay's business.
package sniff

import "bytes"

// Protocol is what a connection carries.
type Protocol uint8

// The protocols.
const (
	Undecided Protocol = iota // more bytes are needed
	Opaque                    // nothing that is known here: passed on as it is
	HTTP1
	HTTP2
)

// MaxLine is how much of a request line is looked at, in bytes: one that is longer
// is none.
const MaxLine = 8 << 10

// maxMethod bounds the method of what is to pass for HTTP.
const maxMethod = 32

// preface begins every HTTP/2 connection (RFC 9113, section 3.4).
var preface = []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")

// Look decides on the first bytes of a connection. A request line counts once it
// is complete, with its version: other protocols of lines (SMTP, Redis, memcached)
// begin like one. TLS is passed on as it is, like everything unknown.
func Look(first []byte) Protocol {
	switch {
	case len(first) == 0:
		return Undecided
	case first[0] == preface[0] && bytes.HasPrefix(preface, first):
		return Undecided
	case bytes.HasPrefix(first, preface):
		return HTTP2
	}
	end := bytes.IndexByte(first, '\n')
	line := first
	if end >= 0 {
		line = first[:end]
	}
	method := 0
	for method < len(line) && line[method] != ' ' {
		if !isMethod(line[method]) || method == maxMethod {
			return Opaque
		}
		method++
	}
	switch {
	case end < 0 && len(first) < MaxLine:
		return Undecided
	case end < 0, method == 0, method == len(line):
		return Opaque
	}
	version := bytes.TrimSuffix(line, []byte("\r"))
	if i := bytes.LastIndexByte(version, ' '); i > method && bytes.HasPrefix(version[i+1:], []byte("HTTP/1.")) {
		return HTTP1
	}
	return Opaque
}

// isMethod is for the methods there are: letters, in practice capital ones, and "-".
func isMethod(c byte) bool {
	return 'A' <= c && c <= 'Z' || c == '-' || c == '_'
}

// Of a frame of SETTINGS, in bytes (RFC 9113, sections 4.1, 4.2 and 6.5.1).
const (
	frameHead = 9
	setting   = 6
	maxFrame  = 1 << 14 // of what is not told otherwise
)

// SpeaksHTTP2 reports whether the first bytes of a server that speaks first are
// HTTP/2's: its SETTINGS (RFC 9113, section 3.4). Many servers do not wait with them
// until their client has spoken.
func SpeaksHTTP2(first []byte) bool {
	if len(first) < frameHead {
		return false
	}
	length := int(first[0])<<16 | int(first[1])<<8 | int(first[2])
	const settings = "\x04\x00\x00\x00\x00\x00" // type, no flags, of no stream
	return length <= maxFrame && length%setting == 0 && string(first[3:frameHead]) == settings
}
