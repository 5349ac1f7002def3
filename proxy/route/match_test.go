package route

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/url"
	"strings"
	"testing"
)

// request is a Request as a test writes it: "GET /path?query", then its fields.
type request struct {
	method, path, query []byte
	headers             []field
}

func newRequest(line string, headers ...string) *request {
	method, target, _ := strings.Cut(line, " ")
	path, query, _ := strings.Cut(target, "?")
	r := &request{method: []byte(method), path: []byte(path), query: []byte(query)}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		r.headers = append(r.headers, field{[]byte(strings.ToLower(name)), []byte(value)})
	}
	return r
}

func (r *request) Method() []byte { return r.method }
func (r *request) Path() []byte   { return r.path }
func (r *request) Query() []byte  { return r.query }
func (r *request) Header(name string) ([]byte, bool) {
	for _, h := range r.headers {
		if string(h.name) == name {
			return h.value, true
		}
	}
	return nil, false
}

func whole(t testing.TB, expression string) *Regexp {
	t.Helper()
	compiled, err := CompileWhole(expression)
	if err != nil {
		t.Fatal(err)
	}
	return compiled
}

// TestMatch holds "Matching" of the mesh's semantics, sentence by sentence.
func TestMatch(t *testing.T) {
	path := func(kind PathKind, value string) Match { return Match{Path: Path{Kind: kind, Value: value}} }
	query := func(values ...Value) Match { return Match{Query: values} }
	header := func(values ...Value) Match { return Match{Headers: values} }
	grpc := func(service, method string) Match { return Match{GRPC: &Method{Service: service, Method: method}} }
	for _, test := range []struct {
		name    string
		match   Match
		meets   []*request
		differs []*request
	}{
		{"no condition: everything", Match{},
			[]*request{newRequest("GET /"), newRequest("OPTIONS *"), newRequest("POST /a?b", "c: d")}, nil},
		{"an exact path is that path alone", path(PathExact, "/abc"),
			[]*request{newRequest("GET /abc"), newRequest("POST /abc?x=y")},
			[]*request{newRequest("GET /abc/"), newRequest("GET /Abc"), newRequest("GET /abcd"), newRequest("GET /ab"), newRequest("GET /")}},
		{"prefixes go by path element", path(PathPrefix, "/v2"),
			[]*request{newRequest("GET /v2"), newRequest("GET /v2/"), newRequest("GET /v2/example")},
			[]*request{newRequest("GET /v2example"), newRequest("GET /V2/"), newRequest("GET /"), newRequest("GET /v"), newRequest("GET /a/v2")}},
		{"the prefix / is everything", path(PathPrefix, ""),
			[]*request{newRequest("GET /"), newRequest("GET /a/b"), newRequest("OPTIONS *")}, nil},
		{"a regular expression is held against the whole path", Match{Path: Path{Kind: PathRegexp, Regexp: whole(t, "/a|/b+")}},
			[]*request{newRequest("GET /a"), newRequest("GET /bb")},
			[]*request{newRequest("GET /aa"), newRequest("GET /b/"), newRequest("GET /x/a")}},
		{"methods are compared with their case", Match{Method: "GET"},
			[]*request{newRequest("GET /")},
			[]*request{newRequest("get /"), newRequest("HEAD /"), newRequest("GETX /")}},
		{"header names are compared without their case, values with it", header(Value{Name: "version", Value: "one"}),
			[]*request{newRequest("GET /", "VERSION: one"), newRequest("GET /", "other: x", "version: one")},
			[]*request{newRequest("GET /"), newRequest("GET /", "version: One"), newRequest("GET /", "version: one "), newRequest("GET /", "versions: one")}},
		{"all headers must be met", header(Value{Name: "a", Value: "1"}, Value{Name: "b", Regexp: whole(t, "[0-9]+")}),
			[]*request{newRequest("GET /", "b: 22", "a: 1")},
			[]*request{newRequest("GET /", "a: 1"), newRequest("GET /", "a: 1", "b: 22x"), newRequest("GET /", "b: 22")}},
		{"of a repeated header entry the first counts", header(Value{Name: "a", Value: "1"}, Value{Name: "a", Value: "2"}),
			[]*request{newRequest("GET /", "a: 1")},
			[]*request{newRequest("GET /", "a: 2"), newRequest("GET /")}},
		{"query names are exact", query(Value{Name: "Animal", Value: "whale"}),
			[]*request{newRequest("GET /?Animal=whale"), newRequest("GET /?a=b&Animal=whale&c")},
			[]*request{newRequest("GET /?animal=whale"), newRequest("GET /?Animal=Whale"), newRequest("GET /?Animals=whale"), newRequest("GET /?Animal"), newRequest("GET /")}},
		{"of a repeated parameter the first value counts", query(Value{Name: "a", Value: "1"}),
			[]*request{newRequest("GET /?a=1&a=2")},
			[]*request{newRequest("GET /?a=2&a=1")}},
		{"of a repeated parameter entry the first counts", query(Value{Name: "a", Value: "1"}, Value{Name: "a", Value: "2"}),
			[]*request{newRequest("GET /?a=1")},
			[]*request{newRequest("GET /?a=2")}},
		{"parameters are compared decoded", query(Value{Name: "a b", Value: "c&d=é%"}),
			[]*request{newRequest("GET /?a+b=c%26d=%C3%A9%25"), newRequest("GET /?%61%20b=c%26d%3d%c3%a9%")},
			[]*request{newRequest("GET /?a+b=c&d=é%"), newRequest("GET /?a%2Bb=c%26d=é%")}},
		{"an expression sees a parameter decoded", query(Value{Name: "q", Regexp: whole(t, "[a-z] [a-z]")}),
			[]*request{newRequest("GET /?q=a+b"), newRequest("GET /?q=%61%20b")},
			[]*request{newRequest("GET /?q=a%2Bb"), newRequest("GET /?q=a+b+c")}},
		{"all kinds of conditions must be met",
			Match{Path: Path{Kind: PathPrefix, Value: "/a"}, Method: "GET", Headers: []Value{{Name: "h", Value: "1"}}, Query: []Value{{Name: "q", Value: "2"}}},
			[]*request{newRequest("GET /a/b?q=2", "h: 1")},
			[]*request{newRequest("GET /b?q=2", "h: 1"), newRequest("PUT /a?q=2", "h: 1"), newRequest("GET /a?q=1", "h: 1"), newRequest("GET /a?q=2", "h: 2")}},
		{"a gRPC service and method", grpc("shop.Cart", "Add"),
			[]*request{newRequest("POST /shop.Cart/Add")},
			[]*request{newRequest("POST /shop.Cart/add"), newRequest("POST /shop.Cart/AddAll"), newRequest("POST /shop.Carts/Add"), newRequest("POST /shop.Cart"), newRequest("POST /x/shop.Cart/Add"), newRequest("OPTIONS *")}},
		{"a gRPC service, any method", grpc("shop.Cart", ""),
			[]*request{newRequest("POST /shop.Cart/Add"), newRequest("POST /shop.Cart/Remove")},
			[]*request{newRequest("POST /shop.Till/Add")}},
		{"a gRPC method of any service", grpc("", "Add"),
			[]*request{newRequest("POST /shop.Cart/Add"), newRequest("POST /a/Add")},
			[]*request{newRequest("POST /shop.Cart/Remove"), newRequest("POST /Add")}},
		{"gRPC expressions are held against the whole of each", Match{GRPC: &Method{ServiceRegexp: whole(t, `shop\..*`), MethodRegexp: whole(t, "A|B")}},
			[]*request{newRequest("POST /shop.Cart/A"), newRequest("POST /shop.Till/B")},
			[]*request{newRequest("POST /shop.Cart/AB"), newRequest("POST /myshop.Cart/A")}},
	} {
		t.Run(test.name, func(t *testing.T) {
			routes := &Routes{Rules: make([]Rule, 2), Matches: []Match{test.match}}
			routes.Matches[0].Rule = 1
			for _, r := range test.meets {
				if rule, m := routes.Match(r); rule != &routes.Rules[1] || m != &routes.Matches[0] {
					t.Errorf("%s %s?%s %v does not meet it", r.method, r.path, r.query, r.headers)
				}
			}
			for _, r := range test.differs {
				if rule, m := routes.Match(r); rule != nil || m != nil {
					t.Errorf("%s %s?%s %v meets it", r.method, r.path, r.query, r.headers)
				}
			}
		})
	}
}

