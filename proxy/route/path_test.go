package route

import (
	"bytes"
	"strings"
	"testing"
)

func TestCanonicalPath(t *testing.T) {
	for path, want := range map[string]string{
		"":                         "/",
		"/":                        "/",
		"*":                        "*",
		"/a/b":                     "/a/b",
		"/a/":                      "/a/",
		"/.well-known/..a/a../...": "/.well-known/..a/a../...",
		"/a;b=c:d@e!$&'()*+,~-._":  "/a;b=c:d@e!$&'()*+,~-._",
		// Repeated slashes.
		"//":       "/",
		"//a///b/": "/a/b/",
		// Dot segments, RFC 3986, 5.2.4.
		"/a/./b":      "/a/b",
		"/a/../b":     "/b",
		"/a/b/..":     "/a/",
		"/a/.":        "/a/",
		"/..":         "/",
		"/../../a":    "/a",
		"/a/b/../../": "/",
		"/a//../b":    "/b", // slashes are merged first
		// Escapes.
		"/%61%2D%2e%5f%7E":     "/a-._~",
		"/%41":                 "/A",
		"/a/%2E%2E/b":          "/b",
		"/a/%2e%2E/b":          "/b",
		"/a/.%2e/%2e/b":        "/b",
		"/%2f%2F":              "/%2F%2F",
		"/a%2f../b":            "/a%2F../b",
		"/%c3%a9":              "/%C3%A9",
		"/%3B%25":              "/%3B%25",
		"/%252e%252e/":         "/%252e%252e/", // decoded once
		"/é\\ \"<>[]^`{|}?#\r": "/%C3%A9%5C%20%22%3C%3E%5B%5D%5E%60%7B%7C%7D%3F%23%0D",
	} {
		if got, ok := CanonicalPath([]byte(path)); !ok || string(got) != want {
			t.Errorf("%q is %q, %t; want %q", path, got, ok, want)
		}
	}
	for _, path := range []string{"/%", "/%4", "/%zz", "/a%4g", "/%-1", "/\x00", "/a%00b", "//%", "a", "a/b", "**", "?", "%2F"} {
		if got, ok := CanonicalPath([]byte(path)); ok {
			t.Errorf("%q is %q", path, got)
		}
	}
}

