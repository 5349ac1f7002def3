package route

import (
	"bytes"
	"slices"
	"strconv"
	"strings"
)

// defaultMaxAge is the Gateway API's, in seconds.
const defaultMaxAge = 5

// Preflight is what the proxy itself answers, with status 204, to OPTIONS with an
// Origin and an Access-Control-Request-Method: the fields of the answer, for the
// values of these two and of Access-Control-Request-Headers (nil: there is none).
// An origin that is not allowed is told nothing, and its browser refuses.
func (c *CORS) Preflight(origin, method, headers []byte) []Header {
	out, ok := c.origin(origin)
	if !ok {
		return out
	}
	if allowed, ok := c.allowed(c.AllowMethods, method); ok {
		out = append(out, Header{"access-control-allow-methods", allowed})
	}
	if allowed, ok := c.allowed(c.AllowHeaders, headers); ok {
		out = append(out, Header{"access-control-allow-headers", allowed})
	}
	age := c.MaxAge
	if age == 0 {
		age = defaultMaxAge
	}
	return append(out, Header{"access-control-max-age", strconv.Itoa(int(age))})
}

// Answer is what an answer of the application's gets, for the request's Origin (nil:
// there is none). Its fields take the place of the application's, but for Vary,
// which is added to it. An answer depends on the origin even where none was sent:
// caches have to know.
func (c *CORS) Answer(origin []byte) []Header {
	out, ok := c.origin(origin)
	if !ok || len(c.ExposeHeaders) == 0 || c.AllowCredentials && slices.Contains(c.ExposeHeaders, "*") {
		return out // a browser that sent credentials takes "*" for a name
	}
	return append(out, Header{"access-control-expose-headers", strings.Join(c.ExposeHeaders, ",")})
}

// origin is what both have, and whether the origin is allowed.
func (c *CORS) origin(origin []byte) ([]Header, bool) {
	allowed := len(origin) > 0 && slices.ContainsFunc(c.AllowOrigins, func(pattern string) bool {
		return originMeets(origin, pattern)
	})
	var out []Header
	anyone := slices.Contains(c.AllowOrigins, "*") && !c.AllowCredentials
	switch {
	case anyone && allowed:
		out = append(out, Header{"access-control-allow-origin", "*"})
	case allowed:
		out = append(out, Header{"access-control-allow-origin", string(origin)})
	}
	if allowed && c.AllowCredentials {
		out = append(out, Header{"access-control-allow-credentials", "true"})
	}
	if !anyone {
		out = append(out, Header{"vary", "Origin"})
	}
	return out, allowed
}

// allowed lists what the policy names. "*" is what was asked for, since to browsers
// "*" means less than all: not Authorization, and nothing with credentials.
func (c *CORS) allowed(names []string, asked []byte) (string, bool) {
	switch {
	case len(names) == 0:
		return "", false
	case !slices.Contains(names, "*"):
		return strings.Join(names, ","), true
	case len(asked) > 0:
		return string(asked), true
	}
	return "*", !c.AllowCredentials
}

// originMeets compares an origin with "*", "https://*", "https://*.example.com" or
// "https://example.com:8443". An origin without a port has its scheme's.
func originMeets(origin []byte, pattern string) bool {
	if pattern == "*" {
		return true
	}
	scheme, host, port := cutOrigin(bytes.ToLower(origin))
	wantScheme, want, wantPort := cutOrigin([]byte(strings.ToLower(pattern)))
	if !bytes.Equal(scheme, wantScheme) || !bytes.Equal(port, wantPort) || len(host) == 0 {
		return false
	}
	if suffix, ok := bytes.CutPrefix(want, []byte{'*'}); ok {
		return len(host) > len(suffix) && bytes.HasSuffix(host, suffix)
	}
	return bytes.Equal(host, want)
}

// cutOrigin is its scheme, its host and its port.
func cutOrigin(origin []byte) ([]byte, []byte, []byte) {
	scheme, authority, _ := bytes.Cut(origin, []byte("://"))
	host := hostname(authority)
	if len(host) < len(authority) {
		return scheme, host, authority[len(host)+1:]
	}
	return scheme, host, strconv.AppendUint(nil, uint64(wellKnownPort(string(scheme))), 10)
}
