package route

import (
	"net/url"
	"strings"
	"testing"
)

// TestLocation holds "Filters" of the mesh's semantics about redirects.
func TestLocation(t *testing.T) {
	prefix := &Match{Path: Path{Kind: PathPrefix, Value: "/foo"}}
	for _, test := range []struct {
		name     string
		redirect Redirect
		scheme   string
		host     string
		dialled  uint16
		target   string
		want     string
	}{
		{"what is not set is the request's", Redirect{}, "http", "example.com:1234", 8080, "/foo//%7e?a=b&c", "http://example.com:8080/foo//%7e?a=b&c"},
		{"the port is the one that was dialled, not the Host's", Redirect{Hostname: "other"}, "http", "example.com:1234", 8080, "/foo", "http://other:8080/foo"},
		{":80 is left out for http", Redirect{Hostname: "other"}, "http", "example.com", 80, "/foo", "http://other/foo"},
		{":443 is left out for https", Redirect{Hostname: "other"}, "https", "example.com", 443, "/foo", "https://other/foo"},
		{":443 is not left out for http", Redirect{}, "http", "example.com", 443, "/foo", "http://example.com:443/foo"},
		{"a scheme has its well-known port", Redirect{Scheme: "https"}, "http", "example.com:8080", 8080, "/foo", "https://example.com/foo"},
		{"a scheme has its well-known port, http's", Redirect{Scheme: "http"}, "https", "example.com", 8443, "/foo", "http://example.com/foo"},
		{"a scheme without one has the port that was dialled", Redirect{Scheme: "ws"}, "http", "example.com", 8080, "/foo", "ws://example.com:8080/foo"},
		{"a port that is set", Redirect{Port: 8443}, "https", "example.com", 443, "/foo", "https://example.com:8443/foo"},
		{"a port that is set, with a scheme", Redirect{Scheme: "https", Port: 8443}, "http", "example.com", 80, "/foo", "https://example.com:8443/foo"},
		{"a port that is set and well known", Redirect{Scheme: "https", Port: 443}, "http", "example.com", 80, "/foo", "https://example.com/foo"},
		{"a port that is set and another scheme's", Redirect{Scheme: "https", Port: 80}, "http", "example.com", 80, "/foo", "https://example.com:80/foo"},
		{"the full path; the query stays", Redirect{Path: &PathChange{Value: "/new"}}, "http", "example.com", 80, "/foo?a=b", "http://example.com/new?a=b"},
		{"the prefix; the query stays", Redirect{Path: &PathChange{Prefix: true, Value: "/new"}}, "http", "example.com", 80, "/foo/bar?a=b", "http://example.com/new/bar?a=b"},
		{"IPv4", Redirect{}, "http", "192.0.2.1:80", 8080, "/", "http://192.0.2.1:8080/"},
		{"IPv6", Redirect{}, "http", "[2001:db8::1]", 80, "/", "http://[2001:db8::1]/"},
		{"IPv6 with a port", Redirect{}, "http", "[2001:db8::1]:80", 8080, "/", "http://[2001:db8::1]:8080/"},
		{"no Host", Redirect{}, "http", "", 80, "//evil.example/a?b", "/evil.example/a?b"},
		{"no Host, but the redirect's", Redirect{Hostname: "other"}, "http", "", 80, "/a", "http://other/a"},
		{"nothing ends the field or its part", Redirect{}, "http", "a/\r\nb@c", 80, "/x\r\ny: é?q=\r\n#é|?", "http://abc/x%0D%0Ay:%20%C3%A9?q=%0D%0A%23%C3%A9%7C?"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path, query, _ := strings.Cut(test.target, "?")
			got := test.redirect.Location(test.scheme, []byte(test.host), test.dialled, []byte(path), []byte(query), prefix)
			if got != test.want {
				t.Errorf("%s, want %s", got, test.want)
			}
			if _, err := url.Parse(got); err != nil {
				t.Error(err)
			}
		})
	}
}
