package route

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/http2/hpack"
)

// field is one of HTTP/1, as it stands in a buffer.
type field struct{ name, value []byte }

type fields1 []field

func (f *fields1) Len() int                   { return len(*f) }
func (f *fields1) Is(i int, name string) bool { return strings.EqualFold(string((*f)[i].name), name) }
func (f *fields1) Set(i int, value string)    { (*f)[i].value = append((*f)[i].value[:0:0], value...) }
func (f *fields1) Append(i int, value string) {
	(*f)[i].value = []byte(string((*f)[i].value) + "," + value)
}
func (f *fields1) Remove(i int) { *f = slices.Delete(*f, i, i+1) }
func (f *fields1) Add(name, value string) {
	*f = append(*f, field{[]byte(name), []byte(value)})
}

// fields2 are HTTP/2's.
type fields2 []hpack.HeaderField

func (f *fields2) Len() int                   { return len(*f) }
func (f *fields2) Is(i int, name string) bool { return (*f)[i].Name == name }
func (f *fields2) Set(i int, value string)    { (*f)[i].Value = value }
func (f *fields2) Append(i int, value string) { (*f)[i].Value += "," + value }
func (f *fields2) Remove(i int)               { *f = slices.Delete(*f, i, i+1) }
func (f *fields2) Add(name, value string) {
	*f = append(*f, hpack.HeaderField{Name: name, Value: value})
}

// TestHeaderChange: what the Gateway API says of HTTPHeaderFilter holds for the
// fields of either version of HTTP.
func TestHeaderChange(t *testing.T) {
	for _, test := range []struct {
		name     string
		change   HeaderChange
		in, want string
	}{
		{"nothing", HeaderChange{}, "A: 1|B: 2", "A: 1|B: 2"},
		{"set takes the value's place", HeaderChange{Set: []Header{{"my-header", "bar"}}}, "A: 1|My-Header: foo|B: 2", "A: 1|My-Header: bar|B: 2"},
		{"set leaves one", HeaderChange{Set: []Header{{"a", "9"}}}, "A: 1|B: 2|a: 3|a: 4|C: 5", "A: 9|B: 2|C: 5"},
		{"set adds what is not there", HeaderChange{Set: []Header{{"a", "1"}}}, "B: 2", "B: 2|a: 1"},
		{"add appends", HeaderChange{Add: []Header{{"my-header", "bar,baz"}}}, "My-Header: foo|B: 2", "My-Header: foo,bar,baz|B: 2"},
		{"add appends to the last of them", HeaderChange{Add: []Header{{"a", "3"}}}, "A: 1|A: 2|B: 2", "A: 1|A: 2,3|B: 2"},
		{"add adds what is not there", HeaderChange{Add: []Header{{"a", "1"}}}, "B: 2", "B: 2|a: 1"},
		{"cookies are not joined", HeaderChange{Add: []Header{{"set-cookie", "b=2"}}}, "Set-Cookie: a=1|B: 2", "Set-Cookie: a=1|B: 2|set-cookie: b=2"},
		{"remove removes all of that name", HeaderChange{Remove: []string{"my-header1", "my-header3"}},
			"My-Header1: foo|My-Header2: bar|my-header1: x|My-Header3: baz", "My-Header2: bar"},
		{"what the codec says stays as it is", HeaderChange{
			Set:    []Header{{"content-length", "9"}, {"transfer-encoding", "chunked"}, {"a", "2"}},
			Add:    []Header{{"connection", "a"}, {"upgrade", "x"}, {"keep-alive", "1"}},
			Remove: []string{"content-length"},
		}, "A: 1|Content-Length: 3", "A: 2|Content-Length: 3"},
		{"set, then add, then remove", HeaderChange{Set: []Header{{"a", "1"}, {"b", "1"}}, Add: []Header{{"a", "2"}}, Remove: []string{"b"}},
			"B: 0", "a: 1,2"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var one fields1
			var two fields2
			for pair := range strings.SplitSeq(test.in, "|") {
				name, value, _ := strings.Cut(pair, ": ")
				one = append(one, field{[]byte(name), []byte(value)})
				two.Add(strings.ToLower(name), value)
			}
			test.change.Apply(&one)
			test.change.Apply(&two)
			var got1, got2 []string
			for _, f := range one {
				got1 = append(got1, fmt.Sprintf("%s: %s", f.name, f.value))
			}
			for _, f := range two {
				got2 = append(got2, f.Name+": "+f.Value)
			}
			if got := strings.Join(got1, "|"); got != test.want {
				t.Errorf("HTTP/1: %s, want %s", got, test.want)
			}
			want := strings.Split(test.want, "|")
			for i := range want {
				name, value, _ := strings.Cut(want[i], ": ")
				want[i] = strings.ToLower(name) + ": " + value
			}
			if !slices.Equal(got2, want) {
				t.Errorf("HTTP/2: %q, want %q", got2, want)
			}
		})
	}
}

