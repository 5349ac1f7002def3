package relay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/route"
)

// serving2 is an application that speaks HTTP/2 with prior knowledge, and HTTP/1.
func serving2(t *testing.T, handler http.HandlerFunc) netip.AddrPort {
	t.Helper()
	server := httptest.NewUnstartedServer(handler)
	server.Config.Protocols = new(http.Protocols)
	server.Config.Protocols.SetHTTP1(true)
	server.Config.Protocols.SetUnencryptedHTTP2(true)
	server.Start()
	t.Cleanup(server.Close)
	return server.Listener.Addr().(*net.TCPAddr).AddrPort()
}

// speaking2 is an application that does not wait with its SETTINGS until its client has
// spoken, as gRPC's servers do not.
func speaking2(t *testing.T, handler http.HandlerFunc) netip.AddrPort {
	t.Helper()
	return accepting(t, func(c *net.TCPConn) {
		new(xhttp2.Server).ServeConn(c, &xhttp2.ServeConnOpts{Handler: handler}) //nolint:staticcheck // net/http's waits
	})
}

// client2 is a client with one connection, on which HTTP/2 is spoken after a pause. A request that
// comes as another ends makes net/http dial before it sees that the connection is free: it waits.
func (b *bench) client2(t *testing.T, d listen.Direction, original netip.AddrPort, pause time.Duration) *http.Client {
	t.Helper()
	var dialled atomic.Bool
	transport := &http.Transport{
		Protocols: new(http.Protocols),
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			if dialled.Swap(true) {
				select {
				case <-ctx.Done(): // the request's timeout, where none becomes free
				case <-t.Context().Done():
				}
				return nil, errors.New("a second connection")
			}
			c := b.conn(t, d, original)
			b.mu.Lock()
			b.clients = append(b.clients, c)
			b.mu.Unlock()
			time.Sleep(pause)
			return c, nil
		},
	}
	transport.Protocols.SetUnencryptedHTTP2(true)
	return &http.Client{
		Transport: transport, Timeout: patience,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// call sends a request and returns its answer, with the trailers, and the body.
func call(t *testing.T, c *http.Client, method, path, body string, fields ...string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://back"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(fields); i += 2 {
		req.Header.Set(fields[i], fields[i+1])
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(got)
}

func TestEachStreamIsBalancedByItself(t *testing.T) {
	named := func(name string) netip.AddrPort {
		return serving2(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, name, r.Proto, r.URL.Path) })
	}
	b := newBench(t, behind(named("a"), named("b")))
	client := b.client2(t, listen.Outbound, vip, 0)
	seen := map[string]int{}
	for range 40 {
		resp, body := call(t, client, "GET", "/hello?x", "")
		if resp.StatusCode != 200 {
			t.Fatal(resp)
		}
		seen[body]++
	}
	if len(seen) != 2 || seen["aHTTP/2.0/hello"] == 0 {
		t.Errorf("seen %v", seen)
	}
	records := b.ended(t)
	if len(records) != 40 {
		t.Fatalf("%d records", len(records))
	}
	for _, r := range records {
		if r.Protocol != "HTTP/2" || r.Method != "GET" || r.Path != "/hello" || r.Status != 200 || r.Reason != "" || r.Attempts != 1 {
			t.Errorf("record %v", r)
		}
	}
}

func TestAnInboundStreamReachesTheApplication(t *testing.T) {
	handler := func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("Trailer", "Grpc-Status")
		_, _ = w.Write(body)
		w.Header().Set("Grpc-Status", "0")
	}
	waits, speaks := serving2(t, handler), speaking2(t, handler)
	for _, way := range []struct {
		app   netip.AddrPort
		pause time.Duration
	}{
		{waits, 0},
		{waits, 50 * time.Millisecond}, // the connection to it is there before the client speaks
		{speaks, 0},
		{speaks, 50 * time.Millisecond}, // and it has spoken
	} {
		b := newBench(t, &fakeConfig{})
		client := b.client2(t, listen.Inbound, way.app, way.pause)
		want := string(bytes.Repeat([]byte("0123456789"), 100_000))
		for range 3 {
			resp, got := call(t, client, "POST", "/", want)
			if resp.StatusCode != 200 || got != want || resp.Trailer.Get("Grpc-Status") != "0" {
				t.Errorf("%d, %d bytes, trailers %v", resp.StatusCode, len(got), resp.Trailer)
			}
		}
		records := b.ended(t)
		if len(records) != 3 || records[0].GRPCStatus != "0" || records[0].SentBytes != 1_000_000 || records[0].Reason != "" {
			t.Errorf("records %v", records)
		}
	}
}

