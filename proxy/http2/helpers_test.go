package http2_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/weirmesh/weir/proxy/http2"
)

func TestMain(m *testing.M) {
	if name := os.Getenv("HTTP2_HELPER"); name != "" {
		os.Exit(helper(name))
	}
	goleak.VerifyTestMain(m)
}

// relay is a proxy for the tests: every stream goes to one backend, unless handle
// says otherwise.
type relay struct {
	addr   string
	client *http2.Client
	server http2.Server
	poller *http2.Poller

	mu       sync.Mutex
	conns    []*http2.ServerConn
	ended    []error // what Serve returned
	outcomes chan http2.Outcome
}

// newRelay listens on the loopback. Change fields in setup, which may be nil.
func newRelay(t testing.TB, backend string, setup func(*relay)) *relay {
	t.Helper()
	r := &relay{outcomes: make(chan http2.Outcome, 1000), poller: newPoller(t)}
	r.client = &http2.Client{
		Dial:   func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "tcp", backend) },
		Poller: r.polled,
	}
	r.server = http2.Server{
		Handler: func(turn *http2.Turn, s *http2.Stream) {
			s.Observer = &watcher{relay: r}
			r.client.Open(turn, s, s.Request)
		},
		Poller: r.polled,
	}
	if setup != nil {
		setup(r)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r.addr = ln.Addr().String()
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			c := r.server.NewConn(nc, nil)
			r.mu.Lock()
			r.conns = append(r.conns, c)
			r.mu.Unlock()
			serving.Go(func() {
				err := c.Serve()
				r.mu.Lock()
				r.ended = append(r.ended, err)
				r.mu.Unlock()
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		r.mu.Lock()
		for _, c := range r.conns {
			c.Close()
		}
		r.mu.Unlock()
		r.client.Close()
		serving.Wait()
	})
	return r
}

// newPoller serves until the test's other cleaning up is done.
func newPoller(t testing.TB) *http2.Poller {
	t.Helper()
	p, err := http2.NewPoller(func() {})
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(p.Run)
	t.Cleanup(func() {
		p.Close()
		running.Wait()
	})
	return p
}

// polled chooses the one poller.
func (r *relay) polled() *http2.Poller { return r.poller }

// drain begins the end of every connection.
func (r *relay) drain() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.conns {
		c.Drain()
	}
}

// end waits for the first connection to end, and returns why.
func (r *relay) end(t testing.TB) error {
	t.Helper()
	var err error
	eventually(t, "the connection ends", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(r.ended) == 0 {
			return false
		}
		err = r.ended[0]
		return true
	})
	return err
}

func (r *relay) outcome(t testing.TB) http2.Outcome {
	t.Helper()
	select {
	case o := <-r.outcomes:
		return o
	case <-time.After(10 * time.Second):
		t.Fatal("no stream ends")
		panic("unreachable")
	}
}

// watcher is the observer of a stream. Its fields stand for decisions of the glue.
type watcher struct {
	relay    *relay
	response func(*http2.Turn, *http2.Stream, int, []http2.Field) ([]http2.Field, bool)
	failed   func(*http2.Turn, *http2.Stream, http2.Failure) bool
}

func (w *watcher) Response(turn *http2.Turn, s *http2.Stream, status int, fields []http2.Field) ([]http2.Field, bool) {
	if w.response != nil {
		return w.response(turn, s, status, fields)
	}
	return fields, true
}

func (w *watcher) Failed(turn *http2.Turn, s *http2.Stream, f http2.Failure) bool {
	return w.failed != nil && w.failed(turn, s, f)
}

func (w *watcher) Done(_ *http2.Stream, o http2.Outcome) {
	select {
	case w.relay.outcomes <- o:
	default: // nobody wants so many
	}
}

// serveHTTP is a backend of net/http, on HTTP/2 without TLS.
func serveHTTP(t testing.TB, h http.HandlerFunc) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{Handler: h, Protocols: &protocols, HTTP2: &http.HTTP2Config{MaxConcurrentStreams: 1000}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(ln)
	}()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
	return ln.Addr().String()
}

// httpClient is one of net/http's, on HTTP/2 without TLS.
func httpClient(t testing.TB) *http.Client {
	t.Helper()
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: &protocols, DisableCompression: true}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 30 * time.Second}
}

func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

func get(t testing.TB, c *http.Client, url string) (int, string) {
	t.Helper()
	resp, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}
