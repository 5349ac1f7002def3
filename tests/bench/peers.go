package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/weirmesh/weir/tests/pod"
)

// Programs of Debian that are measured against, or with.
const (
	nginx   = "/usr/sbin/nginx"
	haproxy = "/usr/sbin/haproxy"
	wrk     = "/usr/bin/wrk"
	h2load  = "/usr/bin/h2load"
)

// Where the applications listen: for HTTP/1, for HTTP/2, for who wants bytes, and for
// who has some.
const (
	appPort = 8080 + iota
	streamsPort
	sourcePort
	sinkPort
)

// nexts are where a proxy leads to, from four ports in a row.
type nexts struct{ requests, streams, source, sink netip.AddrPort }

// reverseCommand starts the ReverseProxy.
const reverseCommand = "reverse-proxy"

// nginxConfig is nginx with one worker, without logs.
const nginxConfig = `daemon off;
worker_processes 1;
pid %[1]s.pid;
error_log stderr crit;
events { worker_connections 4096; }
http {
  access_log off;
  client_body_temp_path %[1]s.body; proxy_temp_path %[1]s.proxy; fastcgi_temp_path %[1]s.fastcgi;
  uwsgi_temp_path %[1]s.uwsgi; scgi_temp_path %[1]s.scgi;
  keepalive_requests 1000000000;
  keepalive_timeout 1h;
%[2]s}
`

// appConfig answers everything with 1 KB.
func appConfig() string {
	return fmt.Sprintf("  server { listen %d reuseport; listen %d http2 reuseport; http2_max_concurrent_streams 256; location / { return 200 %q; } }\n",
		appPort, streamsPort, strings.Repeat("x", 1024))
}

// startNginx has nginx started in p's namespace and returns its worker.
func (d *dataplane) startNginx(ctx context.Context, p *pod.Pod, name, servers string, start func(*pod.Pod, *exec.Cmd) error) (int, error) {
	base := filepath.Join(d.dir, p.ContainerID+"-"+name)
	if err := os.WriteFile(base+".conf", fmt.Appendf(nil, nginxConfig, base, servers), 0o644); err != nil {
		return 0, err
	}
	cmd := exec.CommandContext(ctx, nginx, "-e", "stderr", "-c", base+".conf", "-p", d.dir)
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := start(p, cmd); err != nil {
		return 0, err
	}
	go func() { _ = cmd.Wait() }()
	for range 200 {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", cmd.Process.Pid))
		if err != nil {
			return 0, fmt.Errorf("nginx: %w: %s", err, said.String())
		}
		if pid, err := strconv.Atoi(strings.TrimSpace(string(children))); err == nil {
			return pid, nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return 0, fmt.Errorf("nginx has no worker: %s", said.String())
}

func (d *dataplane) nginxProxy(ctx context.Context, p *pod.Pod, port uint16, to nexts) (int, error) {
	return d.startNginx(ctx, p, "proxy", fmt.Sprintf(`  upstream next { server %s; keepalive 256; keepalive_requests 1000000000; keepalive_timeout 1h; }
  server { listen %d reuseport; location / { proxy_pass http://next; proxy_http_version 1.1; proxy_set_header Connection ""; } }
`, to.requests, port), d.startProxy)
}

func (d *dataplane) haproxy(ctx context.Context, p *pod.Pod, port uint16, to nexts) (int, error) {
	file := filepath.Join(d.dir, p.ContainerID+"-haproxy.conf")
	config := fmt.Sprintf(`global
  nbthread 1
  maxconn 4096
  tune.pipesize 1048576
defaults
  mode http
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  http-reuse always
listen requests
  bind :%d
  server next %s
listen streams
  bind :%d proto h2
  server next %s proto h2
listen source
  mode tcp
  option splice-request
  option splice-response
  bind :%d
  server next %s
listen sink
  mode tcp
  option splice-request
  option splice-response
  bind :%d
  server next %s
`, port, to.requests, port+1, to.streams, port+2, to.source, port+3, to.sink)
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		return 0, err
	}
	cmd := exec.CommandContext(ctx, haproxy, "-db", "-q", "-f", file)
	if err := d.startProxy(p, cmd); err != nil {
		return 0, err
	}
	go func() { _ = cmd.Wait() }()
	return cmd.Process.Pid, nil
}

func (d *dataplane) reverse(ctx context.Context, p *pod.Pod, port uint16, to nexts) (int, error) {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "dataplane", reverseCommand, fmt.Sprint(":", port), "http://"+to.requests.String())
	cmd.Env = append(os.Environ(), "GOMAXPROCS=2")
	if err := d.startProxy(p, cmd); err != nil {
		return 0, err
	}
	go func() { _ = cmd.Wait() }()
	return cmd.Process.Pid, nil
}

// reverseProxy is net/http's, well configured.
func reverseProxy(ctx context.Context, args []string) error {
	if len(args) != 2 {
		return errors.New("reverse-proxy LISTEN URL")
	}
	to, err := url.Parse(args[1])
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	server := &http.Server{Handler: &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(to) },
		Transport: &http.Transport{MaxIdleConnsPerHost: 256},
	}}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	return server.Serve(listener)
}

// awaitAnswer returns once a lane leads to the application.
func awaitAnswer(ctx context.Context, l lane) error {
	var last error
	for range 100 {
		last = askOnce(l)
		if last == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
	return last
}

// askOnce sends one request on a connection of its own.
func askOnce(l lane) error {
	var c net.Conn
	err := pod.In(l.client, func() error {
		var err error
		c, err = net.DialTimeout("tcp", l.target.String(), time.Second)
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", l.target); err != nil {
		return err
	}
	return readAnswer(bufio.NewReader(c))
}
