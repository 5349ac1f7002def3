package relay

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weirmesh/weir/proxy/balance"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/route"
)

// narrow is an application that takes one stream of HTTP/2 on a connection, and counts
// how many requests it serves at a time.
type narrow struct {
	addr      netip.AddrPort
	now, most atomic.Int32
}

func newNarrow(t *testing.T, serve http.HandlerFunc) *narrow {
	t.Helper()
	n := &narrow{}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		now := n.now.Add(1)
		for most := n.most.Load(); now > most && !n.most.CompareAndSwap(most, now); most = n.most.Load() {
		}
		serve(w, r)
		n.now.Add(-1)
		fmt.Fprint(w, "served") // the first byte of the answer
	}))
	server.Config.Protocols = new(http.Protocols)
	server.Config.Protocols.SetHTTP1(true)
	server.Config.Protocols.SetUnencryptedHTTP2(true)
	server.Config.HTTP2 = &http.HTTP2Config{MaxConcurrentStreams: 1}
	server.Start()
	t.Cleanup(server.Close)
	n.addr = server.Listener.Addr().(*net.TCPAddr).AddrPort()
	return n
}

// limited is a Service whose clients have so many connections, and so many that wait
// for one.
func limited(connections, pending int, endpoints ...netip.AddrPort) *fakeConfig {
	config := behind(endpoints...)
	config.destination.Policy = &route.Policy{Name: "shop/narrow", Limits: route.Limits{Connections: connections, Pending: pending}}
	return config
}

// inLine waits until so many stand in line for the bench's Service.
func (b *bench) inLine(t *testing.T, want int) {
	t.Helper()
	backend := b.Config.(*fakeConfig).destination.Backend()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		b.lines.mu.Lock()
		got := len(b.lines.of[ownerOf(&backend)])
		b.lines.mu.Unlock()
		if got == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d stand in line, not %d", got, want)
		}
	}
}

// allLeft checks, when everything has ended, that nothing is counted any more.
func (b *bench) allLeft(t *testing.T) {
	t.Helper()
	backend := b.Config.(*fakeConfig).destination.Backend()
	limits := backend.Policy.Limits
	for what, n := range map[balance.Resource]int{balance.Connections: limits.Connections, balance.Pending: limits.Pending} {
		for i := range n {
			if !b.balancer.Admit(&backend, what) {
				t.Errorf("when all has ended, %d of resource %d are held", n-i, what)
				break
			}
		}
	}
	for _, e := range backend.Endpoints {
		if n := b.balancer.Active(e.Addr); n != 0 {
			t.Errorf("%d requests to %s are under way", n, e.Addr)
		}
	}
}

