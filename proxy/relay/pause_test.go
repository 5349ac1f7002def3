package relay

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/route"
)

// soon is much less than the pauses below, and enough for a machine that is busy.
const soon = 4 * time.Second

// failing is a Service whose one endpoint always answers 503, and whose policy has
// requests tried again after a pause of at least 10 s.
func failing(t *testing.T) (*fakeConfig, *atomic.Int32) {
	var calls atomic.Int32
	app := serving2(t, func(w http.ResponseWriter, _ *http.Request) {
		calls.Add(1)
		w.WriteHeader(503)
		fmt.Fprint(w, "the application's own words")
	})
	config := behind(app)
	config.destination.Policy = &route.Policy{Retry: &route.Retry{Attempts: 5, Codes: []uint16{503}, Backoff: 20 * time.Second}}
	return config, &calls
}

// TestNoPauseIsLongerThanTheTimeThereIs: a retry that could only begin when the
// request's time is over is none, and the client gets the answer there is.
func TestNoPauseIsLongerThanTheTimeThereIs(t *testing.T) {
	for _, version := range []int{1, 2} {
		t.Run(fmt.Sprint("HTTP/", version), func(t *testing.T) {
			config, calls := failing(t)
			config.destination.Policy.Timeout = 9 * time.Second
			b := newBench(t, config)
			began := time.Now()
			var resp *http.Response
			var body string
			if version == 1 {
				client := b.conn(t, listen.Outbound, vip)
				resp, body = say(t, client, bufio.NewReader(client), hello, "GET")
				client.Close()
			} else {
				resp, body = call(t, b.client2(t, listen.Outbound, vip, 0), "GET", "/", "")
			}
			if resp.StatusCode != 503 || body != "the application's own words" || calls.Load() != 1 || time.Since(began) > soon {
				t.Errorf("%v %q after %s, %d attempts", resp, body, time.Since(began), calls.Load())
			}
			if records := b.ended(t); len(records) != 1 || records[0].Reason != "" || records[0].Attempts != 1 {
				t.Errorf("records %v", records)
			}
		})
	}
}

// TestAPauseEndsWithItsClient, and gives back what the retry counts for.
func TestAPauseEndsWithItsClient(t *testing.T) {
	for name, leave := range map[string]func(*testing.T, *bench, func()) string{
		"HTTP/1 reset": func(t *testing.T, b *bench, asked func()) string {
			client := b.conn(t, listen.Outbound, vip)
			_, _ = io.WriteString(client, hello)
			asked()
			_ = client.SetLinger(0)
			client.Close()
			return "client_gone"
		},
		"HTTP/1 ended by the proxy": func(t *testing.T, b *bench, asked func()) string {
			client := b.conn(t, listen.Outbound, vip)
			_, _ = io.WriteString(client, hello)
			asked()
			b.abortAll()
			return "shutdown"
		},
		"HTTP/2 lost": func(t *testing.T, b *bench, asked func()) string {
			client := b.client2(t, listen.Outbound, vip, 0)
			go func() {
				if resp, err := client.Get("http://back/"); err == nil {
					resp.Body.Close()
					t.Errorf("%v", resp)
				}
			}()
			asked()
			for _, c := range b.clients {
				c.Close()
			}
			return "client_gone"
		},
		"HTTP/2 reset": func(t *testing.T, b *bench, asked func()) string {
			ctx, cancel := context.WithCancel(t.Context())
			client := b.client2(t, listen.Outbound, vip, 0)
			gone := make(chan struct{})
			go func() {
				defer close(gone)
				req, _ := http.NewRequestWithContext(ctx, "GET", "http://back/", nil)
				if resp, err := client.Do(req); err == nil {
					resp.Body.Close()
					t.Errorf("%v", resp)
				}
			}()
			asked()
			cancel()
			<-gone
			return "client_gone"
		},
	} {
		t.Run(name, func(t *testing.T) {
			config, calls := failing(t)
			b := newBench(t, config)
			backend := config.destination.Backend()
			var left time.Time
			want := leave(t, b, func() {
				for calls.Load() == 0 {
					time.Sleep(time.Millisecond)
				}
				time.Sleep(50 * time.Millisecond) // its answer has arrived, and is not wanted
				left = time.Now()
			})
			records := b.ended(t)
			if took := time.Since(left); took > soon {
				t.Errorf("it ended after %s", took)
			}
			if len(records) != 1 || records[0].Reason != want || calls.Load() != 1 {
				t.Errorf("%d attempts, records %v", calls.Load(), records)
			}
			for range 3 { // as many as are always allowed
				if !b.balancer.RetryBegin(&backend) {
					t.Error("its retry still counts")
				}
			}
			if b.balancer.Active(backend.Endpoints[0].Addr) != 0 {
				t.Error("its request still counts")
			}
		})
	}
}