func TestFirstMatchThatIsMetCounts(t *testing.T) {
	routes := &Routes{Rules: make([]Rule, 3), Matches: []Match{
		{Rule: 2, Path: Path{Kind: PathExact, Value: "/a/b"}},
		{Rule: 0, Path: Path{Kind: PathPrefix, Value: "/a"}},
		{Rule: 1, Path: Path{Kind: PathPrefix, Value: "/a"}},
	}}
	for path, want := range map[string]int{"/a/b": 2, "/a/c": 0, "/a": 0} {
		if rule, _ := routes.Match(newRequest("GET " + path)); rule != &routes.Rules[want] {
			t.Errorf("%s does not get rule %d", path, want)
		}
	}
}

// TestShares: each backend gets its weight's share of all numbers there are, to
// within one in 2^32 of them for each unit of weight.
func TestShares(t *testing.T) {
	for _, weights := range [][]uint32{
		{1}, {1, 1}, {90, 10}, {1, 0, 2}, {0, 3}, {1_000_000, 1, 999_999}, {1_000_000, 1_000_000, 1_000_000},
		{1 << 31, 1 << 31}, {1<<32 - 1, 1},
	} {
		rule := Rule{}
		var sum uint64
		for _, w := range weights {
			rule.Backends = append(rule.Backends, WeightedBackend{Weight: w})
			sum += uint64(w)
		}
		// The numbers of a backend are consecutive: the first that is past it is found
		// by halving.
		begin := uint64(0)
		for i := range weights {
			low, high := begin, uint64(1)<<32
			for low < high {
				middle := (low + high) / 2
				if chosen := rule.Choose(uint32(middle)); chosen == nil {
					t.Fatalf("%v: nothing for %d", weights, middle)
				} else if index(rule.Backends, chosen) <= i {
					low = middle + 1
				} else {
					high = middle
				}
			}
			want := float64(uint64(weights[i])<<32) / float64(sum)
			if got := float64(low - begin); got < want-1 || got > want+1 {
				t.Errorf("%v: backend %d gets %.0f numbers, want %.1f", weights, i, got, want)
			}
			begin = low
		}
	}
}