func TestCanonicalPathIsNotCopied(t *testing.T) {
	path := []byte("/a/.b/c..d/%2F%C3%A9/")
	if n := testing.AllocsPerRun(100, func() {
		if got, ok := CanonicalPath(path); !ok || &got[0] != &path[0] {
			t.Fatal("a copy")
		}
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkCanonicalPath(b *testing.B) {
	path := []byte("/api/v2/customers/1234/orders/5678.json")
	b.ReportAllocs()
	for b.Loop() {
		CanonicalPath(path)
	}
}

func FuzzCanonicalPath(f *testing.F) {
	for _, path := range []string{"/", "", "*", "/a/../b", "//a/%2e%2E/%2F%c3", "/a/./", "/%zz", "/..", "/é/..;/"} {
		f.Add([]byte(path))
	}
	f.Fuzz(func(t *testing.T, path []byte) {
		before := bytes.Clone(path)
		got, ok := CanonicalPath(path)
		if !bytes.Equal(path, before) {
			t.Fatal("the path was changed")
		}
		if !ok {
			return
		}
		again, ok := CanonicalPath(got)
		if !ok || !bytes.Equal(again, got) {
			t.Fatalf("%q is %q, and that is %q", path, got, again)
		}
		if s := string(got) + "/"; s != "*/" && s[0] != '/' || strings.Contains(string(got), "//") ||
			strings.Contains(s, "/../") || strings.Contains(s, "/./") || strings.ContainsAny(s, "\x00\r\n ?#\\") {
			t.Fatalf("%q is %q", path, got)
		}
	})
}

func TestPathChange(t *testing.T) {
	prefix := func(p string) *Match { return &Match{Path: Path{Kind: PathPrefix, Value: strings.TrimSuffix(p, "/")}} }
	for _, test := range []struct {
		path, prefix, value, want string
	}{
		// The table of HTTPPathModifier, Gateway API v1.6.
		{"/foo/bar", "/foo", "/xyz", "/xyz/bar"},
		{"/foo/bar", "/foo", "/xyz/", "/xyz/bar"},
		{"/foo/bar", "/foo/", "/xyz", "/xyz/bar"},
		{"/foo/bar", "/foo/", "/xyz/", "/xyz/bar"},
		{"/foo", "/foo", "/xyz", "/xyz"},
		{"/foo/", "/foo", "/xyz", "/xyz/"},
		{"/foo/bar", "/foo", "", "/bar"},
		{"/foo/", "/foo", "", "/"},
		{"/foo", "/foo", "", "/"},
		{"/foo/", "/foo", "/", "/"},
		{"/foo", "/foo", "/", "/"},
		// The prefix "/".
		{"/", "/", "/xyz", "/xyz/"},
		{"/a/b", "/", "/xyz", "/xyz/a/b"},
		{"", "/", "/xyz", "/xyz"},
		// The prefix is found however it is written, and the rest stays as it came.
		{"//%66oo//a%2fb//%7E", "/foo", "/xyz", "/xyz//a%2fb//%7E"},
		{"/a//b/c", "/a/b", "/xyz", "/xyz/c"},
		{"/a//b", "/a/b", "/xyz", "/xyz"},
		{"/foo//bar", "/foo", "", "/bar"},
		{"/foo/http://example.com/", "/foo", "/", "/http://example.com/"},
		// Dot segments lead nowhere else.
		{"/foo/../foo/bar", "/foo", "/xyz", "/xyz/bar"},
		{"/a/../foo/%2e/bar", "/foo", "/xyz", "/xyz/bar"},
		{"/../foo", "/", "/xyz", "/xyz/foo"},
		{"/foo/a/..", "/foo", "/xyz", "/xyz/"},
		// What a value cannot be, it is not.
		{"/foo/bar", "/foo", "xyz", "/xyz/bar"},
		{"/foo/bar", "/foo", "//evil.example", "/evil.example/bar"},
		{"/foo/bar", "/foo", "/x?y#z\r\n é%20", "/x%3Fy%23z%0D%0A%20%C3%A9%20/bar"},
	} {
		got := (&PathChange{Prefix: true, Value: test.value}).Apply([]byte(test.path), prefix(test.prefix))
		if string(got) != test.want {
			t.Errorf("%q with prefix %q replaced by %q: %q, want %q", test.path, test.prefix, test.value, got, test.want)
		}
	}
	for _, test := range []struct {
		name       string
		change     PathChange
		match      Match
		path, want string
	}{
		{"the full path", PathChange{Value: "/one"}, Match{}, "/a/b", "/one"},
		{"the full path, of an exact match", PathChange{Value: "/one/"}, Match{Path: Path{Kind: PathExact, Value: "/a"}}, "/a", "/one/"},
		{"the full path, by none", PathChange{}, Match{}, "/a/b", "/"},
		{"the full path, by one without a slash", PathChange{Value: "one?"}, Match{}, "/a/b", "/one%3F"},
		{"any path has the prefix /", PathChange{Prefix: true, Value: "/x"}, Match{}, "/a", "/x/a"},
		{"no prefix matched", PathChange{Prefix: true, Value: "/x"}, Match{Path: Path{Kind: PathExact, Value: "/a"}}, "/a", "/a"},
		{"what is no path has no prefix", PathChange{Prefix: true, Value: "/x"}, Match{}, "*", "*"},
	} {
		if got := test.change.Apply([]byte(test.path), &test.match); string(got) != test.want {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}
}

// FuzzPathChange: whatever is replaced, the outcome is the canonical path with its
// prefix replaced.
func FuzzPathChange(f *testing.F) {
	f.Add([]byte("/foo/../foo/bar"), "/foo", "/xyz")
	f.Add([]byte("//%66oo//a"), "/foo", "")
	f.Fuzz(func(t *testing.T, path []byte, prefix, value string) {
		canonical, ok := CanonicalPath(path)
		wanted, ok2 := CanonicalPath([]byte(value))
		m := &Match{Path: Path{Kind: PathPrefix, Value: prefix}}
		if !ok || !ok2 || len(path) == 0 || path[0] != '/' || string(wanted) != value || value == "*" || !m.Path.meets(canonical) ||
			strings.HasSuffix(prefix, "/") {
			return
		}
		rest := canonical[len(prefix):]
		want, _ := CanonicalPath(append([]byte(value), rest...))
		got := (&PathChange{Prefix: true, Value: value}).Apply(path, m)
		if final, ok := CanonicalPath(got); !ok || !bytes.Equal(final, want) || bytes.HasPrefix(got, []byte("//")) {
			t.Fatalf("%q with prefix %q replaced by %q: %q, want %q", path, prefix, value, got, want)
		}
	})
}
