package route

import (
	"bytes"
	"math/bits"
)

// Request is what matches look at.
type Request interface {
	Method() []byte
	Path() []byte  // in its canonical form (CanonicalPath), without the query
	Query() []byte // as it came, without the question mark

	// Header is the value of the first field of that lower-case name; false: there
	// is none.
	Header(name string) ([]byte, bool)
}

// Match finds the rule that governs a request, and the match of it that was met,
// the first one. nil, nil: none is. It allocates nothing, unless a regular
// expression is to be held against an escaped query parameter.
func (r *Routes) Match(req Request) (*Rule, *Match) {
	path := req.Path()
	for i := range r.Matches {
		if m := &r.Matches[i]; m.meets(req, path) {
			return &r.Rules[m.Rule], m
		}
	}
	return nil, nil
}

// meets has the conditions in the order of what they cost.
func (m *Match) meets(req Request, path []byte) bool {
	if !m.Path.meets(path) || m.Method != "" && string(req.Method()) != m.Method || m.GRPC != nil && !m.GRPC.meets(path) {
		return false
	}
	for i := range m.Headers {
		if v := &m.Headers[i]; !repeated(m.Headers[:i], v.Name) {
			if value, ok := req.Header(v.Name); !ok || !v.meets(value) {
				return false
			}
		}
	}
	for i := range m.Query {
		if v := &m.Query[i]; !repeated(m.Query[:i], v.Name) && !v.meetsQuery(req.Query()) {
			return false
		}
	}
	return true
}

// repeated reports whether an entry of that name went before: only the first of a
// name counts.
func repeated(before []Value, name string) bool {
	for i := range before {
		if before[i].Name == name {
			return true
		}
	}
	return false
}

// UnderPrefix reports whether a path begins with all elements of a prefix, which has no
// slash at its end: that of "/" is empty, and every path is under it.
func UnderPrefix(path []byte, prefix string) bool {
	n := len(prefix)
	return n == 0 || len(path) >= n && string(path[:n]) == prefix && (len(path) == n || path[n] == '/')
}

func (p *Path) meets(path []byte) bool {
	switch p.Kind {
	case PathExact:
		return string(path) == p.Value
	case PathPrefix:
		return UnderPrefix(path, p.Value)
	case PathRegexp:
		return p.Regexp.Match(path)
	}
	return true
}

// meets takes a path of gRPC apart: "/" service "/" method.
func (m *Method) meets(path []byte) bool {
	last := bytes.LastIndexByte(path, '/')
	if last < 1 || path[0] != '/' {
		return false
	}
	return meets(path[1:last], m.Service, m.ServiceRegexp) && meets(path[last+1:], m.Method, m.MethodRegexp)
}

func meets(text []byte, want string, expression *Regexp) bool {
	if expression != nil {
		return expression.Match(text)
	}
	return want == "" || string(text) == want
}

func (v *Value) meets(value []byte) bool {
	if v.Regexp != nil {
		return v.Regexp.Match(value)
	}
	return string(value) == v.Value
}

// meetsQuery looks at the first parameter of the name, in a query as forms write it
// (application/x-www-form-urlencoded of the URL Standard): an escape that is none
// stands for itself.
func (v *Value) meetsQuery(query []byte) bool {
	for len(query) > 0 {
		var parameter []byte
		parameter, query, _ = bytes.Cut(query, []byte{'&'})
		if len(parameter) == 0 {
			continue // as in "a=1&&b=2": no parameter
		}
		name, value, _ := bytes.Cut(parameter, []byte{'='})
		if !formEqual(name, v.Name) {
			continue
		}
		if v.Regexp == nil {
			return formEqual(value, v.Value)
		}
		if bytes.ContainsAny(value, "%+") {
			value = formDecode(value)
		}
		return v.Regexp.Match(value)
	}
	return false
}

// formEqual compares an encoded text with a plain one.
func formEqual(encoded []byte, plain string) bool {
	for len(encoded) > 0 {
		c, n := formByte(encoded)
		if plain == "" || plain[0] != c {
			return false
		}
		encoded, plain = encoded[n:], plain[1:]
	}
	return plain == ""
}

func formDecode(encoded []byte) []byte {
	out := make([]byte, 0, len(encoded))
	for len(encoded) > 0 {
		c, n := formByte(encoded)
		out = append(out, c)
		encoded = encoded[n:]
	}
	return out
}

// formByte is the first byte of an encoded text, and how many it was written in.
func formByte(encoded []byte) (byte, int) {
	switch encoded[0] {
	case '+':
		return ' ', 1
	case '%':
		if c, ok := unescape(encoded); ok {
			return c, 3
		}
	}
	return encoded[0], 1
}

// Choose picks a backend by its share of the rule's requests, with n drawn evenly
// from all of uint32. nil: none has a share, which is to be answered 500.
func (r *Rule) Choose(n uint32) *WeightedBackend {
	var sum uint64
	for i := range r.Backends {
		sum += uint64(r.Backends[i].Weight)
	}
	position := share(n, sum)
	for i := range r.Backends {
		weight := uint64(r.Backends[i].Weight)
		if position < weight {
			return &r.Backends[i]
		}
		position -= weight
	}
	return nil
}

// Meant reports whether a request is one of those to copy, with n drawn evenly from
// all of uint32.
func (m *Mirror) Meant(n uint32) bool {
	return share(n, uint64(m.Denominator)) < uint64(m.Numerator)
}

// share maps all of uint32 to [0, parts): to each part as many numbers as to any
// other, give or take one.
func share(n uint32, parts uint64) uint64 {
	part, _ := bits.Mul64(uint64(n)<<32, parts)
	return part
}
