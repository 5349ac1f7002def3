// Package http1 reads HTTP/1.0 and 1.1 messages as they pass through a proxy: it
// finds where a message's head and body end, and refuses what two readers could
// take for two different messages. A state machine over bytes: it reads and
// writes no socket, keeps no copy, and leaves every byte as it came.
//
// What is refused is what RFC 9112 and 9110 forbid, and what they leave to the
// recipient's kindness: a bare LF or CR, obs-fold, whitespace around a field's
// name, Content-Length repeated or together with Transfer-Encoding, any transfer
// coding but "chunked". Bytes from 0x80 up are let by in targets and values.
package http1

import (
	"bytes"
	"errors"
	"fmt"
)

// MaxHead bounds a head, and a trailer section, in bytes.
const MaxHead = 64 << 10

// ErrTooLarge is a head over MaxHead: 431.
var ErrTooLarge = fmt.Errorf("the head of the message is larger than %d bytes", MaxHead)

// Error is a message that breaks a rule of HTTP, which the text names.
type Error struct{ Rule string }

func (e *Error) Error() string { return e.Rule }

func broken(format string, args ...any) error { return &Error{fmt.Sprintf(format, args...)} }

// Field is a field line of a head. Both are parts of the buffer that was read.
type Field struct {
	Name, Value []byte // the value without the whitespace around it
	line        span   // with its CR LF, in Head.raw; none: it did not come so
	set         bool   // it was put in: no field that came says anything of it
}

type span struct{ start, end int }

// Head is the head of one message. Its slices are parts of the buffer that it was
// read from and hold as long as that does. A Head is to be used again, for the
// sake of its memory.
type Head struct {
	Method, Target []byte // of a request
	Status         int    // of a response
	Minor          int    // of the version: HTTP/1.Minor
	Fields         []Field

	Host       []byte // a request's; nil if it has none
	Connection        // what the sender says of the connection
	Body       Body   // how the message goes on
	Expect     bool   // a request waits for 100 (Continue)

	raw     []byte
	first   int      // where the fields begin in raw; 0: the first line is another
	edited  bool     // the fields, or the target, are not as they came
	options [][]byte // the Connection fields' values
}

// Connection is what a head says of the connection it is on.
type Connection struct {
	Close     bool // it ends after this message
	KeepAlive bool // asked for explicitly: of meaning in HTTP/1.0
	Upgrade   bool // "Connection: upgrade" with an Upgrade field
	hop       bool // there are fields for this hop alone
}

// Scanner finds the end of a head in a buffer that fills up, looking at each byte
// once. The zero value is at the beginning of a message.
type Scanner struct {
	pos  int // looked at so far
	line int // where the current line begins
}

// End returns the length of the head at the beginning of buf with its empty line,
// or 0 if it is not complete. buf must begin with what it began with in the call
// before. The error is an *Error, or ErrTooLarge.
func (s *Scanner) End(buf []byte) (int, error) {
	for s.pos < len(buf) {
		i := bytes.IndexByte(buf[s.pos:], '\n')
		if i < 0 {
			s.pos = len(buf)
			break
		}
		lf := s.pos + i
		if lf == s.line || buf[lf-1] != '\r' {
			return 0, broken("a line ends in LF without CR")
		}
		s.pos = lf + 1
		if lf == s.line+1 {
			if s.line == 0 {
				return 0, broken("an empty line in place of a message")
			}
			if s.pos > MaxHead {
				return 0, ErrTooLarge
			}
			return s.pos, nil
		}
		s.line = s.pos
	}
	if len(buf) > MaxHead {
		return 0, ErrTooLarge
	}
	return 0, nil
}

// ParseRequest reads a whole head, as long as Scanner.End says. The error is an
// *Error.
func (h *Head) ParseRequest(head []byte) error {
	h.reset(head)
	end := bytes.IndexByte(head, '\n') - 1 // Scanner has seen the CR
	line := head[:end]
	i := bytes.IndexByte(line, ' ')
	if i <= 0 || !isToken(line[:i]) {
		return broken("the request line has no method")
	}
	h.Method = line[:i]
	rest := line[i+1:]
	i = bytes.IndexByte(rest, ' ')
	if i <= 0 {
		return broken("the request line is not METHOD TARGET VERSION")
	}
	h.Target = rest[:i]
	if !isTarget(h.Target) {
		return broken("the target has a control character")
	}
	if err := h.version(rest[i+1:]); err != nil {
		return err
	}
	if err := h.fields(end + 2); err != nil {
		return err
	}
	return h.frameRequest()
}

