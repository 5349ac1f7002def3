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

// settled is how long a route may take to reach the proxies.
const settled = 10 * time.Second

// A letter is what a request to a route of the suite's must lead to, to the letter.
// The suite's tests name it, too, and then compare neither Location nor the path
// that the application saw (compareRequest in its utils/echo).
type letter struct {
	url  string
	want string // "status Location", or "status path" that the application saw
}

// letters are by the manifest of the route, in the suite's tests/mesh.
var letters = []struct {
	manifest string
	letters  []letter
}{
	{"httproute-redirect-path.yaml", []letter{
		{"echo/original-prefix/lemon?a=b", "302 http://echo/replacement-prefix/lemon?a=b"},
		{"echo/original-prefix", "302 http://echo/replacement-prefix"},
		{"echo/full/path/original", "302 http://echo/full-path-replacement"},
		{"echo/path-and-host", "302 http://example.org/replacement-prefix"},
		{"echo/path-and-status", "301 http://echo/replacement-prefix"},
		{"echo/full-path-and-host", "302 http://example.org/replacement-full"},
		{"echo/full-path-and-status", "301 http://echo/replacement-full"},
	}},
	{"httproute-redirect-port.yaml", []letter{
		{"echo/port", "302 http://echo:8083/port"},
		{"echo/port-and-host", "302 http://example.org:8083/port-and-host"},
		{"echo/port-and-status", "301 http://echo:8083/port-and-status"},
		{"echo/port-and-host-and-status", "302 http://example.org:8083/port-and-host-and-status"},
	}},
	{"httproute-redirect-scheme.yaml", []letter{
		{"echo/scheme?a=b", "302 https://echo/scheme?a=b"},
		{"echo/scheme-and-host", "302 https://example.org/scheme-and-host"},
		{"echo/scheme-and-status", "301 https://echo/scheme-and-status"},
		{"echo/scheme-and-host-and-status", "302 https://example.org/scheme-and-host-and-status"},
	}},
	{"httproute-redirect-host-and-status.yaml", []letter{
		{"echo/hostname-redirect", "302 http://example.org/hostname-redirect"},
		{"echo/host-and-status", "301 http://example.org/host-and-status"},
	}},
	{"httproute-303-redirect.yaml", []letter{{"echo/redirect", "303 http://echo/redirect"}}},
	{"httproute-307-redirect.yaml", []letter{{"echo/temporary", "307 http://echo/temporary"}}},
	{"httproute-308-redirect.yaml", []letter{{"echo/permanent", "308 http://echo/permanent"}}},
	{"httproute-rewrite-path.yaml", []letter{
		{"echo/prefix/one/two?a=b", "200 /one/two?a=b"},
		{"echo/prefix/one", "200 /one"},
		{"echo/strip-prefix/three", "200 /three"},
		{"echo/strip-prefix/", "200 /"},
		{"echo/strip-prefix", "200 /"},
		{"echo/full/one/two?a=b", "200 /one?a=b"},
		{"echo/full/rewrite-path-and-modify-headers/test", "200 /test"},
		{"echo/prefix/rewrite-path-and-modify-headers/one", "200 /prefix/one"},
		{"echo/strip-prefixes", "404 "}, // prefixes go by path element
	}},
}

// byTheLetter sends each letter's request, from a pod of the suite's, and returns how
// many led where they must. The error names those that did not.
func byTheLetter(ctx context.Context, c *cluster.Cluster, manifests string) (int, error) {
	right := 0
	var wrong []error
	for _, l := range letters {
		manifest := filepath.Join(manifests, l.manifest)
		if _, err := c.Kubectl(ctx, "apply", "-f", manifest); err != nil {
			return right, err
		}
		for _, letter := range l.letters {
			if err := letter.check(ctx, c); err != nil {
				wrong = append(wrong, fmt.Errorf("%s: %s: %w", l.manifest, letter.url, err))
				continue
			}
			right++
		}
		if _, err := c.Kubectl(ctx, "delete", "-f", manifest); err != nil {
			return right, err
		}
	}
	return right, errors.Join(wrong...)
}

// check asks until the answer is the right one.
func (l letter) check(ctx context.Context, c *cluster.Cluster) error {
	for began := time.Now(); ; time.Sleep(200 * time.Millisecond) {
		said, err := c.Kubectl(ctx, "-n", meshNamespace, "exec", "deployment/echo-v1", "--", "client", "http://"+l.url)
		got := ledTo(string(said))
		switch {
		case err != nil && time.Since(began) > settled:
			return err
		case err == nil && got == l.want:
			return nil
		case err == nil && time.Since(began) > settled:
			return fmt.Errorf("it led to %q, not %q", got, l.want)
		}
	}
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
