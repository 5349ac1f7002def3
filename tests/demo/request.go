package main

import (
	"context"
	"errors"
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

// answered is a request as who made it sees it.
type answered struct {
	local       netip.AddrPort // the caller's end of the connection
	status      int
	body        string
	proxyStatus string            // Proxy-Status (RFC 9209)
	saw         map[string]string // by application, what came to it in callerField
	took        time.Duration
	err         error // no answer, or of request: not 200
}

// String is what went wrong, or what was answered.
func (a answered) String() string {
	if a.err != nil {
		return a.err.Error()
	}
	return fmt.Sprintf("%d: %s", a.status, a.body)
}

// request asks the ingress for the user's page, on a connection of its own. version,
// if not empty, goes into the header.
func request(ctx context.Context, ingress netip.AddrPort, version string) answered {
	a := get(ctx, ingress, "/", version)
	if a.err == nil && a.status != http.StatusOK {
		a.err = errors.New(a.String())
	}
	return a
}

// get asks for a path, from the network namespace that its thread is in.
func get(ctx context.Context, to netip.AddrPort, path, version string) answered {
	ctx, cancel := context.WithTimeout(ctx, userTimeout)
	defer cancel()
	began := time.Now()
	var a answered
	a.err = a.ask(ctx, to, path, version)
	a.took = time.Since(began)
	return a
}

func (a *answered) ask(ctx context.Context, to netip.AddrPort, path, version string) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", to.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	a.local = conn.LocalAddr().(*net.TCPAddr).AddrPort()
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return conn, nil },
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+userHost+path, nil)
	if err != nil {
		return err
	}
	if version != "" {
		req.Header.Set(versionField, version)
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	a.status, a.body, a.proxyStatus = resp.StatusCode, strings.TrimSpace(string(body)), resp.Header.Get("Proxy-Status")
	a.saw = map[string]string{}
	for _, value := range resp.Header.Values(sawField) {
		name, caller, _ := strings.Cut(value, " ")
		a.saw[name] = caller
	}
	return err
}