func TestHeaderChangeAllocatesNothing(t *testing.T) {
	change := HeaderChange{Set: []Header{{"a", "1"}, {"x", "2"}}, Add: []Header{{"y", "1"}}, Remove: []string{"b", "z"}}
	in := fields2{{Name: "a", Value: "0"}, {Name: "b", Value: "1"}, {Name: "c", Value: "2"}}
	out := make(fields2, 0, 10)
	if n := testing.AllocsPerRun(100, func() {
		out = append(out[:0], in...)
		change.Apply(&out)
	}); n > 0 || len(out) != 4 {
		t.Errorf("%v allocations, %v", n, out)
	}
}

// TestCORS holds what the Gateway API says of HTTPCORSFilter.
func TestCORS(t *testing.T) {
	site := &CORS{AllowOrigins: []string{"https://a.example", "https://*.b.example:8443", "http://c.example:80"}, AllowMethods: []string{"GET", "PUT"},
		AllowHeaders: []string{"X-One", "X-Two"}, ExposeHeaders: []string{"X-Three", "X-Four"}, MaxAge: 60}
	anyone := &CORS{AllowOrigins: []string{"*"}, AllowMethods: []string{"*"}, AllowHeaders: []string{"*"}, ExposeHeaders: []string{"*"}}
	trusted := *anyone
	trusted.AllowCredentials = true
	bare := &CORS{AllowOrigins: []string{"http://*"}}
	for _, test := range []struct {
		name                    string
		cors                    *CORS
		origin, method, headers string
		preflight, answer       string
	}{
		{"lists are what is configured", site, "https://a.example", "PUT", "x-one",
			"access-control-allow-origin: https://a.example|vary: Origin|access-control-allow-methods: GET,PUT|access-control-allow-headers: X-One,X-Two|access-control-max-age: 60",
			"access-control-allow-origin: https://a.example|vary: Origin|access-control-expose-headers: X-Three,X-Four"},
		{"an origin that is not allowed is told nothing", site, "https://evil.example", "PUT", "", "vary: Origin", "vary: Origin"},
		{"no origin", site, "", "", "", "vary: Origin", "vary: Origin"},
		{"* is anyone, and what was asked for", anyone, "https://x.example", "PUT", "authorization,x-one",
			"access-control-allow-origin: *|access-control-allow-methods: PUT|access-control-allow-headers: authorization,x-one|access-control-max-age: 5",
			"access-control-allow-origin: *|access-control-expose-headers: *"},
		{"* is * where nothing was asked for", anyone, "null", "", "",
			"access-control-allow-origin: *|access-control-allow-methods: *|access-control-allow-headers: *|access-control-max-age: 5",
			"access-control-allow-origin: *|access-control-expose-headers: *"},
		{"with credentials nothing is *", &trusted, "https://x.example", "PUT", "x-one",
			"access-control-allow-origin: https://x.example|access-control-allow-credentials: true|vary: Origin|access-control-allow-methods: PUT|access-control-allow-headers: x-one|access-control-max-age: 5",
			"access-control-allow-origin: https://x.example|access-control-allow-credentials: true|vary: Origin"},
		{"with credentials what was not asked for is left out", &trusted, "https://x.example", "", "",
			"access-control-allow-origin: https://x.example|access-control-allow-credentials: true|vary: Origin|access-control-max-age: 5",
			"access-control-allow-origin: https://x.example|access-control-allow-credentials: true|vary: Origin"},
		{"what is not configured is left out", bare, "http://x.example:8080", "PUT", "x-one", "vary: Origin", "vary: Origin"},
		{"a wildcard by itself is all hosts", bare, "http://x.y.example", "PUT", "x-one",
			"access-control-allow-origin: http://x.y.example|vary: Origin|access-control-max-age: 5",
			"access-control-allow-origin: http://x.y.example|vary: Origin"},
	} {
		t.Run(test.name, func(t *testing.T) {
			text := func(headers []Header) string {
				var out []string
				for _, h := range headers {
					out = append(out, h.Name+": "+h.Value)
				}
				return strings.Join(out, "|")
			}
			if got := text(test.cors.Preflight([]byte(test.origin), []byte(test.method), []byte(test.headers))); got != test.preflight {
				t.Errorf("preflight:\n%s, want\n%s", got, test.preflight)
			}
			if got := text(test.cors.Answer([]byte(test.origin))); got != test.answer {
				t.Errorf("answer:\n%s, want\n%s", got, test.answer)
			}
		})
	}
	for origin, want := range map[string]bool{
		"https://a.example": true, "https://a.example:443": true, "HTTPS://A.example": true, "http://a.example": false,
		"https://a.example:444": false, "https://xa.example": false, "https://a.example.evil": false, "https://x.a.example": false,
		"https://x.b.example:8443": true, "https://x.y.b.example:8443": true, "https://b.example:8443": false, "https://.b.example:8443": false,
		"https://x.b.example": false, "https://xb.example:8443": false, "http://c.example": true, "null": false, "https://": false, "*": false,
	} {
		allowed := bytes.Contains([]byte(fmt.Sprint(site.Answer([]byte(origin)))), []byte("allow-origin"))
		if allowed != want {
			t.Errorf("origin %s allowed: %t", origin, allowed)
		}
	}
}
