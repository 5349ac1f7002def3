package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"time"

	"github.com/weirmesh/weir/tests/cluster"
)

// meshNamespace is the suite's, with its applications echo-v1 and echo-v2.
const meshNamespace = "gateway-conformance-mesh"

// settled is how long a route may take to reach the proxies, and to be judged.
const settled = 10 * time.Second

// A letter is what a request to a route of the suite's must lead to, to the letter.
// The suite's tests name it, too, and then compare neither Location nor the path
// that the application saw (compareRequest in its utils/echo).
type letter struct {
	url  string
	want string // "status Location", or "status path" that the application saw
}

// letters are by the manifest of the route, in the suite's tests/mesh.
var letters = map[string][]letter{
	"httproute-redirect-path.yaml": {
		{"echo/original-prefix/lemon?a=b", "302 http://echo/replacement-prefix/lemon?a=b"},
		{"echo/original-prefix", "302 http://echo/replacement-prefix"},
		{"echo/full/path/original", "302 http://echo/full-path-replacement"},
		{"echo/path-and-host", "302 http://example.org/replacement-prefix"},
		{"echo/path-and-status", "301 http://echo/replacement-prefix"},
		{"echo/full-path-and-host", "302 http://example.org/replacement-full"},
		{"echo/full-path-and-status", "301 http://echo/replacement-full"},
	},
	"httproute-redirect-port.yaml": {
		{"echo/port", "302 http://echo:8083/port"},
		{"echo/port-and-host", "302 http://example.org:8083/port-and-host"},
		{"echo/port-and-status", "301 http://echo:8083/port-and-status"},
		{"echo/port-and-host-and-status", "302 http://example.org:8083/port-and-host-and-status"},
	},
	"httproute-redirect-scheme.yaml": {
		{"echo/scheme?a=b", "302 https://echo/scheme?a=b"},
		{"echo/scheme-and-host", "302 https://example.org/scheme-and-host"},
		{"echo/scheme-and-status", "301 https://echo/scheme-and-status"},
		{"echo/scheme-and-host-and-status", "302 https://example.org/scheme-and-host-and-status"},
	},
	"httproute-redirect-host-and-status.yaml": {
		{"echo/hostname-redirect", "302 http://example.org/hostname-redirect"},
		{"echo/host-and-status", "301 http://example.org/host-and-status"},
	},
	"httproute-303-redirect.yaml": {{"echo/redirect", "303 http://echo/redirect"}},
	"httproute-307-redirect.yaml": {{"echo/temporary", "307 http://echo/temporary"}},
	"httproute-308-redirect.yaml": {{"echo/permanent", "308 http://echo/permanent"}},
	"httproute-rewrite-path.yaml": {
		{"echo/prefix/one/two?a=b", "200 /one/two?a=b"},
		{"echo/prefix/one", "200 /one"},
		{"echo/strip-prefix/three", "200 /three"},
		{"echo/strip-prefix/", "200 /"},
		{"echo/strip-prefix", "200 /"},
		{"echo/full/one/two?a=b", "200 /one?a=b"},
		{"echo/full/rewrite-path-and-modify-headers/test", "200 /test"},
		{"echo/prefix/rewrite-path-and-modify-headers/one", "200 /prefix/one"},
		{"echo/strip-prefixes", "404 "}, // prefixes go by path element
	},
}

// byTheLetter applies each manifest of the suite's mesh tests for a while. It looks at
// the status of its routes, of which the suite's tests ask nothing, and sends each
// letter's request from a pod of the suite's. It returns how much of that was as it
// must be; the error names what was not.
func byTheLetter(ctx context.Context, c *cluster.Cluster, manifests string) (int, error) {
	files, err := filepath.Glob(filepath.Join(manifests, "*.yaml"))
	if err != nil {
		return 0, err
	}
	right, found := 0, 0
	var wrong []error
	note := func(what string, err error) {
		if err != nil {
			wrong = append(wrong, fmt.Errorf("%s: %w", what, err))
			return
		}
		right++
	}
	for _, file := range files {
		name := filepath.Base(file)
		if _, err := c.Kubectl(ctx, "apply", "-f", file); err != nil {
			return right, err
		}
		note(name+": status", eventually(func() error { return judged(ctx, c, file) }))
		if _, ok := letters[name]; ok {
			found++
		}
		for _, l := range letters[name] {
			note(name+": "+l.url, eventually(func() error { return l.check(ctx, c) }))
		}
		if _, err := c.Kubectl(ctx, "delete", "-f", file); err != nil {
			return right, err
		}
	}
	if found < len(letters) {
		wrong = append(wrong, fmt.Errorf("of %d manifests %d are in %s", len(letters), found, manifests))
	}
	return right, errors.Join(wrong...)
}

// eventually asks until there is no error, or the last one counts.
func eventually(check func() error) error {
	for began := time.Now(); ; time.Sleep(200 * time.Millisecond) {
		if err := check(); err == nil || time.Since(began) > settled {
			return err
		}
	}
}

func (l letter) check(ctx context.Context, c *cluster.Cluster) error {
	said, err := c.Kubectl(ctx, "-n", meshNamespace, "exec", "deployment/echo-v1", "--", "client", "http://"+l.url)
	if err != nil {
		return err
	}
	if got := ledTo(string(said)); got != l.want {
		return fmt.Errorf("it led to %q, not %q", got, l.want)
	}
	return nil
}

var (
	statusLine   = regexp.MustCompile(`(?m)^\[0\] StatusCode=(\d+)$`)
	locationLine = regexp.MustCompile(`(?m)^\[0\] ResponseHeader=Location:(.*)$`)
	urlLine      = regexp.MustCompile(`(?m)^\[0 body\] URL=(.*)$`)
)

// ledTo reads what echo's client prints, as a letter wants it.
func ledTo(said string) string {
	first := func(line *regexp.Regexp) string {
		if match := line.FindStringSubmatch(said); match != nil {
			return match[1]
		}
		return ""
	}
	return first(statusLine) + " " + first(locationLine) + first(urlLine)
}
