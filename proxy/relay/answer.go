package relay

import (
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/weirmesh/weir/proxy/http1"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/route"
)

var (
	errPath    = errors.New("the path has an escape that is none, or NUL")
	errFilter  = errors.New("the route has a filter that cannot be resolved")
	errWeights = errors.New("all the rule's backends have weight 0")
)

// phrases are for people (RFC 9110, section 15). net/http has more of them, and is
// larger than this proxy.
var phrases = map[int]string{
	204: "No Content",
	301: "Moved Permanently", 302: "Found", 303: "See Other", 307: "Temporary Redirect", 308: "Permanent Redirect",
	400: "Bad Request", 403: "Forbidden", 404: "Not Found", 408: "Request Timeout", 429: "Too Many Requests",
	431: "Request Header Fields Too Large",
	500: "Internal Server Error", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout",
}

// answer is what the proxy answers itself.
type answer struct {
	status int
	fields []route.Header
	body   string
}

// Len, Is, Set, Append, Remove and Add are route.Fields.

// Len is how many fields there are.
func (a *answer) Len() int { return len(a.fields) }

// Is reports whether field i has a name.
func (a *answer) Is(i int, name string) bool { return strings.EqualFold(a.fields[i].Name, name) }

// Set gives field i another value.
func (a *answer) Set(i int, value string) { a.fields[i].Value = value }

// Append appends to the value of field i, after a comma.
func (a *answer) Append(i int, value string) { a.fields[i].Value += "," + value }

// Remove removes field i.
func (a *answer) Remove(i int) { a.fields = slices.Delete(a.fields, i, i+1) }

// Add adds a field after the last one.
func (a *answer) Add(name, value string) {
	a.fields = append(a.fields, route.Header{Name: name, Value: value})
}

// failed answers that a request failed, and why (RFC 9209).
func failed(e *reason.Error, status int) *answer {
	words := e.Reason.Words()
	if e.Err != nil {
		words += ": " + e.Err.Error()
	}
	text := e.Reason.String() + ": " + words
	return &answer{
		status: status,
		fields: []route.Header{
			{Name: "Proxy-Status", Value: "weir; error=" + e.Reason.ProxyStatus() + "; details=" + quoted(text)},
			{Name: "Content-Type", Value: "text/plain; charset=utf-8"},
		},
		body: "weir: " + text + "\n",
	}
}

// retryAfter tells when to come back, in whole seconds.
func retryAfter(wait time.Duration) route.Header {
	return route.Header{Name: "Retry-After", Value: strconv.FormatInt(int64((wait+time.Second-1)/time.Second), 10)}
}

// quoted is a String of RFC 8941, section 3.3.3.
func quoted(text string) string {
	var out strings.Builder
	out.WriteByte('"')
	for _, c := range []byte(text) {
		switch {
		case c == '"' || c == '\\':
			out.WriteByte('\\')
			out.WriteByte(c)
		case c < ' ' || c > '~':
			out.WriteByte('?')
		default:
			out.WriteByte(c)
		}
	}
	out.WriteByte('"')
	return out.String()
}

// appendHTTP1 appends the answer to a request of that version.
func (a *answer) appendHTTP1(out []byte, minor int, head, last bool) []byte {
	out = append(out, "HTTP/1."...)
	out = append(out, '0'+byte(minor), ' ')
	out = strconv.AppendInt(out, int64(a.status), 10)
	out = append(out, ' ')
	out = append(out, phrases[a.status]...)
	out = append(out, '\r', '\n')
	for _, f := range a.fields {
		out = http1.AppendField(out, f.Name, f.Value)
	}
	if a.status != 204 {
		out = http1.AppendField(out, "Content-Length", strconv.Itoa(len(a.body)))
	}
	switch {
	case last && minor == 1:
		out = append(out, "Connection: close\r\n"...)
	case !last && minor == 0:
		out = append(out, "Connection: keep-alive\r\n"...)
	}
	out = append(out, '\r', '\n')
	if !head {
		out = append(out, a.body...)
	}
	return out
}
