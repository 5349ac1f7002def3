package route

import (
	"bytes"
	"strings"
)

// Bytes by what they may be in a path or a query, RFC 3986.
const (
	escaped    = iota // has to be written as an escape
	inQuery           // "?": as itself in a query only
	inPath            // as itself in both: sub-delims, ":", "@", "/"
	unreserved        // section 2.3: as itself in both; its escape means the same
)

var class = classes()

func classes() *[256]uint8 {
	var out [256]uint8
	for c := range 128 {
		switch c := byte(c); {
		case '0' <= c && c <= '9', 'A' <= c && c <= 'Z', 'a' <= c && c <= 'z', strings.IndexByte("-._~", c) >= 0:
			out[c] = unreserved
		case strings.IndexByte("!$&'()*+,;=:@/", c) >= 0:
			out[c] = inPath
		case c == '?':
			out[c] = inQuery
		}
	}
	return &out
}

// CanonicalPath is the one form of a path, without a query, in which routing and
// authorization see it: the normal form of RFC 3986, section 6.2.2, with repeated
// slashes merged before dot segments are removed, as file systems have it. Escaped
// unreserved characters are themselves, other escapes have their digits in upper
// case, and bytes that cannot stand in a path are escaped. An escaped slash stays
// an escaped slash. The empty path is "/", and the "*" of OPTIONS is itself.
//
// It is the path itself, not a copy, if nothing changes. It is false for an escape
// that is none, for NUL, escaped or not, and for what does not begin with a slash.
func CanonicalPath(path []byte) ([]byte, bool) {
	if len(path) == 0 {
		return []byte{'/'}, true
	}
	if path[0] != '/' {
		return path, string(path) == "*"
	}
	for i, c := range path {
		switch {
		case c == '/' && i > 0 && path[i-1] == '/',
			c == '.' && path[i-1] == '/' && dotSegment(path[i:]),
			c != '%' && class[c] < inPath,
			c == '%' && !canonicalEscape(path[i:]):
			return canonical(path)
		}
	}
	return path, true
}

// dotSegment reports whether the segment that path begins with is "." or "..".
func dotSegment(path []byte) bool {
	if end := bytes.IndexByte(path, '/'); end >= 0 {
		path = path[:end]
	}
	return string(path) == "." || string(path) == ".."
}

func canonicalEscape(path []byte) bool {
	c, ok := unescape(path)
	return ok && c != 0 && class[c] != unreserved && !lower(path[1]) && !lower(path[2])
}

func lower(hex byte) bool { return hex >= 'a' }

// canonical is CanonicalPath of a path that begins with a slash.
func canonical(path []byte) ([]byte, bool) {
	out := make([]byte, 0, len(path)+16)
	for len(path) > 0 {
		c, n := path[0], 1
		if c == '%' {
			var ok bool
			if c, ok = unescape(path); !ok {
				return nil, false
			}
			n = 3
		}
		switch {
		case c == 0:
			return nil, false
		case c == '/' && n == 1:
			out = endSegment(out)
			if len(out) == 0 || out[len(out)-1] != '/' {
				out = append(out, '/')
			}
		case class[c] == unreserved, n == 1 && class[c] == inPath:
			out = append(out, c)
		default:
			out = appendEscape(out, c)
		}
		path = path[n:]
	}
	return endSegment(out), true
}

// endSegment removes the last segment if it is ".", with the one before it if it is
// "..". What is left ends with a slash.
func endSegment(out []byte) []byte {
	slash := bytes.LastIndexByte(out, '/')
	switch string(out[slash+1:]) {
	case ".":
		return out[:slash+1]
	case "..":
		return out[:max(bytes.LastIndexByte(out[:slash], '/'), 0)+1]
	}
	return out
}

// unescape reads the escape that text begins with: a percent sign and two digits.
func unescape(text []byte) (byte, bool) {
	if len(text) < 3 {
		return 0, false
	}
	high, ok1 := hex(text[1])
	low, ok2 := hex(text[2])
	return high<<4 | low, ok1 && ok2
}

func hex(c byte) (byte, bool) {
	switch {
	case '0' <= c && c <= '9':
		return c - '0', true
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10, true
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10, true
	}
	return 0, false
}

func appendEscape(out []byte, c byte) []byte {
	const digits = "0123456789ABCDEF"
	return append(out, '%', digits[c>>4], digits[c&15])
}

// appendText appends what came from elsewhere, with those bytes escaped that are
// below least: no text can end a path, a query or a line. Escapes stay.
func appendText[T []byte | string](out []byte, text T, least uint8) []byte {
	for i := range len(text) {
		if c := text[i]; c == '%' || class[c] >= least {
			out = append(out, c)
		} else {
			out = appendEscape(out, c)
		}
	}
	return out
}

// Apply changes a path as it came, without its query; matched is the match that was
// met. It follows the table of the Gateway API's HTTPPathModifier. What comes after
// the prefix stays as it came, unless it has dot segments: these could lead out of
// the new prefix, so all of it is in its canonical form then. The outcome begins
// with one slash. A prefix is replaced only if one matched; PathAny is the prefix
// "/".
func (p *PathChange) Apply(path []byte, matched *Match) []byte {
	if !p.Prefix {
		return rooted(p.Value, nil)
	}
	if matched.Path.Kind != PathPrefix && matched.Path.Kind != PathAny {
		return path
	}
	rest, ok := afterPrefix(path, matched.Path.Value)
	if !ok {
		return path
	}
	value := p.Value
	if len(rest) > 0 {
		value = strings.TrimSuffix(value, "/") // rest begins with one
	}
	return rooted(value, rest)
}

// afterPrefix is what follows a prefix in a path as it came, whose canonical form
// begins with it. False: it is no path.
func afterPrefix(path []byte, prefix string) ([]byte, bool) {
	canonical, ok := CanonicalPath(path)
	if !ok || len(canonical) < len(prefix) || canonical[0] != '/' {
		return nil, false
	}
	if elements(path) != elements(canonical) {
		return canonical[len(prefix):], true
	}
	rest := path
	for range strings.Count(prefix, "/") {
		rest = bytes.TrimLeft(rest, "/")
		end := bytes.IndexByte(rest, '/')
		if end < 0 {
			return nil, true
		}
		rest = rest[end:]
	}
	return rest, true
}

// elements counts the elements of a path that are not empty.
func elements(path []byte) int {
	n := 0
	for i, c := range path {
		if c != '/' && (i == 0 || path[i-1] == '/') {
			n++
		}
	}
	return n
}

// rooted joins the two to a path that begins with exactly one slash.
func rooted(value string, rest []byte) []byte {
	value = strings.TrimLeft(value, "/")
	if value == "" {
		rest = bytes.TrimLeft(rest, "/")
	}
	out := make([]byte, 0, 1+len(value)+len(rest))
	out = append(out, '/')
	out = appendText(out, value, inPath)
	return append(out, rest...)
}