// try is a request on a connection of its own, in that version of HTTP; 0 is one that
// the proxy does not look into. It returns the answer's status and Proxy-Status, or why
// there is none.
func (b *bench) try(t *testing.T, version int) string {
	t.Helper()
	if version == 2 {
		resp, err := b.client2(t, listen.Outbound, vip, 0).Get("http://back/")
		if err != nil {
			return err.Error()
		}
		defer resp.Body.Close()
		_, _ = io.Copy(io.Discard, resp.Body) // what is closed before its end is broken off
		return fmt.Sprint(resp.StatusCode, resp.Header.Get("Proxy-Status"))
	}
	client := b.conn(t, listen.Outbound, vip)
	defer client.Close()
	_, _ = io.WriteString(client, "GET / HTTP/1.1\r\nHost: back\r\nConnection: close\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(client), nil)
	if err != nil {
		return "no answer" // by a reset, which reading sees unless writing has seen it
	}
	resp.Body.Close()
	return fmt.Sprint(resp.StatusCode, resp.Header.Get("Proxy-Status"))
}

// carrying has a test for each version that try knows.
func carrying(t *testing.T, config func() *fakeConfig, test func(t *testing.T, b *bench, version int)) {
	for version, name := range []string{"TCP", "HTTP/1", "HTTP/2"} {
		t.Run(name, func(t *testing.T) {
			config := config()
			if version == 0 {
				config.destination.Protocol = route.Opaque
			}
			b := newBench(t, config)
			test(t, b, version)
			b.ended(t)
			b.allLeft(t)
		})
	}
}

// together starts n of them, and returns what waits for their results.
func together(n int, try func() string) func() []string {
	results := make(chan string, n)
	for range n {
		go func() { results <- try() }()
	}
	return func() []string {
		var out []string
		for range n {
			out = append(out, <-results)
		}
		return out
	}
}

// all checks that each result begins so.
func all(t *testing.T, results []string, want string) {
	t.Helper()
	for _, got := range results {
		if !strings.HasPrefix(got, want) {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// TestNoMoreConnectionsThanThePolicySays, however many ask; each is served.
func TestNoMoreConnectionsThanThePolicySays(t *testing.T) {
	var app *narrow
	carrying(t, func() *fakeConfig {
		app = newNarrow(t, func(http.ResponseWriter, *http.Request) { time.Sleep(2 * time.Millisecond) })
		return limited(3, 100, app.addr)
	}, func(t *testing.T, b *bench, version int) {
		all(t, together(60, func() string { return b.try(t, version) })(), "200")
		if most := app.most.Load(); most > 3 {
			t.Errorf("%d connections at a time", most)
		}
	})
}

// TestWhoIsTooManyIsRefusedAtOnce, with the reason; those before wait, and are served
// when there is a connection.
func TestWhoIsTooManyIsRefusedAtOnce(t *testing.T) {
	var goOn chan struct{}
	var app *narrow
	carrying(t, func() *fakeConfig {
		goOn = make(chan struct{})
		app = newNarrow(t, func(http.ResponseWriter, *http.Request) { <-goOn })
		return limited(1, 2, app.addr)
	}, func(t *testing.T, b *bench, version int) {
		try := func() string { return b.try(t, version) }
		first := together(1, try)
		for app.now.Load() == 0 {
			time.Sleep(time.Millisecond)
		}
		waiting := together(2, try)
		b.inLine(t, 2)
		refused := "503weir; error=connection_limit_reached; details=\"circuit_open: a limit of the Service's TrafficPolicy: by TrafficPolicy shop/narrow: all 1 connections are in use, and 2 wait for one\""
		if version == 0 {
			refused = "no answer"
		}
		all(t, together(3, try)(), refused)
		close(goOn)
		all(t, first(), "200")
		all(t, waiting(), "200")
		if most := app.most.Load(); most != 1 {
			t.Errorf("%d at a time", most)
		}
		reasons := map[string]int{}
		for _, r := range b.ended(t) {
			reasons[r.Reason]++
		}
		if reasons["circuit_open"] != 3 || reasons[""] != 3 {
			t.Errorf("reasons %v", reasons)
		}
	})
}

// TestWaitingForAConnectionEnds with the time there is for one, or for the request,
// and when the client has left.
func TestWaitingForAConnectionEnds(t *testing.T) {
	for _, c := range []struct {
		name             string
		connect, request time.Duration
		reset            bool
		want             [3]string // of TCP, HTTP/1 and HTTP/2
		reason           string
	}{
		{"no connection in time", 50 * time.Millisecond, 0, false, [3]string{"no answer", "503", "503"}, "circuit_open"},
		{"the request's time", time.Minute, 50 * time.Millisecond, false, [3]string{"", "504", "504"}, "request_timeout"},
		{"the client has left", time.Minute, 0, true, [3]string{}, "client_gone"},
	} {
		t.Run(c.name, func(t *testing.T) {
			carrying(t, func() *fakeConfig {
				config := limited(1, 2, newNarrow(t, func(http.ResponseWriter, *http.Request) {}).addr)
				config.destination.Policy.Timeout = c.request
				return config
			}, func(t *testing.T, b *bench, version int) {
				if version == 0 && c.want[0] == "" {
					t.Skip("a connection that is passed on as it is has no time, and is not looked at")
				}
				b.dialer.Timeout = c.connect
				backend := b.Config.(*fakeConfig).destination.Backend()
				place, _ := b.takePlace(&backend)
				if c.reset {
					ctx, cancel := context.WithCancel(t.Context())
					left := b.leaver(t, ctx, version)
					b.inLine(t, 1)
					cancel()
					<-left
				} else if got := b.try(t, version); !strings.HasPrefix(got, c.want[version]) {
					t.Errorf("%q, want %q", got, c.want[version])
				}
				if records := b.ended(t); len(records) != 1 || records[0].Reason != c.reason || records[0].Attempts != 0 {
					t.Errorf("records %v", records)
				}
				place.leave()
				b.inLine(t, 0)
			})
		})
	}
}

// leaver sends a request in that version of HTTP, and breaks it off when ctx is done;
// then it closes what it returns.
func (b *bench) leaver(t *testing.T, ctx context.Context, version int) <-chan struct{} {
	t.Helper()
	left := make(chan struct{})
	if version == 2 {
		client := b.client2(t, listen.Outbound, vip, 0)
		go func() {
			defer close(left)
			req, _ := http.NewRequestWithContext(ctx, "GET", "http://back/", nil)
			if resp, err := client.Do(req); err == nil {
				resp.Body.Close()
				t.Errorf("%v", resp)
			}
		}()
		return left
	}
	client := b.conn(t, listen.Outbound, vip)
	_, _ = io.WriteString(client, hello)
	go func() {
		defer close(left)
		<-ctx.Done()
		_ = client.SetLinger(0)
		client.Close()
	}()
	return left
}

// TestFirstComeFirstServed: those who wait come before those who come.
func TestFirstComeFirstServed(t *testing.T) {
	const n = 10
	var mu sync.Mutex
	var served []string
	app := newNarrow(t, func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		served = append(served, r.URL.Path)
	})
	b := newBench(t, limited(1, n, app.addr))
	backend := b.Config.(*fakeConfig).destination.Backend()
	place, _ := b.takePlace(&backend)
	var want []string
	for i := range n {
		client := b.conn(t, listen.Outbound, vip)
		want = append(want, fmt.Sprint("/", i))
		fmt.Fprintf(client, "GET %s HTTP/1.1\r\nHost: back\r\n\r\n", want[i])
		b.inLine(t, i+1)
		b.clients = append(b.clients, client)
	}
	place.leave()
	b.inLine(t, 0)
	for _, c := range b.clients {
		answered(t, bufio.NewReader(c), "GET")
	}
	if !slices.Equal(served, want) {
		t.Errorf("served in this order: %v", served)
	}
	b.ended(t)
	b.allLeft(t)
}

// TestAnIdleConnectionGivesWay to one that is needed elsewhere, whatever it carried.
// One may wait: a client has its answer a moment before the connection is idle.
func TestAnIdleConnectionGivesWay(t *testing.T) {
	apps := []*narrow{newNarrow(t, func(http.ResponseWriter, *http.Request) {}), newNarrow(t, func(http.ResponseWriter, *http.Request) {})}
	config := limited(1, 1, apps[0].addr, apps[1].addr)
	config.destination.Policy.Balance = route.RoundRobin
	b := newBench(t, config)
	for i := range 12 {
		if got := b.try(t, 1+i%2); got != "200" {
			t.Errorf("number %d: %q", i, got)
		}
	}
	b.ended(t)
	b.allLeft(t)
}

// TestStreamsGoWhereThereIsRoom: with fewer connections than endpoints, streams that
// last do not wait for one to the endpoint that would be next.
func TestStreamsGoWhereThereIsRoom(t *testing.T) {
	const streams = 20
	var arrived sync.WaitGroup
	arrived.Add(streams)
	wide := func() netip.AddrPort {
		return serving2(t, func(http.ResponseWriter, *http.Request) {
			arrived.Done()
			arrived.Wait() // all at a time
		})
	}
	b := newBench(t, limited(2, streams, wide(), wide(), wide(), wide()))
	all(t, together(streams, func() string {
		got := b.try(t, 2)
		if got != "200" {
			arrived.Done() // the others do not wait for it
		}
		return got
	})(), "200")
	b.ended(t)
	b.allLeft(t)
}

// TestAConnectionThatFailsLeavesItsPlace.
func TestAConnectionThatFailsLeavesItsPlace(t *testing.T) {
	carrying(t, func() *fakeConfig { return limited(1, 0, closedPort(t)) }, func(t *testing.T, b *bench, version int) {
		for range 3 {
			want := "503weir; error=connection_refused"
			if version == 0 {
				want = "no answer"
			}
			all(t, []string{b.try(t, version)}, want)
		}
		for _, r := range b.ended(t) {
			if r.Reason != "connect_refused" {
				t.Errorf("record %v", r)
			}
		}
	})
}
