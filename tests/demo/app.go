package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

// appCommand is the argument that makes this program a pod's application.
const appCommand = "app"

// appReady is the line an application prints once it listens.
const appReady = "listening"

// callTimeout bounds one call from one application to the next.
const callTimeout = 3 * time.Second

// app is one pod's application. It knows nothing of Weir.
type app struct {
	name string
	host string // the only Host it answers to; empty: any
	next string // URL of the Service it calls to answer; empty: none
	http http.Client

	failing atomic.Bool // it answers 503
}

// versionField is a header field that applications pass on, as they do with those
// of traces.
const versionField = "Version"

// callerField has a proxy tell the application who its caller is.
const callerField = "X-Forwarded-Client-Cert"

// sawField of an answer has a value for each application on the way: its name, and what
// came to it in callerField.
const sawField = "Saw"

// failPath, asked for, has an application answer 503 from then on.
const failPath = "/fail"

// runApp serves until ctx is done.
func runApp(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	// Without keep-alive each request is a connection, so that it has records of
	// its own.
	a := app{http: http.Client{Timeout: callTimeout, Transport: &http.Transport{DisableKeepAlives: true}}}
	fs := flag.NewFlagSet("demo app", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&a.name, "name", "", "`name` to answer with")
	fs.StringVar(&a.host, "host", "", "`host` to answer for")
	fs.StringVar(&a.next, "next", "", "`URL` to call for an answer")
	listen := fs.String("listen", ":8080", "`address` to listen on")
	if err := fs.Parse(args); err != nil {
		return err
	}
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		return fmt.Errorf("app %s: %w", a.name, err)
	}
	fmt.Fprintln(stdout, appReady)
	server := http.Server{Handler: &a, ReadHeaderTimeout: callTimeout}
	server.SetKeepAlivesEnabled(false)
	context.AfterFunc(ctx, func() { server.Close() })
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("app %s: %w", a.name, err)
	}
	return nil
}

// ServeHTTP answers with the names of all applications on the way.
func (a *app) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if a.host != "" && r.Host != a.host {
		http.Error(w, "no such host: "+r.Host, http.StatusNotFound)
		return
	}
	if r.URL.Path == failPath {
		a.failing.Store(true)
	}
	if a.failing.Load() {
		http.Error(w, "failing", http.StatusServiceUnavailable)
		return
	}
	w.Header().Add(sawField, a.name+" "+r.Header.Get(callerField))
	if a.next == "" {
		fmt.Fprint(w, a.name)
		return
	}
	answer, saw, err := a.call(r.Context(), r.Header.Get(versionField))
	if err != nil {
		http.Error(w, fmt.Sprintf("%s: %v", a.name, err), http.StatusBadGateway)
		return
	}
	for _, one := range saw {
		w.Header().Add(sawField, one)
	}
	fmt.Fprintf(w, "%s → %s", a.name, answer)
}

// call asks the next Service; beside its answer it returns what the applications on the
// way saw.
func (a *app) call(ctx context.Context, version string) (string, []string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.next, nil)
	if err != nil {
		return "", nil, err
	}
	if version != "" {
		req.Header.Set(versionField, version)
	}
	resp, err := a.http.Do(req)
	if err != nil {
		return "", nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return "", nil, fmt.Errorf("%s: %s", resp.Status, body)
	}
	return string(body), resp.Header.Values(sawField), nil
}