func index(backends []WeightedBackend, b *WeightedBackend) int {
	for i := range backends {
		if &backends[i] == b {
			return i
		}
	}
	return -1
}

func TestNoBackendWithoutWeight(t *testing.T) {
	for _, rule := range []Rule{{}, {Backends: []WeightedBackend{{}, {}}}} {
		for _, n := range []uint32{0, 1, 1 << 31, 1<<32 - 1} {
			if rule.Choose(n) != nil {
				t.Errorf("%d backends of weight 0: one is chosen", len(rule.Backends))
			}
		}
	}
}

// TestMirrorShare: a mirror gets its percentage, or fraction, of the requests.
func TestMirrorShare(t *testing.T) {
	for _, m := range []Mirror{
		{Numerator: 0, Denominator: 100}, {Numerator: 20, Denominator: 100}, {Numerator: 1, Denominator: 3}, {Numerator: 100, Denominator: 100},
	} {
		const draws = 30_000
		meant := 0
		for i := range draws {
			if m.Meant(uint32(i * (1 << 32 / draws))) {
				meant++
			}
		}
		want := draws * int(m.Numerator) / int(m.Denominator)
		if meant < want-2 || meant > want+2 {
			t.Errorf("%d in %d: %d of %d requests are copied", m.Numerator, m.Denominator, meant, draws)
		}
	}
}

// TestMatchAllocatesNothing, whatever the conditions.
func TestMatchAllocatesNothing(t *testing.T) {
	routes := manyRoutes(t, 10)
	r := newRequest("GET /service-9/x?b=%41&a=c+d", "version: one", "user: 7")
	if n := testing.AllocsPerRun(100, func() {
		if rule, _ := routes.Match(r); rule == nil {
			t.Fatal("nothing matches")
		}
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

func manyRoutes(t testing.TB, n int) *Routes {
	routes := &Routes{Kind: HTTPRoute}
	for i := range n {
		routes.Rules = append(routes.Rules, Rule{})
		routes.Matches = append(routes.Matches, Match{
			Rule: i, Path: Path{Kind: PathPrefix, Value: fmt.Sprintf("/service-%d", i)}, Method: "GET",
			Headers: []Value{{Name: "version", Value: "one"}, {Name: "user", Regexp: whole(t, "[0-9]+")}},
			Query:   []Value{{Name: "a", Value: "c d"}},
		})
	}
	return routes
}

func BenchmarkMatch(b *testing.B) {
	for _, n := range []int{1, 16, 256} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			routes := manyRoutes(b, n)
			r := newRequest(fmt.Sprintf("GET /service-%d/x?b=1&a=c+d", n-1), "version: one", "user: 7")
			b.ReportAllocs()
			for b.Loop() {
				if rule, _ := routes.Match(r); rule == nil {
					b.Fatal("nothing matches")
				}
			}
		})
	}
}