// ParseResponse reads a whole head, as long as Scanner.End says, of the answer to
// a request with that method. The error is an *Error.
func (h *Head) ParseResponse(head []byte, method []byte) error {
	h.reset(head)
	end := bytes.IndexByte(head, '\n') - 1 // Scanner has seen the CR
	line := head[:end]
	const code = len("HTTP/1.1 ")
	if len(line) < code+3 || line[code-1] != ' ' {
		return broken("the status line is not VERSION CODE REASON")
	}
	if err := h.version(line[:code-1]); err != nil {
		return err
	}
	for _, c := range line[code : code+3] {
		if c < '0' || c > '9' {
			return broken("the status code is not a number")
		}
		h.Status = h.Status*10 + int(c-'0')
	}
	reason := line[code+3:]
	if h.Status < 100 || len(reason) > 0 && (reason[0] != ' ' || !isValue(reason)) {
		return broken("the status line is not VERSION CODE REASON")
	}
	if err := h.fields(end + 2); err != nil {
		return err
	}
	return h.frameResponse(method)
}

func (h *Head) reset(head []byte) {
	*h = Head{Fields: h.Fields[:0], options: h.options[:0], raw: head}
}

func (h *Head) version(v []byte) error {
	switch string(v) {
	case "HTTP/1.1":
		h.Minor = 1
	case "HTTP/1.0":
	default:
		return broken("the version is neither HTTP/1.1 nor HTTP/1.0")
	}
	return nil
}

// fields reads the field lines, from the byte after the first line on.
func (h *Head) fields(pos int) error {
	h.first = pos
	raw := h.raw
	for {
		i := bytes.IndexByte(raw[pos:], '\n')
		if i < 0 {
			return errors.New("http1: the head has no end") // Scanner.End was not asked
		}
		line := raw[pos : pos+i-1] // Scanner has seen the CR
		if len(line) == 0 {
			return nil
		}
		colon := bytes.IndexByte(line, ':')
		if colon < 0 || !isToken(line[:colon]) {
			if line[0] == ' ' || line[0] == '\t' {
				return broken("a field goes on on a second line (obs-fold)")
			}
			return broken("a field line does not begin with NAME:")
		}
		value := trim(line[colon+1:])
		if !isValue(value) {
			return broken("the field %s has a control character", line[:colon])
		}
		h.Fields = append(h.Fields, Field{Name: line[:colon], Value: value, line: span{pos, pos + i + 1}})
		pos += i + 1
	}
}

// Get returns the value of the first field of that name, which is in lower case.
func (h *Head) Get(name string) ([]byte, bool) {
	for i := range h.Fields {
		if Is(h.Fields[i].Name, name) {
			return h.Fields[i].Value, true
		}
	}
	return nil, false
}

// Path splits a request's target into path and query (without "?"), whatever the
// target's form: "/a?b", "http://host/a?b", "*". An empty path is "/".
func (h *Head) Path() ([]byte, []byte) {
	target, query := h.Target, []byte(nil)
	if i := bytes.Index(target, []byte("://")); i > 0 && target[0] != '/' {
		target = target[i+3:]
		if i := bytes.IndexAny(target, "/?#"); i >= 0 {
			target = target[i:]
		} else {
			target = nil
		}
	}
	if i := bytes.IndexByte(target, '?'); i >= 0 {
		target, query = target[:i], target[i+1:]
	}
	if len(target) == 0 {
		target = slash
	}
	return target, query
}

var slash = []byte("/")

// Is reports whether a field's name, of any case, is name in lower case.
func Is(field []byte, name string) bool {
	if len(field) != len(name) {
		return false
	}
	for i := range len(name) {
		if lower[field[i]] != name[i] {
			return false
		}
	}
	return true
}
