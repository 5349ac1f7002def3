package interop

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Ports of called.
const (
	nginxPort     = 8080
	nginxH2Port   = 8081
	haproxyPort   = 8082
	haproxyH2Port = 8083
)

// Ports of caller's loopback: clients that are servers of curl.
const (
	viaNginx10 = 9001 + iota
	viaNginx11
	viaHAProxy
	viaHAProxyH2
)

// The Services of called's nginx and HAProxy.
var (
	toNginx     = declare("nginx", nginxPort, "http")
	toNginxH2   = declare("nginx-h2", nginxH2Port, "kubernetes.io/h2c")
	toHAProxy   = declare("haproxy", haproxyPort, "http")
	toHAProxyH2 = declare("haproxy-h2", haproxyH2Port, "kubernetes.io/h2c")
)

// sizes of bodies, in bytes: each is a file of that name.
var sizes = []int{0, 1, 64<<10 - 1, 64 << 10, 64<<10 + 1, 100 << 20}

const nginxConf = `daemon off; pid %[1]s/nginx.pid; error_log stderr; worker_processes 1;
events { worker_connections 1024; }
http {
	access_log off; client_max_body_size 0; keepalive_requests 1000000;
	client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi; scgi_temp_path %[1]s/scgi;
	%[2]s
}
`

const haproxyConf = `global
	maxconn 1000
defaults
	mode http
	timeout connect 5s
	timeout client 30s
	timeout server 30s
`

// serveSite starts nginx and HAProxy in called, which end with the test. It returns
// the folder that nginx serves, and where it puts what is uploaded.
func serveSite(t *testing.T) string {
	t.Helper()
	files := folder(t)
	random := rand.NewChaCha8([32]byte{7})
	for _, size := range sizes {
		file, err := os.Create(filepath.Join(files, fmt.Sprint(size)))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.CopyN(file, random, int64(size)); err != nil {
			t.Fatal(err)
		}
		file.Close()
	}
	server := fmt.Sprintf("server { listen %[1]d; listen [::]:%[1]d; listen %[2]d http2; listen [::]:%[2]d http2; root %[3]s; dav_methods PUT; }", nginxPort, nginxH2Port, files)
	serve(t, called, "nginx", "-c", write(t, fmt.Sprintf(nginxConf, files, server), files, "nginx.conf"))
	serve(t, called, "haproxy", "-db", "-f", write(t, haproxyConf+fmt.Sprintf(`
frontend plain
	bind :%d
	default_backend nginx
frontend h2
	bind :%d proto h2
	default_backend nginx
backend nginx
	server nginx 127.0.0.1:%d
`, haproxyPort, haproxyH2Port, nginxPort), files, "haproxy.cfg"))
	for _, port := range []uint16{nginxPort, nginxH2Port, haproxyPort, haproxyH2Port} {
		listens(t, called, on(port))
	}
	return files
}

// serveClients starts nginx and HAProxy in caller, as clients of those in called.
func serveClients(t *testing.T, files string) {
	t.Helper()
	dir := folderIn(t, files, "clients")
	servers := fmt.Sprintf(`upstream kept { server %[1]s; keepalive 4; }
	server { listen 127.0.0.1:%[2]d; location / { proxy_pass http://%[1]s; } }
	server { listen 127.0.0.1:%[3]d; location / {
		proxy_pass http://kept; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_request_buffering off; } }`,
		toNginx, viaNginx10, viaNginx11)
	serve(t, caller, "nginx", "-c", write(t, fmt.Sprintf(nginxConf, dir, servers), dir, "nginx.conf"))
	serve(t, caller, "haproxy", "-db", "-f", write(t, haproxyConf+fmt.Sprintf(`
listen plain
	bind 127.0.0.1:%d
	server nginx %s
listen h2
	bind 127.0.0.1:%d
	server nginx %s proto h2
`, viaHAProxy, toNginx, viaHAProxyH2, toNginxH2), dir, "haproxy.cfg"))
	for port := uint16(viaNginx10); port <= viaHAProxyH2; port++ {
		listens(t, caller, loopback(port))
	}
}

