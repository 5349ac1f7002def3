package http1

import (
	"bytes"
	"slices"
)

// Raw is the head as it came.
func (h *Head) Raw() []byte { return h.raw }

// Len, Is, Set, Append, Remove and Add change the fields, as route.Fields has it.
// What is said in Host, Connection and Body is of the fields as they came.

// Len is how many fields there are.
func (h *Head) Len() int { return len(h.Fields) }

// Is reports whether field i has a name, which is in lower case.
func (h *Head) Is(i int, name string) bool { return Is(h.Fields[i].Name, name) }

// Value is that of field i, without the whitespace around it.
func (h *Head) Value(i int) []byte { return h.Fields[i].Value }

// Set gives field i another value.
func (h *Head) Set(i int, value string) {
	h.edited = true
	h.Fields[i].Value, h.Fields[i].line = []byte(value), span{}
}

// Append appends to the value of field i, after a comma.
func (h *Head) Append(i int, value string) {
	h.Set(i, string(h.Fields[i].Value)+","+value)
}

// Remove removes field i.
func (h *Head) Remove(i int) {
	h.edited = true
	h.Fields = slices.Delete(h.Fields, i, i+1)
}

// Add adds a field after the last one.
func (h *Head) Add(name, value string) {
	h.edited = true
	h.Fields = append(h.Fields, Field{Name: []byte(name), Value: []byte(value), set: true})
}

// SetTarget gives a request another target.
func (h *Head) SetTarget(target []byte) {
	h.edited, h.Target, h.first = true, target, 0
}

// Hop is what is said to the next hop of the connection to it.
type Hop uint8

// What may be said.
const (
	Silent    Hop = iota // nothing
	Close                // "Connection: close"
	KeepAlive            // "Connection: keep-alive", which HTTP/1.0 needs
)

// Unchanged reports whether a head goes on byte for byte.
func (h *Head) Unchanged(hop Hop) bool { return !h.hop && !h.edited && hop == Silent }

// AppendTo appends the head as it is passed on: without Connection, Keep-Alive,
// Proxy-Connection and the fields that Connection names (RFC 9110, section 7.6.1),
// but for an upgrade, which goes on to the next hop, and for fields that were added:
// no sender can have meant those.
func (h *Head) AppendTo(out []byte, hop Hop) []byte {
	if h.Unchanged(hop) {
		return append(out, h.raw...)
	}
	if h.first == 0 {
		out = append(out, h.Method...)
		out = append(out, ' ')
		out = append(out, h.Target...)
		out = append(out, " HTTP/1."...)
		out = append(out, '0'+byte(h.Minor), '\r', '\n')
	} else {
		out = append(out, h.raw[:h.first]...)
	}
	for i := range h.Fields {
		f := &h.Fields[i]
		switch {
		case h.hop && !f.set && h.forThisHop(f.Name):
		case f.line.end > 0:
			out = append(out, h.raw[f.line.start:f.line.end]...)
		default:
			out = AppendField(out, f.Name, f.Value)
		}
	}
	switch {
	case h.Upgrade:
		out = append(out, "Connection: upgrade\r\n"...)
	case hop == Close:
		out = append(out, "Connection: close\r\n"...)
	case hop == KeepAlive:
		out = append(out, "Connection: keep-alive\r\n"...)
	}
	return append(out, '\r', '\n')
}

// AppendField appends a field line.
func AppendField[B []byte | string](out []byte, name, value B) []byte {
	out = append(out, name...)
	out = append(out, ':', ' ')
	out = append(out, value...)
	return append(out, '\r', '\n')
}

// forThisHop reports whether a field is not to be passed on.
func (h *Head) forThisHop(name []byte) bool {
	switch {
	case Is(name, "connection"), Is(name, "keep-alive"), Is(name, "proxy-connection"):
		return true
	case Is(name, "upgrade"):
		return !h.Upgrade
	}
	return listed(h.options, name)
}

// listed reports whether name is in one of the lists, in any case.
func listed(lists [][]byte, name []byte) bool {
	for _, list := range lists {
		for len(list) > 0 {
			var option []byte
			option, list, _ = bytes.Cut(list, comma)
			if equalFold(trim(option), name) {
				return true
			}
		}
	}
	return false
}

func equalFold(a, b []byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if lower[a[i]] != lower[b[i]] {
			return false
		}
	}
	return true
}
