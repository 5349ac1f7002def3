package route

import (
	"bytes"
	"strconv"
)

// Location is where a redirect leads: an absolute URI, for a request with that
// scheme, Host, path and query, both as they came, whose client dialled that port
// and which met that match. The query is kept. Without any host, as in HTTP/1.0, it
// is a path. It can stand in a header field whatever the request said.
func (r *Redirect) Location(scheme string, host []byte, dialled uint16, path, query []byte, m *Match) string {
	port := r.Port
	if port == 0 {
		port = dialled
		if known := wellKnownPort(r.Scheme); known != 0 {
			port = known
		}
	}
	if r.Scheme != "" {
		scheme = r.Scheme
	}
	host = hostname(host)
	if r.Hostname != "" {
		host = []byte(r.Hostname)
	}
	if r.Path != nil {
		path = r.Path.Apply(path, m)
	}
	out := make([]byte, 0, len("https://:65535/?")+len(host)+len(path)+len(query))
	if len(host) > 0 {
		out = append(out, scheme...)
		out = append(out, "://"...)
		out = appendHost(out, host)
		if port != wellKnownPort(scheme) {
			out = append(out, ':')
			out = strconv.AppendUint(out, uint64(port), 10)
		}
	} else {
		path = append([]byte{'/'}, bytes.TrimLeft(path, "/")...) // "//a" would be a host
	}
	out = appendText(out, path, inPath)
	if len(query) > 0 {
		out = append(out, '?')
		out = appendText(out, query, inQuery)
	}
	return string(out)
}

// wellKnownPort is 0 for a scheme that has none.
func wellKnownPort(scheme string) uint16 {
	switch scheme {
	case "http":
		return 80
	case "https":
		return 443
	}
	return 0
}

// hostname is a Host without its port: "example.com", "192.0.2.1" or "[2001:db8::1]".
func hostname(host []byte) []byte {
	colon := bytes.LastIndexByte(host, ':')
	if colon < 0 || bytes.IndexByte(host[colon:], ']') >= 0 {
		return host
	}
	return host[:colon]
}

// appendHost leaves out what would end the host.
func appendHost(out, host []byte) []byte {
	for _, c := range host {
		if class[c] == unreserved || bytes.IndexByte([]byte("[]:%!$&'()*+,;="), c) >= 0 {
			out = append(out, c)
		}
	}
	return out
}
