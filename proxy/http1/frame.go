package http1

import (
	"bytes"
	"math"
)

// frameRequest finds out how a request goes on (RFC 9112, section 6.3), and
// refuses fields that contradict each other or themselves.
func (h *Head) frameRequest() error {
	length, chunked, err := h.framing()
	if err != nil {
		return err
	}
	switch {
	case h.Host == nil && h.Minor == 1:
		return broken("the request has no Host")
	case chunked:
		h.Body = Body{Kind: Chunked}
	case length > 0:
		h.Body = Body{Kind: Length, left: length}
	}
	if string(h.Method) == "CONNECT" && h.Body.Kind != None {
		return broken("a CONNECT with a body")
	}
	if h.Minor == 0 {
		h.Close = !h.KeepAlive
		h.Expect = false // RFC 9110, section 10.1.1
	}
	return nil
}

// frameResponse does so for the answer to a request with that method.
func (h *Head) frameResponse(method []byte) error {
	length, chunked, err := h.framing()
	if err != nil {
		return err
	}
	if h.Minor == 0 {
		h.Close = h.Close || !h.KeepAlive
	}
	switch {
	case h.Status == 101 || h.Status/100 == 2 && string(method) == "CONNECT":
		h.Body = Body{Kind: Tunnel}
	case h.Status/100 == 1, h.Status == 204, h.Status == 304, string(method) == "HEAD":
	case chunked:
		h.Body = Body{Kind: Chunked}
	case length > 0:
		h.Body = Body{Kind: Length, left: length}
	case length < 0:
		h.Body = Body{Kind: UntilClose}
		h.Close = true
	}
	return nil
}

// framing reads the fields that matter to a proxy. The length is -1 without
// Content-Length.
func (h *Head) framing() (int64, bool, error) {
	length, chunked, upgrade, to2 := int64(-1), false, false, false
	for i := range h.Fields {
		f := &h.Fields[i]
		switch len(f.Name) {
		case len("host"):
			if !Is(f.Name, "host") {
				continue
			}
			if h.Host != nil {
				return 0, false, broken("there is more than one Host")
			}
			if !isHost(f.Value) {
				return 0, false, broken("the Host has a character that no host has")
			}
			if h.Host = f.Value; h.Host == nil {
				h.Host = empty
			}
		case len("expect"):
			h.Expect = h.Expect || Is(f.Name, "expect") && fold(f.Value, "100-continue")
		case len("upgrade"):
			if Is(f.Name, "upgrade") {
				upgrade, to2 = true, to2 || listed([][]byte{f.Value}, h2c)
			}
		case len("connection"): // as long as "keep-alive"
			if Is(f.Name, "keep-alive") {
				h.hop = true
			}
			if Is(f.Name, "connection") {
				if err := h.connection(f.Value); err != nil {
					return 0, false, err
				}
			}
		case len("content-length"):
			if !Is(f.Name, "content-length") {
				continue
			}
			if length >= 0 {
				return 0, false, broken("there is more than one Content-Length")
			}
			var ok bool
			if length, ok = number(f.Value); !ok {
				return 0, false, broken("the Content-Length is not a number")
			}
		case len("proxy-connection"):
			if Is(f.Name, "proxy-connection") {
				h.hop = true
			}
		case len("transfer-encoding"):
			if !Is(f.Name, "transfer-encoding") {
				continue
			}
			if chunked || !fold(f.Value, "chunked") {
				return 0, false, broken(`the Transfer-Encoding is not "chunked"`)
			}
			chunked = true
		}
	}
	h.Upgrade = h.Upgrade && upgrade && !to2
	switch {
	case chunked && length >= 0:
		return 0, false, broken("there are Transfer-Encoding and Content-Length")
	case chunked && h.Minor == 0:
		return 0, false, broken("there is a Transfer-Encoding in HTTP/1.0")
	}
	return length, chunked, nil
}

var empty = []byte{}

// h2c is an upgrade that is none here (RFC 9113 has taken it back): what followed would
// be requests that nobody looks at.
var h2c = []byte("h2c")

// connection reads a Connection field. Fields that frame or address the message
// are not for one hop alone, whoever says so.
func (h *Head) connection(value []byte) error {
	h.hop = true
	h.options = append(h.options, value)
	for len(value) > 0 {
		var option []byte
		option, value, _ = bytes.Cut(value, comma)
		switch option = trim(option); {
		case fold(option, "close"):
			h.Close = true
		case fold(option, "keep-alive"):
			h.KeepAlive = true
		case fold(option, "upgrade"):
			h.Upgrade = true
		case fold(option, "host"), fold(option, "content-length"), fold(option, "transfer-encoding"):
			return broken("Connection names %s", option)
		case len(option) > 0 && !isToken(option):
			return broken("the Connection field is not a list of names")
		}
	}
	return nil
}

var comma = []byte(",")

// number reads digits and nothing else.
func number(text []byte) (int64, bool) {
	if len(text) == 0 {
		return 0, false
	}
	var n int64
	for _, c := range text {
		if c < '0' || c > '9' || n > (math.MaxInt64-9)/10 {
			return 0, false
		}
		n = n*10 + int64(c-'0')
	}
	return n, true
}

// fold reports whether text, of any case, is want in lower case.
func fold(text []byte, want string) bool { return Is(text, want) }

// trim takes off spaces and tabs.
func trim(text []byte) []byte {
	for len(text) > 0 && (text[0] == ' ' || text[0] == '\t') {
		text = text[1:]
	}
	for len(text) > 0 && (text[len(text)-1] == ' ' || text[len(text)-1] == '\t') {
		text = text[:len(text)-1]
	}
	return text
}

// Classes of bytes.
const (
	token  = 1 << iota // RFC 9110, section 5.6.2
	value              // field values: all but controls, with tab; from 0x80 up, too
	target             // request targets: no space, no control
	host               // RFC 3986: reg-name, IP literals, port
)

// class has the classes of each byte, lower its lower case.
var class, lower = classify()

func classify() ([256]uint8, [256]byte) {
	var class [256]uint8
	var lower [256]byte
	for c := range 256 {
		lower[c] = byte(c)
		alnum := false
		switch {
		case 'A' <= c && c <= 'Z':
			lower[c] = byte(c) + 'a' - 'A'
			alnum = true
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9':
			alnum = true
		}
		if alnum || c < 0x80 && bytes.IndexByte([]byte("!#$%&'*+-.^_`|~"), byte(c)) >= 0 {
			class[c] |= token
		}
		if alnum || c < 0x80 && bytes.IndexByte([]byte("-._~%!$&'()*+,;=:[]"), byte(c)) >= 0 {
			class[c] |= host
		}
		if c == '\t' || c >= ' ' && c != 0x7f {
			class[c] |= value
		}
		if c > ' ' && c != 0x7f {
			class[c] |= target
		}
	}
	return class, lower
}

func all(text []byte, bit uint8) bool {
	for _, c := range text {
		if class[c]&bit == 0 {
			return false
		}
	}
	return true
}

func isToken(text []byte) bool  { return len(text) > 0 && all(text, token) }
func isValue(text []byte) bool  { return all(text, value) }
func isTarget(text []byte) bool { return all(text, target) }
func isHost(text []byte) bool   { return all(text, host) }