// naive is Match, as one would first write it.
func naive(routes *Routes, r *request) int {
	is := func(text, exact string, expression *Regexp) bool {
		if expression != nil {
			return expression.Match([]byte(text))
		}
		return text == exact
	}
	hasPrefix := func(prefix string) bool {
		want, got := strings.Split(prefix, "/"), strings.Split(string(r.path), "/")
		return len(got) >= len(want) && strings.Join(got[:len(want)], "/") == prefix
	}
	parameter := func(name string) (string, bool) {
		for _, pair := range strings.Split(string(r.query), "&") {
			key, value, _ := strings.Cut(pair, "=")
			if decode(key) == name && pair != "" {
				return decode(value), true
			}
		}
		return "", false
	}
	met := func(m Match) bool {
		p, elements := string(r.path), strings.Split(string(r.path), "/")
		switch {
		case m.Path.Kind == PathExact && p != m.Path.Value,
			m.Path.Kind == PathPrefix && m.Path.Value != "" && !hasPrefix(m.Path.Value),
			m.Path.Kind == PathRegexp && !m.Path.Regexp.Match(r.path),
			m.Method != "" && m.Method != string(r.method):
			return false
		}
		if g := m.GRPC; g != nil {
			n := len(elements) - 1
			if elements[0] != "" || n < 2 {
				return false
			}
			service, method := strings.Join(elements[1:n], "/"), elements[n]
			if (g.Service != "" || g.ServiceRegexp != nil) && !is(service, g.Service, g.ServiceRegexp) ||
				(g.Method != "" || g.MethodRegexp != nil) && !is(method, g.Method, g.MethodRegexp) {
				return false
			}
		}
		seen := map[string]bool{}
		for _, v := range m.Headers {
			if value, ok := r.Header(v.Name); !seen[v.Name] && (!ok || !is(string(value), v.Value, v.Regexp)) {
				return false
			}
			seen[v.Name] = true
		}
		seen = map[string]bool{}
		for _, v := range m.Query {
			if value, ok := parameter(v.Name); !seen[v.Name] && (!ok || !is(value, v.Value, v.Regexp)) {
				return false
			}
			seen[v.Name] = true
		}
		return true
	}
	for i, m := range routes.Matches {
		if met(m) {
			return i
		}
	}
	return -1
}

// decode decodes a parameter; a percent sign before anything but two digits stands
// for itself.
func decode(text string) string {
	pieces := strings.Split(strings.ReplaceAll(text, "+", " "), "%")
	out := pieces[0]
	for _, piece := range pieces[1:] {
		if len(piece) >= 2 {
			if c, err := url.PathUnescape("%" + piece[:2]); err == nil {
				out += c + piece[2:]
				continue
			}
		}
		out += "%" + piece
	}
	return out
}

// FuzzMatch holds Match against naive, with random routes over the request's own
// words.
func FuzzMatch(f *testing.F) {
	f.Add(uint64(1), "GET", "/a/b", "a=b&c=%64+", "x", "y")
	f.Add(uint64(2), "POST", "/shop.Cart/Add", "", "version", "one")
	f.Add(uint64(3), "", "*", "%&=&%4&a", "", "")
	f.Fuzz(func(t *testing.T, seed uint64, method, path, query, header, value string) {
		r := rand.New(rand.NewPCG(seed, 0))
		words := []string{"", "/", method, path, header, value, decode(query), "a"}
		for _, text := range []string{path, query} {
			for _, word := range strings.FieldsFunc(text, func(c rune) bool { return strings.ContainsRune("/&=", c) }) {
				words = append(words, word, decode(word), "/"+word)
			}
		}
		word := func() string { return words[r.IntN(len(words))] }
		expression := func() *Regexp {
			if r.IntN(3) > 0 {
				return nil
			}
			compiled, err := CompileWhole([]string{".*", "[a-z/]*", ".", ""}[r.IntN(4)])
			if err != nil {
				t.Fatal(err)
			}
			return compiled
		}
		values := func() []Value {
			var out []Value
			for range r.IntN(3) {
				out = append(out, Value{Name: word(), Value: word(), Regexp: expression()})
			}
			return out
		}
		routes := &Routes{Rules: make([]Rule, 4)}
		for range r.IntN(6) {
			m := Match{Rule: r.IntN(4), Headers: values(), Query: values()}
			if m.Path.Kind = PathKind(r.IntN(4)); m.Path.Kind == PathRegexp {
				if m.Path.Regexp = expression(); m.Path.Regexp == nil {
					m.Path.Kind = PathAny
				}
			} else {
				m.Path.Value = strings.TrimSuffix(word(), "/")
			}
			if r.IntN(3) == 0 {
				m.Method = word()
			}
			if r.IntN(4) == 0 {
				m.GRPC = &Method{Service: word(), Method: word(), ServiceRegexp: expression(), MethodRegexp: expression()}
			}
			routes.Matches = append(routes.Matches, m)
		}
		req := &request{method: []byte(method), path: []byte(path), query: []byte(query), headers: []field{{[]byte(header), []byte(value)}}}
		rule, match := routes.Match(req)
		if want := naive(routes, req); want < 0 {
			if rule != nil || match != nil {
				t.Fatalf("%+v meets %+v", req, match)
			}
		} else if match != &routes.Matches[want] || rule != &routes.Rules[match.Rule] {
			t.Fatalf("%+v meets not %+v, but %+v", req, routes.Matches[want], match)
		}
		if !bytes.Equal(req.path, []byte(path)) || !bytes.Equal(req.query, []byte(query)) {
			t.Fatal("the request was changed")
		}
	})
}
