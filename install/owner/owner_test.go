package owner

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	daemonSetPath = "/apis/apps/v1/namespaces/weir-system/daemonsets/weir-agent"
	namespacePath = "/api/v1/namespaces/weir-system"

	there  = `{"kind":"PartialObjectMetadata","metadata":{"name":"%s"}}`
	ending = `{"kind":"PartialObjectMetadata","metadata":{"name":"%s","deletionTimestamp":"2026-01-02T03:04:05Z"}}`
	gone   = `{"kind":"Status","status":"Failure","reason":"NotFound","code":404,"details":{"name":"%s"},"message":"not found"}`
	noPath = `{"kind":"Status","status":"Failure","reason":"NotFound","code":404,"details":{},"message":"the server could not find the requested resource"}`
	denied = `{"kind":"Status","status":"Failure","reason":"Forbidden","code":403,"message":"forbidden: no right"}`
)

// reply is what the API server says about one object.
type reply struct {
	code int
	body string
}

func about(code int, format, name string) reply {
	return reply{code, strings.ReplaceAll(format, "%s", name)}
}

// serve is an API server that asks for the token and gives the replies.
func serve(t *testing.T, handle http.HandlerFunc) *Owner {
	t.Helper()
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer secret" || !strings.Contains(r.Header.Get("Accept"), "PartialObjectMetadata") {
			http.Error(w, `{"message":"unauthorized"}`, http.StatusUnauthorized)
			return
		}
		handle(w, r)
	}))
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	account := t.TempDir()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	for name, content := range map[string][]byte{"token": []byte("secret\n"), "ca.crt": ca} {
		if err := os.WriteFile(filepath.Join(account, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return &Owner{namespace: "weir-system", daemonSet: "weir-agent", server: server.URL, account: account}
}

func TestDeleted(t *testing.T) {
	dsThere, nsThere := about(200, there, "weir-agent"), about(200, there, "weir-system")
	for _, tt := range []struct {
		name   string
		ds, ns reply
		want   bool
		says   string // error
	}{
		{"both are there: a restart", dsThere, nsThere, false, ""},
		{"the DaemonSet is gone", about(404, gone, "weir-agent"), nsThere, true, ""},
		{"the DaemonSet is being deleted", about(200, ending, "weir-agent"), nsThere, true, ""},
		{"the namespace is being deleted, the DaemonSet not yet", dsThere, about(200, ending, "weir-system"), true, ""},
		{"the namespace is gone", about(404, gone, "weir-agent"), about(404, gone, "weir-system"), true, ""},
		{"one is deleted and the other not to be asked", reply{403, denied}, about(200, ending, "weir-system"), true, ""},
		{"no right", reply{403, denied}, reply{403, denied}, false, "no right"},
		{"no right to one", reply{403, denied}, nsThere, false, "no right"},
		{"a server that knows no such path", reply{404, noPath}, nsThere, false, "could not find"},
		{"about another", about(404, gone, "other"), nsThere, false, "HTTP 404"},
		{"not the API server", reply{404, "not found"}, reply{404, "not found"}, false, "HTTP 404"},
		{"another object", about(200, there, "other"), nsThere, false, "HTTP 200"},
		{"an error", reply{500, `{"kind":"Status","message":"etcd"}`}, nsThere, false, "etcd"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := serve(t, func(w http.ResponseWriter, r *http.Request) {
				answer := map[string]reply{daemonSetPath: tt.ds, namespacePath: tt.ns}[r.URL.Path]
				w.WriteHeader(answer.code)
				fmt.Fprint(w, answer.body)
			})
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			got, err := o.Deleted(ctx)
			if got != tt.want {
				t.Errorf("deleted is %v, want %v", got, tt.want)
			}
			if tt.says == "" && err != nil || tt.says != "" && (!errors.Is(err, ErrUnknown) || !strings.Contains(err.Error(), tt.says)) {
				t.Errorf("error %v, want %q", err, tt.says)
			}
		})
	}
}

func TestDeletedWithoutAnAnswer(t *testing.T) {
	silent := serve(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	away := &Owner{namespace: "weir-system", daemonSet: "weir-agent", server: "https://127.0.0.1:1", account: silent.account}
	noAccount := &Owner{namespace: "weir-system", daemonSet: "weir-agent", server: silent.server, account: t.TempDir()}
	for name, o := range map[string]*Owner{"silent": silent, "away": away, "no account": noAccount} {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if got, err := o.Deleted(ctx); got || !errors.Is(err, ErrUnknown) {
			t.Errorf("%s: %v, %v; want ErrUnknown", name, got, err)
		}
	}
}

func TestDeletedAsksAgain(t *testing.T) {
	var asked atomic.Int32
	o := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		if asked.Add(1) <= 2 {
			http.Error(w, "{}", http.StatusServiceUnavailable)
			return
		}
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, about(404, gone, "weir-agent").body)
	})
	if got, err := o.Deleted(t.Context()); !got || err != nil {
		t.Errorf("%v, %v; want deleted", got, err)
	}
}

// TestWatchRemembers: the namespace is deleted, and then every right is gone.
func TestWatchRemembers(t *testing.T) {
	for name, last := range map[string]string{
		"being deleted": `{"type":"MODIFIED","object":` + about(200, ending, "weir-system").body + `}`,
		"gone":          `{"type":"DELETED","object":` + about(200, there, "weir-system").body + `}`,
	} {
		t.Run(name, func(t *testing.T) {
			deleting, connected := make(chan struct{}), make(chan struct{}, 1)
			o := serve(t, func(w http.ResponseWriter, r *http.Request) {
				q := r.URL.Query()
				if q.Get("watch") != "1" || q.Get("fieldSelector") != "metadata.name=weir-system" {
					w.WriteHeader(http.StatusForbidden)
					fmt.Fprint(w, denied)
					return
				}
				fmt.Fprintln(w, `{"type":"ADDED","object":`+about(200, there, "weir-system").body+`}`)
				w.(http.Flusher).Flush()
				connected <- struct{}{}
				<-deleting
				fmt.Fprintln(w, last)
			})
			watched := make(chan struct{})
			go func() {
				o.Watch(t.Context())
				close(watched)
			}()
			<-connected
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			if got, err := o.Deleted(ctx); got || err == nil {
				t.Errorf("before: %v, %v", got, err)
			}
			close(deleting)
			<-watched
			if got, err := o.Deleted(ctx); !got || err != nil {
				t.Errorf("after: %v, %v; want deleted", got, err)
			}
		})
	}
}

// TestWatchEnds: with its context, while it waits for a server and while it waits
// for an event.
func TestWatchEnds(t *testing.T) {
	for name, handle := range map[string]http.HandlerFunc{
		"refused": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) },
		"silent":  func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
	} {
		t.Run(name, func(t *testing.T) {
			o := serve(t, handle)
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			o.Watch(ctx)
			if o.leaving.Load() {
				t.Error("remembers a deletion that was not")
			}
		})
	}
}