// ask is a request in that version of HTTP, with its answer and the body of that; the
// connection is not used again.
func (b *bench) ask(t *testing.T, version int, method, body string) (*http.Response, string) {
	t.Helper()
	if version == 2 {
		return call(t, b.client2(t, listen.Outbound, vip, 0), method, "/", body)
	}
	client := b.conn(t, listen.Outbound, vip)
	defer client.Close()
	go fmt.Fprintf(client, "%s / HTTP/1.1\r\nHost: back\r\nContent-Length: %d\r\n\r\n%s", method, len(body), body)
	return answered(t, bufio.NewReader(client), method)
}

// TestAnAttemptThatTakesTooLongIsTriedAgain, where it may be: the time of an attempt
// is not the request's.
func TestAnAttemptThatTakesTooLongIsTriedAgain(t *testing.T) {
	retry := &route.Retry{Attempts: 1}
	for _, c := range []struct {
		promise, method string
		body            int
		retry           *route.Retry
		status          int
		attempts        uint32
	}{
		{"without a body", "GET", 0, retry, 200, 2},
		{"with its body", "PUT", 4, retry, 200, 2},
		{"not without a policy", "GET", 0, nil, 504, 1},
		{"not what is not idempotent", "POST", 4, retry, 504, 1},
		{"not a body that is larger than what is kept", "PUT", 200_000, retry, 504, 1},
	} {
		for _, version := range []int{1, 2} {
			t.Run(fmt.Sprintf("%s, HTTP/%d", c.promise, version), func(t *testing.T) {
				var calls atomic.Int32
				given := make(chan bool, 1)
				app := func() netip.AddrPort {
					return serving2(t, func(w http.ResponseWriter, r *http.Request) {
						body, err := io.ReadAll(r.Body)
						if calls.Add(1) == 1 {
							<-r.Context().Done()
							given <- true
							return
						}
						if err == nil {
							_, _ = w.Write(body)
						}
					})
				}
				config := behind(app(), app())
				config.destination.Routes = &route.Routes{Kind: route.HTTPRoute, Matches: []route.Match{{}}, Rules: []route.Rule{{
					BackendTimeout: 400 * time.Millisecond, Retry: c.retry, Backends: []route.WeightedBackend{{Weight: 1, Backend: config.destination.Backend()}},
				}}}
				b := newBench(t, config)
				want := strings.Repeat("x", c.body)
				resp, body := b.ask(t, version, c.method, want)
				if resp.StatusCode != c.status || c.status == 200 && body != want || c.status == 504 && !strings.Contains(resp.Header.Get("Proxy-Status"), "http_response_timeout") {
					t.Errorf("%v %.100q", resp, body)
				}
				<-given // up: the first endpoint is told
				if records := b.ended(t); len(records) != 1 || records[0].Attempts != c.attempts || records[0].Status != uint32(c.status) {
					t.Errorf("records %v", records)
				}
			})
		}
	}
}
