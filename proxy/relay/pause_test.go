package relay

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
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
			if records := b.ended(t); len(records) != 1 || records[0].GetReason() != "" || records[0].GetAttempts() != 1 {
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
			if len(records) != 1 || records[0].GetReason() != want || calls.Load() != 1 {
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
