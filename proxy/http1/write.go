package http1

import "bytes"

// Edit is what is changed of a head while it is passed on. The zero value changes
// nothing but what concerns one hop alone.
type Edit struct {
	Target    []byte                 // of the request line; nil: as it was
	Drop      func(name []byte) bool // fields to leave out; nil: none
	Add       []Field                // fields to put at the end
	Close     bool                   // "Connection: close" is added
	KeepAlive bool                   // "Connection: keep-alive" is added
}

// Unchanged reports whether a head is passed on byte for byte.
func (h *Head) Unchanged(e *Edit) bool {
	return !h.hop && e.Target == nil && e.Drop == nil && len(e.Add) == 0 && !e.Close && !e.KeepAlive
}

// Raw is the head as it came.
func (h *Head) Raw() []byte { return h.raw }

// Append appends the head as it is passed on: without Connection, Keep-Alive,
// Proxy-Connection and the fields that Connection names (RFC 9110, section 7.6.1),
// but for an upgrade, which goes on to the next hop.
func (h *Head) Append(out []byte, e *Edit) []byte {
	if h.Unchanged(e) {
		return append(out, h.raw...)
	}
	if e.Target != nil {
		out = append(out, h.Method...)
		out = append(out, ' ')
		out = append(out, e.Target...)
		out = append(out, " HTTP/1."...)
		out = append(out, '0'+byte(h.Minor), '\r', '\n')
	} else {
		out = append(out, h.raw[:h.first]...)
	}
	for i := range h.Fields {
		f := &h.Fields[i]
		if h.hop && h.forThisHop(f.Name) || e.Drop != nil && e.Drop(f.Name) {
			continue
		}
		out = append(out, h.raw[f.line.start:f.line.end]...)
	}
	for i := range e.Add {
		out = AppendField(out, e.Add[i].Name, e.Add[i].Value)
	}
	switch {
	case h.Upgrade:
		out = append(out, "Connection: upgrade\r\n"...)
	case e.Close:
		out = append(out, "Connection: close\r\n"...)
	case e.KeepAlive:
		out = append(out, "Connection: keep-alive\r\n"...)
	}
	return append(out, '\r', '\n')
}

// AppendField appends a field line.
func AppendField(out, name, value []byte) []byte {
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
	for i := range h.Fields {
		if Is(h.Fields[i].Name, "connection") && names(h.Fields[i].Value, name) {
			return true
		}
	}
	return false
}

// names reports whether a list has name in it, in any case.
func names(list, name []byte) bool {
	for len(list) > 0 {
		var option []byte
		option, list, _ = bytes.Cut(list, comma)
		if equalFold(trim(option), name) {
			return true
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