// TestAClientMayHaveMoreStreamsThanTheApplicationTakesOnAConnection: it is not to
// know how many those are, and its proxy gathers the streams of many connections.
func TestAClientMayHaveMoreStreamsThanTheApplicationTakesOnAConnection(t *testing.T) {
	const streams, limit = 60, 10
	var arrived sync.WaitGroup
	arrived.Add(streams)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/first" {
			return
		}
		arrived.Done()
		arrived.Wait() // all at a time
	}))
	server.Config.Protocols = new(http.Protocols)
	server.Config.Protocols.SetUnencryptedHTTP2(true)
	server.Config.HTTP2 = &http.HTTP2Config{MaxConcurrentStreams: limit}
	server.Start()
	t.Cleanup(server.Close)
	b := newBench(t, &fakeConfig{})
	client := b.client2(t, listen.Inbound, server.Listener.Addr().(*net.TCPAddr).AddrPort(), 0)
	call(t, client, "GET", "/first", "") // the connection is there
	answers := make(chan string, streams)
	for range streams {
		go func() {
			resp, err := client.Get("http://back/")
			if err != nil {
				answers <- err.Error()
				return
			}
			resp.Body.Close()
			answers <- resp.Status
		}()
	}
	for range streams {
		if answer := <-answers; answer != "200 OK" {
			t.Error(answer)
			arrived.Done() // the others do not wait for it
		}
	}
}

func TestAFailedCallOfGRPCHasItsStatus(t *testing.T) {
	slow := serving2(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := l.Addr().(*net.TCPAddr).AddrPort()
	l.Close()
	for _, c := range []struct {
		name         string
		endpoints    []netip.AddrPort
		edit         func(*route.Destination)
		status       int
		grpc, reason string
	}{
		{"nobody there", nil, nil, 503, "14", "no_endpoints"},
		{"port closed", []netip.AddrPort{closed}, nil, 503, "14", "connect_refused"},
		{"no answer", []netip.AddrPort{slow}, func(d *route.Destination) { d.Policy = &route.Policy{Timeout: 50 * time.Millisecond} }, 504, "4", "request_timeout"},
		{"no route", []netip.AddrPort{slow}, func(d *route.Destination) { d.Routes = &route.Routes{Kind: route.GRPCRoute} }, 404, "12", "route_not_found"},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := behind(c.endpoints...)
			if c.edit != nil {
				c.edit(&config.destination)
			}
			b := newBench(t, config)
			client := b.client2(t, listen.Outbound, vip, 0)
			resp, body := call(t, client, "POST", "/s/m", "x")
			if resp.StatusCode != c.status || !strings.HasPrefix(body, "weir: "+c.reason) || !strings.Contains(resp.Header.Get("Proxy-Status"), c.reason) {
				t.Errorf("%v %q", resp, body)
			}
			resp, body = call(t, client, "POST", "/s/m", "x", "content-type", "application/grpc+proto")
			if resp.StatusCode != 200 || body != "" || resp.Header.Get("Grpc-Status") != c.grpc || !strings.HasPrefix(resp.Header.Get("Grpc-Message"), "weir: "+c.reason) {
				t.Errorf("%v %q", resp, body)
			}
			records := b.ended(t)
			if len(records) != 2 || records[0].Reason != c.reason || records[0].Status != uint32(c.status) {
				t.Errorf("records %v", records)
			}
			if sent := c.reason == "request_timeout"; len(records) > 0 && (records[0].Attempts > 0 != sent || records[0].SentBytes > 0 != sent) {
				t.Errorf("%v says that it was sent: want %t", records[0], sent)
			}
		})
	}
}

