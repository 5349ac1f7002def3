// Package trace finds out which trace a request is of: from W3C's traceparent
// field, or where there is no valid one, from B3's, the single one before the many.
// Pure: it makes no spans and no IDs. A request of no trace stays without one.
//
// It does not read tracestate and baggage: what it need not change passes by.
package trace

// Context is the span that a request was sent in. The zero value is "of no trace".
type Context struct {
	Trace   [16]byte
	Span    [8]byte
	Sampled bool
	W3C     bool // it was said in W3C's way
}

// Known reports whether the request is of a trace.
func (c Context) Known() bool { return c.Trace != [16]byte{} }

// Request is what is read of a request.
type Request interface {
	// Header is the value of the first field of that lower-case name; false: there
	// is none.
	Header(name string) ([]byte, bool)
}

// Of reads a request. Fields that are not well formed count as not there.
func Of(r Request) Context {
	if value, ok := r.Header(Header); ok {
		if c := parseW3C(value); c.Known() {
			return c
		}
	}
	if value, ok := r.Header("b3"); ok {
		if c := parseB3(value); c.Known() {
			return c
		}
	}
	id, ok := r.Header("x-b3-traceid")
	if !ok {
		return Context{}
	}
	span, _ := r.Header("x-b3-spanid")
	sampled, _ := r.Header("x-b3-sampled")
	flags, _ := r.Header("x-b3-flags")
	// Old senders say "true"; "1" in the flags is debug, which implies sampled.
	return newB3(id, span, string(sampled) == "1" || string(sampled) == "true" || string(flags) == "1")
}

// Header is the name of W3C's field.
const Header = "traceparent"

// length of a traceparent of version 00.
const length = len("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")

// parseW3C reads a traceparent (W3C Trace Context, section 3.2.2). One of a later
// version may go on after a "-" (section 3.2.4).
func parseW3C(value []byte) Context {
	if len(value) < length || value[2] != '-' || value[35] != '-' || value[52] != '-' {
		return Context{}
	}
	var c Context
	var version, flags [1]byte
	if !hex(version[:], value[:2]) || !hex(c.Trace[:], value[3:35]) || !hex(c.Span[:], value[36:52]) || !hex(flags[:], value[53:55]) {
		return Context{}
	}
	switch {
	case version[0] == 0xff, version[0] == 0 && len(value) > length, len(value) > length && value[length] != '-', c.Span == [8]byte{}:
		return Context{}
	}
	c.Sampled, c.W3C = flags[0]&1 != 0, true
	return c
}

// parseB3 reads "TRACE-SPAN", "TRACE-SPAN-STATE" or "TRACE-SPAN-STATE-PARENT"
// (openzipkin/b3-propagation). The state alone is of no trace.
func parseB3(value []byte) Context {
	var part [4][]byte
	n := 0
	for start, i := 0, 0; i <= len(value); i++ {
		if i < len(value) && value[i] != '-' {
			continue
		}
		if n == len(part) {
			return Context{}
		}
		part[n] = value[start:i]
		n++
		start = i + 1
	}
	state := part[2]
	if n > 2 && string(state) != "0" && string(state) != "1" && string(state) != "d" {
		return Context{}
	}
	if n > 3 && !hex(make([]byte, 8), part[3]) {
		return Context{}
	}
	return newB3(part[0], part[1], string(state) == "1" || string(state) == "d")
}

// newB3 takes a trace of 64 bits as one of 128, as W3C has it (section 5.1 there).
func newB3(id, span []byte, sampled bool) Context {
	c := Context{Sampled: sampled}
	into := c.Trace[:]
	if len(id) == 16 {
		into = c.Trace[8:]
	}
	if !hex(into, id) || !hex(c.Span[:], span) || c.Span == [8]byte{} || !c.Known() {
		return Context{}
	}
	return c
}

// hex decodes text, all of it, into out, which it must fill. Only lower case is hex
// here, as both specifications have it.
func hex(out, text []byte) bool {
	if len(text) != 2*len(out) {
		return false
	}
	for i := range out {
		high, low := digit(text[2*i]), digit(text[2*i+1])
		if high > 15 || low > 15 {
			return false
		}
		out[i] = high<<4 | low
	}
	return true
}

func digit(c byte) byte {
	switch {
	case '0' <= c && c <= '9':
		return c - '0'
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10
	}
	return 0xff
}

// Traceparent is the context as the value of W3C's field.
func (c Context) Traceparent() string {
	const digits = "0123456789abcdef"
	out := make([]byte, 0, length)
	write := func(bytes []byte) {
		for _, b := range bytes {
			out = append(out, digits[b>>4], digits[b&15])
		}
	}
	out = append(out, "00-"...)
	write(c.Trace[:])
	out = append(out, '-')
	write(c.Span[:])
	if c.Sampled {
		return string(append(out, "-01"...))
	}
	return string(append(out, "-00"...))
}