func loopback(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
}

// TestBodiesArriveByteForByte, down and up, with their length said beforehand and
// in chunks.
func TestBodiesArriveByteForByte(t *testing.T) {
	throughBoth(t)
	files := serveSite(t)
	serveClients(t, files)
	for _, c := range []struct {
		name string
		to   netip.AddrPort
		curl string // option
	}{
		{"HTTP/1.0", toNginx, "--http1.0"},
		{"HTTP/1.1", toNginx, "--http1.1"},
		{"h2c", toNginxH2, "--http2-prior-knowledge"},
		{"HTTP/1.1 undeclared", on(nginxPort), "--http1.1"},
		{"h2c undeclared", on(nginxH2Port), "--http2-prior-knowledge"},
		{"HTTP/1.1 over IPv6", over6(toNginx), "--http1.1"},
		{"h2c over IPv6", over6(toNginxH2), "--http2-prior-knowledge"},
		{"HTTP/1.1 over IPv6 undeclared", on6(nginxPort), "--http1.1"},
		{"h2c over IPv6 undeclared", on6(nginxH2Port), "--http2-prior-knowledge"},
		{"HAProxy serves HTTP/1.1", toHAProxy, "--http1.1"},
		{"HAProxy serves h2c", toHAProxyH2, "--http2-prior-knowledge"},
		{"nginx asks in HTTP/1.0", loopback(viaNginx10), "--http1.1"},
		{"nginx asks in HTTP/1.1", loopback(viaNginx11), "--http1.1"},
		{"HAProxy asks in HTTP/1.1", loopback(viaHAProxy), "--http1.1"},
		{"HAProxy asks in h2c", loopback(viaHAProxyH2), "--http1.1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			// Without Expect: nginx does not say 100 in HTTP/2, and curl waits for it.
			curl := []string{"-sS", "--fail", "-H", "Expect:", c.curl}
			logged := len(accessLog.String())
			for _, size := range sizes {
				sent := filepath.Join(files, fmt.Sprint(size))
				got := filepath.Join(files, "got")
				mustCall(t, nil, "curl", append(curl, "-o", got, fmt.Sprintf("http://%s/%d", c.to, size))...)
				expectSame(t, fmt.Sprintf("%d bytes down", size), sent, got)

				mustCall(t, nil, "curl", append(curl, "-T", sent, fmt.Sprintf("http://%s/up", c.to))...)
				expectSame(t, fmt.Sprintf("%d bytes up", size), sent, filepath.Join(files, "up"))
				if c.curl == "--http1.0" {
					continue // it knows no chunks
				}
				file, err := os.Open(sent)
				if err != nil {
					t.Fatal(err)
				}
				mustCall(t, file, "curl", append(curl, "-T", "-", fmt.Sprintf("http://%s/up", c.to))...)
				file.Close()
				expectSame(t, fmt.Sprintf("%d bytes up in chunks", size), sent, filepath.Join(files, "up"))
			}
			if c.to.Addr().Is6() { // the test as a whole shows it of IPv4
				recordsOf(t, logged, caller, c.to)
			}
		})
	}
}

// expectSame compares two files, and removes the second: the next must be new.
func expectSame(t *testing.T, what, want, got string) {
	t.Helper()
	a, err := os.Open(want)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := os.Open(got)
	if err != nil {
		t.Errorf("%s: %v", what, err)
		return
	}
	defer b.Close()
	defer os.Remove(got)
	if at, same := compare(a, b); !same {
		t.Errorf("%s: the bytes differ from the block at %d on", what, at)
	}
}

// compare reports whether both have the same bytes, or the beginning of the first
// block that differs.
func compare(a, b io.Reader) (int64, bool) {
	const block = 64 << 10
	left, right := bufio.NewReaderSize(a, block), bufio.NewReaderSize(b, block)
	x, y := make([]byte, block), make([]byte, block)
	for at := int64(0); ; at += block {
		n, errA := io.ReadFull(left, x)
		m, errB := io.ReadFull(right, y)
		switch {
		case !bytes.Equal(x[:n], y[:m]):
			return at, false
		case errA != nil || errB != nil:
			return at, (errA != nil) == (errB != nil)
		}
	}
}