// TestWhatAClientDoesWrongIsNotTheApplicationsFault in the records.
func TestWhatAClientDoesWrongIsNotTheApplicationsFault(t *testing.T) {
	app := serving2(t, func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
	for _, c := range []struct {
		name, want string
		then       func(*xhttp2.Framer, *net.TCPConn)
	}{
		{"ends its body early", "bad_request", func(f *xhttp2.Framer, _ *net.TCPConn) { _ = f.WriteData(1, true, []byte("1234")) }},
		{"breaks a rule of the connection", "bad_request", func(f *xhttp2.Framer, _ *net.TCPConn) { _ = f.WriteWindowUpdate(0, 0) }},
		{"hangs up", "client_gone", func(_ *xhttp2.Framer, c *net.TCPConn) { _ = c.CloseWrite() }},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, behind(app))
			conn := b.conn(t, listen.Outbound, vip)
			_, _ = io.WriteString(conn, xhttp2.ClientPreface)
			f := xhttp2.NewFramer(conn, conn)
			f.AllowIllegalWrites = true
			_ = f.WriteSettings()
			var block bytes.Buffer
			fields := hpack.NewEncoder(&block)
			for _, field := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":authority", "back"}, {":path", "/"}, {"content-length", "5"}} {
				_ = fields.WriteField(hpack.HeaderField{Name: field[0], Value: field[1]})
			}
			_ = f.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true})
			c.then(f, conn)
			for ended := false; !ended; { // a stream or the connection
				frame, err := f.ReadFrame()
				_, reset := frame.(*xhttp2.RSTStreamFrame)
				ended = err != nil || reset
			}
			b.clients = append(b.clients, conn)
			if records := b.ended(t); len(records) != 1 || records[0].Reason != c.want {
				t.Errorf("records %v, want the reason %s", records, c.want)
			}
		})
	}
}

func TestAStreamIsRoutedAndTriedAgain(t *testing.T) {
	var calls atomic.Int32
	flaky := serving2(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if calls.Add(1) == 1 {
			w.WriteHeader(503)
		}
		fmt.Fprint(w, "v2 ", r.URL.Path, " ", r.Host, " ", string(body))
	})
	v1 := serving2(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "v1") })
	config := behind(v1)
	to := func(addr netip.AddrPort) []route.WeightedBackend {
		return []route.WeightedBackend{{Weight: 1, Backend: route.Backend{Service: "shop/x", Endpoints: []route.Endpoint{{Addr: addr}}}}}
	}
	config.destination.Routes = &route.Routes{
		Kind:    route.HTTPRoute,
		Matches: []route.Match{{Rule: 0, Headers: []route.Value{{Name: "version", Value: "2"}}}, {Rule: 1}},
		Rules: []route.Rule{
			{Backends: to(flaky), Retry: &route.Retry{Attempts: 1, Codes: []uint16{503}}, Filters: route.Filters{
				Rewrite:         &route.Rewrite{Hostname: "other", Path: &route.PathChange{Value: "/new"}},
				ResponseHeaders: &route.HeaderChange{Set: []route.Header{{Name: "x-app", Value: "2"}}},
			}},
			{Backends: to(v1)},
		},
	}
	b := newBench(t, config)
	client := b.client2(t, listen.Outbound, vip, 0)
	if resp, body := call(t, client, "PUT", "/a?b", "body", "version", "2"); resp.StatusCode != 200 || body != "v2 /new other body" || resp.Header.Get("X-App") != "2" {
		t.Errorf("%v %q", resp, body)
	}
	if resp, body := call(t, client, "PUT", "/a?b", "body"); resp.StatusCode != 200 || body != "v1" {
		t.Errorf("%v %q", resp, body)
	}
	if records := b.ended(t); len(records) != 2 || records[0].Attempts != 2 || records[0].Status != 200 {
		t.Errorf("records %v", records)
	}
}

// TestADrainingProxySaysSoToHTTP2: streams that are under way are not lost.
func TestADrainingProxySaysSoToHTTP2(t *testing.T) {
	begun, goOn := make(chan struct{}), make(chan struct{})
	app := serving2(t, func(w http.ResponseWriter, _ *http.Request) {
		close(begun)
		<-goOn
		fmt.Fprint(w, "done")
	})
	b := newBench(t, behind(app))
	client := b.client2(t, listen.Outbound, vip, 0)
	got := make(chan string, 1)
	go func() {
		_, body := call(t, client, "GET", "/", "")
		got <- body
	}()
	<-begun
	b.drain()
	close(goOn)
	if body := <-got; body != "done" {
		t.Errorf("%q", body)
	}
	b.clients = nil // the connection ends by itself
	b.ended(t)
}
