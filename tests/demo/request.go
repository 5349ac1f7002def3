package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"
)

// userHost is what the user asks for.
const userHost = "app.example.com"

// userTimeout is the user's patience.
const userTimeout = 5 * time.Second

// answered is a request as the user sees it.
type answered struct {
	local  netip.AddrPort // the user's end of the connection
	status int
	body   string
	took   time.Duration
	err    error // no answer, or not 200
}

// request asks the ingress for the user's page, on a connection of its own. version,
// if not empty, goes into the header.
func request(ctx context.Context, ingress netip.AddrPort, version string) answered {
	ctx, cancel := context.WithTimeout(ctx, userTimeout)
	defer cancel()
	began := time.Now()
	var a answered
	a.local, a.status, a.body, a.err = get(ctx, ingress, "/", version)
	a.took = time.Since(began)
	if a.err == nil && a.status != http.StatusOK {
		a.err = fmt.Errorf("%d: %s", a.status, a.body)
	}
	return a
}

func get(ctx context.Context, to netip.AddrPort, path, version string) (netip.AddrPort, int, string, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", to.String())
	if err != nil {
		return netip.AddrPort{}, 0, "", err
	}
	defer conn.Close()
	local := conn.LocalAddr().(*net.TCPAddr).AddrPort()
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return conn, nil },
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+userHost+path, nil)
	if err != nil {
		return local, 0, "", err
	}
	if version != "" {
		req.Header.Set(versionField, version)
	}
	resp, err := client.Do(req)
	if err != nil {
		return local, 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return local, resp.StatusCode, strings.TrimSpace(string(body)), err
}