func TestCurlFindsWhatHTTPPromises(t *testing.T) {
	throughBoth(t)
	files := serveSite(t)
	file := func(size int) string { return fmt.Sprintf("http://%s/%d", toNginx, size) }
	t.Run("a part of a body", func(t *testing.T) {
		whole, err := os.ReadFile(filepath.Join(files, fmt.Sprint(64<<10)))
		if err != nil {
			t.Fatal(err)
		}
		head, body, _ := strings.Cut(mustCall(t, nil, "curl", "-sS", "-i", "-r", "1000-2999", file(64<<10)), "\r\n\r\n")
		if !strings.HasPrefix(head, "HTTP/1.1 206 ") || body != string(whole[1000:3000]) {
			t.Errorf("got %d bytes, want those from 1000 to 2999, with: %s", len(body), head)
		}
	})
	t.Run("HEAD, and GET on the same connection", func(t *testing.T) {
		out := mustCall(t, nil, "curl", "-sS", "-I", "-w", "connects %{num_connects}\n", file(100<<20),
			"--next", "-sS", "-o", "/dev/null", "-w", "connects %{num_connects} size %{size_download}\n", file(1))
		if !strings.Contains(out, "Content-Length: 104857600\r\n") || !strings.HasSuffix(out, "connects 1\nconnects 0 size 1\n") {
			t.Errorf("got: %s", out)
		}
	})
	t.Run("100 Continue before the body", func(t *testing.T) {
		out := mustCall(t, strings.NewReader("body"), "curl", "-sS", "-D", "-", "-H", "Expect: 100-continue", "--expect100-timeout", "20",
			"-w", "took %{time_total}", "-T", "-", fmt.Sprintf("http://%s/up", toNginx))
		var took float64
		if _, err := fmt.Sscanf(out[strings.LastIndex(out, "took"):], "took %f", &took); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(out, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 ") || took > 10 {
			t.Errorf("got: %s", out)
		}
	})
	t.Run("a final answer instead of 100 Continue", func(t *testing.T) {
		out := mustCall(t, strings.NewReader("body"), "curl", "-sS", "-D", "-", "-o", "/dev/null", "-H", "Expect: 100-continue", "--expect100-timeout", "20",
			"-X", "POST", "-T", "-", fmt.Sprintf("http://%s/1", toNginx))
		if !strings.HasPrefix(out, "HTTP/1.1 405 ") {
			t.Errorf("got: %s", out)
		}
	})
}

func TestLoadIsServedWithoutAnError(t *testing.T) {
	throughBoth(t)
	serveSite(t)
	t.Run("wrk", func(t *testing.T) {
		out := mustCall(t, nil, "wrk", "-t", "1", "-c", "32", "-d", "2s", fmt.Sprintf("http://%s/65536", toNginx))
		if strings.Contains(out, "errors") || strings.Contains(out, "Non-2xx") || !regexp.MustCompile(`[1-9]\d* requests in`).MatchString(out) {
			t.Error(out)
		}
	})
	for name, args := range map[string][]string{
		"h2load h2c":      {fmt.Sprintf("http://%s/65537", toNginxH2)},
		"h2load HTTP/1.1": {"--h1", fmt.Sprintf("http://%s/65537", toNginx)},
		"h2load HAProxy":  {fmt.Sprintf("http://%s/65537", toHAProxyH2)},
	} {
		t.Run(name, func(t *testing.T) {
			out := mustCall(t, nil, "h2load", append([]string{"-n", "2000", "-c", "8", "-m", "20"}, args...)...)
			if !strings.Contains(out, "2000 done, 2000 succeeded, 0 failed, 0 errored, 0 timeout") {
				t.Error(out)
			}
		})
	}
}
