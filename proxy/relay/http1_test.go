package relay

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
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

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/agent/journal"
	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/route"
	"github.com/weirmesh/weir/proxy/sock/socktest"
	"github.com/weirmesh/weir/proxy/telemetry"
)

// serving is an application that speaks HTTP.
func serving(t *testing.T, handler http.HandlerFunc) netip.AddrPort {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return server.Listener.Addr().(*net.TCPAddr).AddrPort()
}

// scripted is an application that does with each connection what play says.
func scripted(t testing.TB, play func(*net.TCPConn, *bufio.Reader)) netip.AddrPort {
	t.Helper()
	return accepting(t, func(c *net.TCPConn) {
		_ = c.SetDeadline(time.Now().Add(patience))
		play(c, bufio.NewReader(c))
	})
}

var vip = netip.MustParseAddrPort("10.96.0.1:80")

// behind is a config in which vip is a Service of these endpoints.
func behind(endpoints ...netip.AddrPort) *fakeConfig {
	d := route.Destination{Service: "shop/back", Protocol: route.HTTP}
	for _, e := range endpoints {
		d.Endpoints = append(d.Endpoints, route.Endpoint{Addr: e, Pod: "shop/back-1"})
	}
	return &fakeConfig{service: vip, destination: d}
}

// say sends text and reads an answer.
func say(t *testing.T, c net.Conn, r *bufio.Reader, text, method string) (*http.Response, string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	return answered(t, r, method)
}

func answered(t *testing.T, r *bufio.Reader, method string) (*http.Response, string) {
	t.Helper()
	resp, err := http.ReadResponse(r, &http.Request{Method: method})
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

const hello = "GET /hello HTTP/1.1\r\nHost: back\r\n\r\n"

// ended waits until everything has ended, and returns what was logged, in the order of the requests'
// begin: an HTTP/2 stream's record may be written after its client has the answer and asks again.
func (b *bench) ended(t testing.TB) []*journal.Record {
	t.Helper()
	for _, c := range b.clients {
		c.Close()
	}
	b.handlers.Wait()
	b.pool.Close()
	b.streams.close()
	b.sessions.close()
	b.mu.Lock()
	defer b.mu.Unlock()
	slices.SortStableFunc(b.records, func(x, y *journal.Record) int {
		return cmp.Compare(x.StartUnixNanos, y.StartUnixNanos)
	})
	return b.records
}

func TestEachRequestIsARecordAndConnectionsAreUsedAgain(t *testing.T) {
	var conns atomic.Int32
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path) }))
	server.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			conns.Add(1)
		}
	}
	server.Start()
	defer server.Close()
	b := newBench(t, behind(server.Listener.Addr().(*net.TCPAddr).AddrPort()))
	for _, reset := range []bool{false, true} {
		client := b.conn(t, listen.Outbound, vip)
		r := bufio.NewReader(client)
		for range 3 {
			if resp, body := say(t, client, r, hello, "GET"); resp.StatusCode != 200 || body != "/hello" {
				t.Fatalf("%v %q", resp, body)
			}
		}
		if reset { // is no failure between requests
			_ = client.SetLinger(0)
		}
		client.Close()
		b.handlers.Wait()
	}
	records := b.ended(t)
	if len(records) != 6 || conns.Load() != 1 {
		t.Fatalf("%d records, %d connections", len(records), conns.Load())
	}
	for _, r := range records {
		if r.Method != "GET" || r.Path != "/hello" || r.Status != 200 || r.Protocol != "HTTP/1.1" ||
			r.Service != "shop/back" || r.Reason != "" || r.Attempts != 1 || r.FirstByteNanos <= 0 || r.SentBytes != uint64(len(hello)) {
			t.Errorf("record %v", r)
		}
	}
}

// TestAnInboundConnectionIsTheApplicationsAllTheWay: one for one, and it ends when
// the application ends it.
func TestAnInboundConnectionIsTheApplicationsAllTheWay(t *testing.T) {
	var peers sync.Map
	app := serving(t, func(w http.ResponseWriter, r *http.Request) {
		peers.Store(r.RemoteAddr, true)
		if r.URL.Path == "/last" {
			w.Header().Set("Connection", "close")
		}
	})
	b := newBench(t, &fakeConfig{})
	for range 2 {
		client := b.conn(t, listen.Inbound, app)
		r := bufio.NewReader(client)
		say(t, client, r, hello, "GET")
		if resp, _ := say(t, client, r, strings.Replace(hello, "/hello", "/last", 1), "GET"); !resp.Close {
			t.Error("the client is not told that it was the last one")
		}
		if _, err := r.ReadByte(); err != io.EOF {
			t.Errorf("%v, want the end", err)
		}
	}
	n := 0
	peers.Range(func(any, any) bool { n++; return true })
	if records := b.ended(t); n != 2 || len(records) != 4 || records[0].Direction != proxypb.Direction_INBOUND {
		t.Errorf("%d connections, records %v", n, records)
	}
}

func TestBodiesArePassedOnByteForByte(t *testing.T) {
	app := serving(t, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		switch r.URL.Path {
		case "/length":
			w.Header().Set("Content-Length", fmt.Sprint(len(body)))
		case "/close":
			w.Header().Set("Connection", "close")
			w.Header().Set("Transfer-Encoding", "identity")
		}
		_, _ = w.Write(body)
		for name, v := range r.Trailer {
			w.Header()[http.TrailerPrefix+name] = v
		}
	})
	for _, direction := range []listen.Direction{listen.Outbound, listen.Inbound} {
		b := newBench(t, behind(app))
		original := vip
		if direction == listen.Inbound {
			original = app
		}
		for _, size := range []int{0, 1, 64<<10 - 1, 64 << 10, 64<<10 + 1, 5 << 20} {
			body := make([]byte, size)
			for i := range body {
				body[i] = byte(rand.Uint32())
			}
			for _, path := range []string{"/length", "/chunked", "/close"} {
				for _, chunked := range []bool{true, false} {
					client := b.conn(t, direction, original)
					req, err := http.NewRequest("POST", "http://back"+path, bytes.NewReader(body))
					if err != nil {
						t.Fatal(err)
					}
					if chunked {
						req.ContentLength = -1
						req.Trailer = http.Header{"X-Sum": {"s"}}
					}
					sent := make(chan error, 1)
					go func() { sent <- req.Write(client) }()
					resp, got := answered(t, bufio.NewReader(client), "POST")
					if err := <-sent; err != nil || resp.StatusCode != 200 || got != string(body) {
						t.Fatalf("%s of %d bytes, chunked %v: %v, %d, %d bytes", path, size, chunked, err, resp.StatusCode, len(got))
					}
					if chunked && path == "/chunked" && size > 4096 && resp.Trailer.Get("X-Sum") != "s" {
						t.Errorf("trailers %v", resp.Trailer)
					}
					client.Close()
				}
			}
		}
		for _, r := range b.ended(t) {
			if r.Reason != "" {
				t.Errorf("record %v", r)
			}
		}
	}
}

// TestWhatHTTPAllowsIsPassedOnFaithfully has pairs of what a client sends and gets.
func TestWhatHTTPAllowsIsPassedOnFaithfully(t *testing.T) {
	for _, c := range []struct {
		promise, request string
		saw              string // what the application must get
		answer, got      string // what it says, and what the client must get
		end              bool   // the connection ends
	}{
		{"a head as it came", "GET /%7e?a=B HTTP/1.1\r\nhOST: x\r\nX-a:  1 \r\n\r\n", "",
			"HTTP/1.1 200 Fine\r\nx-B:y\r\ncontent-length: 2\r\n\r\nok", "", false},
		{"an answer without a body", "HEAD / HTTP/1.1\r\nHost: x\r\n\r\n", "", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "", false},
		{"no content", hello, "", "HTTP/1.1 204 No Content\r\n\r\n", "", false},
		{"not modified", hello, "", "HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n", "", false},
		{"early hints", hello, "", "HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "", false},
		{"a body that lasts until the end", hello, "", "HTTP/1.1 200 OK\r\n\r\nuntil the end", "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end", true},
		{"chunks with extensions and trailers", hello, "",
			"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\nok\r\n0\r\nX: y\r\n\r\n", "", false},
		{"an old client", "GET / HTTP/1.0\r\n\r\n", "", "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", "", true},
		{"an old client that wants more", "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", "",
			"HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nok", "", false},
		{"a client that wants no more", "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
			"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", true},
		{"an application that wants no more, of its own connection", hello, "",
			"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", false},
		{"fields for one hop stay on it", "GET / HTTP/1.1\r\nHost: x\r\nConnection: x-mine\r\nX-Mine: 1\r\nTE: trailers\r\n\r\n",
			"GET / HTTP/1.1\r\nHost: x\r\nTE: trailers\r\n\r\n", "HTTP/1.1 200 OK\r\nKeep-Alive: timeout=5\r\nContent-Length: 0\r\n\r\n",
			"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", false},
	} {
		t.Run(c.promise, func(t *testing.T) {
			saw := make(chan string, 1)
			app := scripted(t, func(conn *net.TCPConn, r *bufio.Reader) {
				var head strings.Builder
				for {
					line, err := r.ReadString('\n')
					head.WriteString(line)
					if err != nil || line == "\r\n" {
						break
					}
				}
				if head.Len() > 0 {
					saw <- head.String()
					_, _ = io.WriteString(conn, c.answer)
				}
			})
			b := newBench(t, behind(app))
			client := b.conn(t, listen.Outbound, vip)
			if _, err := io.WriteString(client, c.request); err != nil {
				t.Fatal(err)
			}
			want := c.got
			if want == "" {
				want = c.answer
			}
			got := make([]byte, len(want))
			if n, err := io.ReadFull(client, got); err != nil || string(got) != want {
				t.Errorf("the client got %q, %v, want %q", got[:n], err, want)
			}
			if c.saw == "" {
				c.saw = c.request
			}
			if s := <-saw; s != c.saw {
				t.Errorf("the application saw %q, want %q", s, c.saw)
			}
			_ = client.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			if n, err := client.Read(make([]byte, 10)); errors.Is(err, io.EOF) != c.end || n > 0 {
				t.Errorf("then %d bytes, %v", n, err)
			}
			client.Close()
			b.ended(t)
		})
	}
}

func TestAnUpgradeIsATunnel(t *testing.T) {
	for name, c := range map[string]struct{ request, answer string }{
		"upgrade": {"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
			"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n"},
		"CONNECT": {"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			app := scripted(t, func(conn *net.TCPConn, r *bufio.Reader) {
				if _, err := http.ReadRequest(r); err != nil {
					return
				}
				_, _ = io.WriteString(conn, c.answer+"early ")
				_, _ = io.Copy(conn, r)
			})
			b := newBench(t, behind(app))
			client := b.conn(t, listen.Outbound, vip)
			if _, err := io.WriteString(client, c.request+"ahead "); err != nil {
				t.Fatal(err)
			}
			payload := strings.Repeat("x", 1<<20)
			go func() {
				_, _ = io.WriteString(client, payload)
				_ = client.CloseWrite()
			}()
			got, err := io.ReadAll(client)
			if want := c.answer + "early ahead " + payload; err != nil || string(got) != want {
				t.Errorf("%d bytes, %v, want %d: %.120q", len(got), err, len(want), got)
			}
			if records := b.ended(t); len(records) != 1 || records[0].Reason != "" || records[0].SentBytes < 1<<20 {
				t.Errorf("records %v", records)
			}
		})
	}
}

func TestRequestsInOnePieceAreAnsweredInOrder(t *testing.T) {
	app := serving(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s%s", r.URL.Path, body)
	})
	b := newBench(t, behind(app))
	client := b.conn(t, listen.Outbound, vip)
	go func() {
		_, _ = io.WriteString(client, strings.Repeat("POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nxy"+
			"POST /b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nz\r\n0\r\n\r\n"+hello, 500))
	}()
	r := bufio.NewReader(client)
	for range 500 {
		for _, want := range []string{"/axy", "/bz", "/hello"} {
			if _, got := answered(t, r, "GET"); got != want {
				t.Fatalf("%q, want %q", got, want)
			}
		}
	}
	client.Close()
	b.ended(t)
}

func TestAClientThatAsksFirstIsAnsweredByTheApplication(t *testing.T) {
	app := serving(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/no" {
			w.WriteHeader(417)
			return
		}
		body, _ := io.ReadAll(r.Body)
		_, _ = w.Write(body)
	})
	b := newBench(t, behind(app))
	client := b.conn(t, listen.Outbound, vip)
	r := bufio.NewReader(client)
	ask := "PUT /%s HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n"
	fmt.Fprintf(client, ask, "yes")
	if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != 100 {
		t.Fatalf("%v, %v", resp, err)
	}
	if resp, body := say(t, client, r, "body", "PUT"); resp.StatusCode != 200 || body != "body" {
		t.Errorf("%v %q", resp, body)
	}
	if resp, _ := say(t, client, r, fmt.Sprintf(ask, "no"), "PUT"); resp.StatusCode != 417 || !resp.Close {
		t.Errorf("%v", resp)
	}
	b.ended(t)
}

// TestWhatIsNoRequestGoesNowhere: with a positive control before it.
func TestWhatIsNoRequestGoesNowhere(t *testing.T) {
	for text, want := range map[string]int{
		"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n": 400,
		"GET / HTTP/1.1\nHost: a\n\n":                  400,
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n": 400,
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n":                         400,
		"GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("a", 70<<10) + "\r\n\r\n":                    431,
		"\x16\x03\x01 this port is declared to carry HTTP\r\n\r\n":                                       400,
	} {
		var requests atomic.Int32
		app := serving(t, func(http.ResponseWriter, *http.Request) { requests.Add(1) })
		b := newBench(t, behind(app))
		client := b.conn(t, listen.Outbound, vip)
		r := bufio.NewReader(client)
		say(t, client, r, hello, "GET")
		resp, body := say(t, client, r, text, "GET")
		if resp.StatusCode != want || !strings.Contains(resp.Header.Get("Proxy-Status"), "weir; error=http_request_error") || !strings.HasPrefix(body, "weir: bad_request: ") {
			t.Errorf("%.60q: %v %q", text, resp, body)
		}
		if _, err := r.ReadByte(); err != io.EOF {
			t.Errorf("%.60q: then %v, want the end", text, err)
		}
		records := b.ended(t)
		if last := records[len(records)-1]; len(records) != 2 || last.Reason != "bad_request" || last.Status != uint32(want) {
			t.Errorf("%.60q: records %v", text, records)
		}
		if n := requests.Load(); n != 1 {
			t.Errorf("%.60q: the application saw %d requests", text, n)
		}
	}
}

// TestABodyThatBreaksIsNeverWhole: the application must not take what it got of it
// for all.
func TestABodyThatBreaksIsNeverWhole(t *testing.T) {
	saw := make(chan error, 1)
	app := serving(t, func(_ http.ResponseWriter, r *http.Request) {
		_, err := io.Copy(io.Discard, r.Body)
		saw <- err
	})
	for name, rest := range map[string]string{"a bad chunk": "x\r\n\r\n", "the client gone": ""} {
		b := newBench(t, behind(app))
		client := b.conn(t, listen.Outbound, vip)
		fmt.Fprint(client, "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
		time.Sleep(20 * time.Millisecond)
		fmt.Fprint(client, rest)
		if rest == "" {
			client.Close()
		}
		if err := <-saw; err == nil {
			t.Errorf("%s: the application took it for whole", name)
		}
		if records := b.ended(t); len(records) != 1 || !slices.Contains([]string{"bad_request", "client_gone"}, records[0].Reason) {
			t.Errorf("%s: records %v", name, records)
		}
		client.Close()
	}
}

func TestFailuresAreAnsweredWithTheirReason(t *testing.T) {
	closed := func() netip.AddrPort {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return l.Addr().(*net.TCPAddr).AddrPort()
	}()
	says := func(text string) netip.AddrPort {
		return scripted(t, func(c *net.TCPConn, r *bufio.Reader) {
			if _, err := http.ReadRequest(r); err == nil {
				_, _ = io.WriteString(c, text)
			}
		})
	}
	silent := scripted(t, func(_ *net.TCPConn, r *bufio.Reader) { _, _ = io.Copy(io.Discard, r) })
	slow := func(d *route.Destination) { d.Policy = &route.Policy{Timeout: 50 * time.Millisecond} }
	for _, c := range []struct {
		name     string
		endpoint []netip.AddrPort
		edit     func(*route.Destination)
		status   int
		reason   string
	}{
		{"nobody there", nil, nil, 503, "no_endpoints"},
		{"port closed", []netip.AddrPort{closed}, nil, 503, "connect_refused"},
		{"hung up", []netip.AddrPort{says("")}, nil, 503, "upstream_closed"},
		{"hung up in the head", []netip.AddrPort{says("HTTP/1.1 200 OK\r\nX:")}, nil, 503, "upstream_closed"},
		{"no HTTP", []netip.AddrPort{says("hello\r\n\r\n")}, nil, 502, "bad_response"},
		{"two lengths", []netip.AddrPort{says("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx")}, nil, 502, "bad_response"},
		{"101 for nothing", []netip.AddrPort{says("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n")}, nil, 502, "bad_response"},
		{"no answer", []netip.AddrPort{silent}, slow, 504, "request_timeout"},
		{"no connection in time", []netip.AddrPort{socktest.FullBacklog(t)}, slow, 504, "request_timeout"},
		{"no route", []netip.AddrPort{silent}, func(d *route.Destination) { d.Routes = &route.Routes{Kind: route.HTTPRoute} }, 404, "route_not_found"},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := behind(c.endpoint...)
			if c.edit != nil {
				c.edit(&config.destination)
			}
			b := newBench(t, config)
			client := b.conn(t, listen.Outbound, vip)
			r := bufio.NewReader(client)
			for range 2 { // the client's connection is still good
				resp, body := say(t, client, r, hello, "GET")
				if resp.StatusCode != c.status || resp.Close || !strings.Contains(resp.Header.Get("Proxy-Status"), c.reason) || !strings.Contains(body, c.reason) {
					t.Errorf("%v %q", resp, body)
				}
			}
			client.Close()
			records := b.ended(t)
			if len(records) != 2 || records[0].Reason != c.reason || records[0].Status != uint32(c.status) {
				t.Errorf("records %v", records)
			}
		})
	}
}

// TestARequestIsAnsweredThoughNoServerWasFoundBeforeIt: on a port that nobody declares
// one is looked for while the client is silent.
func TestARequestIsAnsweredThoughNoServerWasFoundBeforeIt(t *testing.T) {
	config := behind()
	config.destination.Protocol = route.Undeclared
	for _, c := range []struct {
		name, text, want string
	}{
		{"a request", hello, "HTTP/1.1 503 "},
		{"something else", "\x00hello", ""},
		{"silence", "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, config)
			var client net.Conn
			for late := true; late; { // on a busy machine
				client = b.conn(t, listen.Outbound, vip)
				began := time.Now()
				time.Sleep(sniffTimeout / 5)
				_, err := io.WriteString(client, c.text)
				if late = time.Since(began) > sniffTimeout/2; err != nil && !late {
					t.Fatal(err)
				}
			}
			got := make([]byte, len(c.want))
			if _, err := io.ReadFull(client, got); string(got) != c.want {
				t.Errorf("answered %q, %v, want %q", got, err, c.want)
			}
			if c.want != "" {
				return
			}
			if _, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("it ends with %v, want a reset", err)
			}
		})
	}
}

// TestWhoseTimeoutCounts: a policy's is for the requests of a rule that says nothing,
// and for those that no route governs.
func TestWhoseTimeoutCounts(t *testing.T) {
	const short, answered = 50 * time.Millisecond, 200 * time.Millisecond
	late := scripted(t, func(c *net.TCPConn, r *bufio.Reader) {
		if _, err := http.ReadRequest(r); err == nil {
			time.Sleep(answered)
			_, _ = io.WriteString(c, "HTTP/1.1 204 No Content\r\n\r\n")
		}
	})
	governed := func(timeout *time.Duration) func(*route.Destination) {
		return func(d *route.Destination) {
			d.Routes = &route.Routes{Kind: route.HTTPRoute, Matches: []route.Match{{}}, Rules: []route.Rule{
				{Timeout: timeout, Backends: []route.WeightedBackend{{Weight: 1, Backend: d.Backend()}}},
			}}
		}
	}
	for _, c := range []struct {
		promise string
		policy  time.Duration
		edit    func(*route.Destination)
		status  int
	}{
		{"the policy's, without a route", short, func(*route.Destination) {}, 504},
		{"the policy's, where the rule says nothing", short, governed(nil), 504},
		{"none, where the rule wants none", short, governed(new(time.Duration(0))), 204},
		{"the rule's longer one", short, governed(new(time.Minute)), 204},
		{"the rule's shorter one", time.Minute, governed(new(short)), 504},
	} {
		t.Run(c.promise, func(t *testing.T) {
			t.Parallel()
			config := behind(late)
			config.destination.Policy = &route.Policy{Timeout: c.policy}
			c.edit(&config.destination)
			client := newBench(t, config).conn(t, listen.Outbound, vip)
			if resp, _ := say(t, client, bufio.NewReader(client), hello, "GET"); resp.StatusCode != c.status {
				t.Errorf("answered %d, want %d", resp.StatusCode, c.status)
			}
		})
	}
}

// TestAnAnswerThatBreaksIsNeverWhole: nor must the client.
func TestAnAnswerThatBreaksIsNeverWhole(t *testing.T) {
	for _, text := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\nzz\r\n",
	} {
		app := scripted(t, func(c *net.TCPConn, r *bufio.Reader) {
			if _, err := http.ReadRequest(r); err == nil {
				_, _ = io.WriteString(c, text)
			}
		})
		b := newBench(t, behind(app))
		client := b.conn(t, listen.Outbound, vip)
		fmt.Fprint(client, hello)
		resp, err := http.ReadResponse(bufio.NewReader(client), nil)
		if err == nil {
			_, err = io.ReadAll(resp.Body)
		}
		if err == nil && resp.StatusCode == 200 {
			t.Errorf("%q is taken for whole", text)
		}
		client.Close()
		if records := b.ended(t); len(records) != 1 || records[0].Reason == "" {
			t.Errorf("%q: records %v", text, records)
		}
	}
}

func TestWhatCanBeTriedAgainIs(t *testing.T) {
	var calls atomic.Int32
	flaky := func(status int) netip.AddrPort {
		return serving(t, func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			if calls.Add(1) == 1 {
				w.WriteHeader(status)
			}
			_, _ = w.Write(body)
		})
	}
	retry := &route.Policy{Retry: &route.Retry{Attempts: 1, Codes: []uint16{503}}}
	put := "PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody"
	for _, c := range []struct {
		name, request string
		app           netip.AddrPort
		policy        *route.Policy
		status        int
		calls         int32
	}{
		{"a failure, with a policy", hello, flaky(503), retry, 200, 2},
		{"with its body", put, flaky(503), retry, 200, 2},
		{"not without a policy", hello, flaky(503), nil, 503, 1},
		{"not another code", hello, flaky(500), retry, 500, 1},
		{"not what is not idempotent", "POST" + put[3:], flaky(503), retry, 503, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			calls.Store(0)
			config := behind(c.app)
			config.destination.Policy = c.policy
			b := newBench(t, config)
			client := b.conn(t, listen.Outbound, vip)
			resp, _ := say(t, client, bufio.NewReader(client), c.request, "GET")
			client.Close()
			records := b.ended(t)
			if resp.StatusCode != c.status || calls.Load() != c.calls || len(records) != 1 || records[0].Attempts != uint32(c.calls) {
				t.Errorf("%d after %d calls, records %v", resp.StatusCode, calls.Load(), records)
			}
		})
	}
}

// TestAConnectionThatEndedIdleCostsNothing: an application closes its idle
// connections at any time.
func TestAConnectionThatEndedIdleCostsNothing(t *testing.T) {
	for _, linger := range []time.Duration{0, 20 * time.Millisecond} {
		app := scripted(t, func(c *net.TCPConn, r *bufio.Reader) {
			if _, err := http.ReadRequest(r); err == nil {
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			}
		})
		b := newBench(t, behind(app))
		client := b.conn(t, listen.Outbound, vip)
		r := bufio.NewReader(client)
		for i := range 50 {
			if resp, _ := say(t, client, r, hello, "GET"); resp.StatusCode != 200 {
				t.Fatalf("request %d: %d", i, resp.StatusCode)
			}
			time.Sleep(linger)
		}
		client.Close()
		b.ended(t)
	}
}

func TestARefusingEndpointIsPassedOver(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refusing := l.Addr().(*net.TCPAddr).AddrPort()
	l.Close()
	b := newBench(t, behind(refusing, serving(t, func(http.ResponseWriter, *http.Request) {})))
	client := b.conn(t, listen.Outbound, vip)
	r := bufio.NewReader(client)
	for range 20 {
		if resp, _ := say(t, client, r, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx", "POST"); resp.StatusCode != 200 {
			t.Fatal(resp)
		}
	}
	client.Close()
	b.ended(t)
}

// TestAServerThatSpeaksFirstDoesNotWait: on a port that nobody declares.
func TestAServerThatSpeaksFirstDoesNotWait(t *testing.T) {
	app := scripted(t, func(c *net.TCPConn, r *bufio.Reader) {
		_, _ = io.WriteString(c, "220 ready\r\n")
		_, _ = io.Copy(c, r)
	})
	web := serving(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "web") })
	b := newBench(t, &fakeConfig{})
	client := b.conn(t, listen.Outbound, app)
	r := bufio.NewReader(client)
	if line, err := r.ReadString('\n'); err != nil || line != "220 ready\r\n" {
		t.Fatalf("%q, %v", line, err)
	}
	fmt.Fprint(client, "GET / HTTP/1.1\r\nis not looked at any more\r\n")
	if line, err := r.ReadString('\n'); err != nil || line != "GET / HTTP/1.1\r\n" {
		t.Errorf("%q, %v", line, err)
	}
	client.Close()

	late := b.conn(t, listen.Inbound, web)
	time.Sleep(50 * time.Millisecond) // the upstream connection is there before the request
	if resp, body := say(t, late, bufio.NewReader(late), hello, "GET"); resp.StatusCode != 200 || body != "web" {
		t.Errorf("%v %q", resp, body)
	}
	late.Close()
	records := b.ended(t)
	if len(records) != 2 || records[0].Protocol != "" || records[1].Protocol != "HTTP/1.1" {
		t.Errorf("records %v", records)
	}
}

func TestARouteIsObeyed(t *testing.T) {
	echo := func(name string) netip.AddrPort {
		return serving(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-App", name)
			fmt.Fprintf(w, "%s %s %s %s", name, r.RequestURI, r.Host, r.Header.Get("X-Set"))
		})
	}
	backend := func(name string) route.WeightedBackend {
		return route.WeightedBackend{Weight: 1, Backend: route.Backend{Service: "shop/" + name, Endpoints: []route.Endpoint{{Addr: echo(name)}}}}
	}
	config := behind()
	v2 := backend("v2")
	v2.Filters.ResponseHeaders = &route.HeaderChange{Set: []route.Header{{Name: "x-app", Value: "changed"}}}
	config.destination.Routes = &route.Routes{
		Kind: route.HTTPRoute,
		Matches: []route.Match{
			{Rule: 1, Headers: []route.Value{{Name: "version", Value: "2"}}},
			{Rule: 2, Path: route.Path{Kind: route.PathPrefix, Value: "/old"}},
			{Rule: 3, Path: route.Path{Kind: route.PathExact, Value: "/nowhere"}},
			{Rule: 4, Path: route.Path{Kind: route.PathExact, Value: "/nobody"}},
			{Rule: 0, Path: route.Path{Kind: route.PathPrefix}},
		},
		Rules: []route.Rule{
			{Route: "HTTPRoute/shop/r", Backends: []route.WeightedBackend{backend("v1")}},
			{Route: "HTTPRoute/shop/r", Backends: []route.WeightedBackend{v2}, Filters: route.Filters{
				RequestHeaders: &route.HeaderChange{Set: []route.Header{{Name: "x-set", Value: "1"}}},
				Rewrite:        &route.Rewrite{Hostname: "other", Path: &route.PathChange{Value: "/new"}},
			}},
			{Route: "HTTPRoute/shop/r", Filters: route.Filters{Redirect: &route.Redirect{Path: &route.PathChange{Prefix: true, Value: "/new"}, Status: 301}}},
			{Route: "HTTPRoute/shop/r", Backends: []route.WeightedBackend{{Weight: 1, Backend: route.Backend{Service: "shop/gone", Invalid: true}}}},
			{Route: "HTTPRoute/shop/r", Backends: []route.WeightedBackend{{Backend: v2.Backend}}},
		},
	}
	b := newBench(t, config)
	client := b.conn(t, listen.Outbound, vip)
	r := bufio.NewReader(client)
	for _, c := range []struct {
		head, body string
		status     int
		field      string
	}{
		{"GET /a?b HTTP/1.1\r\nHost: x\r\n", "v1 /a?b x ", 200, "v1"},
		{"GET /a?b HTTP/1.1\r\nHost: x\r\nVersion: 2\r\n", "v2 /new?b other 1", 200, "changed"},
		{"GET /old/page?q HTTP/1.1\r\nHost: x:80\r\n", "", 301, ""},
		{"GET /nowhere HTTP/1.1\r\nHost: x\r\n", "weir: backend_invalid: the route names a backend that does not exist: shop/gone\n", 500, ""},
		{"GET /nobody HTTP/1.1\r\nHost: x\r\n", "weir: backend_invalid: the route names a backend that does not exist: all the rule's backends have weight 0\n", 500, ""},
		{"GET /%zz HTTP/1.1\r\nHost: x\r\n", "weir: bad_request: a rule of HTTP was broken: the path has an escape that is none, or NUL\n", 400, ""},
	} {
		resp, body := say(t, client, r, c.head+"\r\n", "GET")
		if resp.StatusCode != c.status || body != c.body || resp.Header.Get("X-App") != c.field {
			t.Errorf("%q: %v %q", c.head, resp, body)
		}
		if c.status == 301 && resp.Header.Get("Location") != "http://x/new/page?q" {
			t.Errorf("location %q", resp.Header.Get("Location"))
		}
	}
	client.Close()
	if records := b.ended(t); len(records) != 6 || records[0].Route != "HTTPRoute/shop/r" {
		t.Errorf("records %v", records)
	}
}

// TestADrainingProxyEndsConnectionsBetweenRequests: no request is lost.
func TestADrainingProxyEndsConnectionsBetweenRequests(t *testing.T) {
	b := newBench(t, behind(serving(t, func(http.ResponseWriter, *http.Request) {})))
	client := b.conn(t, listen.Outbound, vip)
	r := bufio.NewReader(client)
	say(t, client, r, hello, "GET")
	idle := b.conn(t, listen.Outbound, vip)
	rest := bufio.NewReader(idle)
	say(t, idle, rest, hello, "GET")
	b.drain()
	if resp, _ := say(t, client, r, hello, "GET"); resp.StatusCode != 200 || !resp.Close {
		t.Errorf("%v", resp)
	}
	began := time.Now()
	if _, err := rest.ReadByte(); err != io.EOF || time.Since(began) < lastIdle/2 {
		t.Errorf("an idle connection ends with %v after %s", err, time.Since(began))
	}
	b.ended(t)
}

// TestASlowClientHoldsTheApplicationBack: the proxy takes in no more than it passes
// on.
func TestASlowClientHoldsTheApplicationBack(t *testing.T) {
	var wrote atomic.Int64
	app := scripted(t, func(c *net.TCPConn, r *bufio.Reader) {
		if _, err := http.ReadRequest(r); err != nil {
			return
		}
		_ = c.SetWriteBuffer(16 << 10)
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
		block := make([]byte, 64<<10)
		for {
			n, err := c.Write(block)
			wrote.Add(int64(n))
			if err != nil {
				return
			}
		}
	})
	b := newBench(t, behind(app))
	client := b.conn(t, listen.Outbound, vip)
	_ = client.SetReadBuffer(16 << 10)
	fmt.Fprint(client, hello)
	before := int64(-1)
	for n := wrote.Load(); n != before; n = wrote.Load() {
		before = n
		time.Sleep(100 * time.Millisecond)
	}
	if before > 64<<20 {
		t.Errorf("the application could send %d bytes that nobody read", before)
	}
	_ = client.SetLinger(0)
	client.Close()
	if records := b.ended(t); len(records) != 1 || records[0].Reason != "client_gone" {
		t.Errorf("records %v", records)
	}
}

// TestTheTimeToDrainEnds: requests that are still under way are reset.
func TestTheTimeToDrainEnds(t *testing.T) {
	begun := make(chan struct{})
	app := scripted(t, func(_ *net.TCPConn, r *bufio.Reader) {
		_, _ = http.ReadRequest(r)
		close(begun)
		_, _ = io.Copy(io.Discard, r)
	})
	b := newBench(t, behind(app))
	b.Drain = 10 * time.Millisecond
	client := b.conn(t, listen.Outbound, vip)
	fmt.Fprint(client, hello)
	<-begun
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	done := make(chan error, 1)
	go func() { done <- b.Serve(ctx, nil) }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("still draining")
	}
	if _, err := client.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("%v, want a reset", err)
	}
}

// TestAMirrorGetsACopyAndCostsNothing: also of a body that comes after its head.
func TestAMirrorGetsACopyAndCostsNothing(t *testing.T) {
	copies := make(chan string, 10)
	mirror := serving(t, func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		copies <- fmt.Sprintf("%s %s %s %d", r.Method, r.RequestURI, r.Header.Get("X-Set"), len(body))
	})
	silent := scripted(t, func(c *net.TCPConn, r *bufio.Reader) {
		_ = c.SetDeadline(time.Now().Add(time.Second))
		_, _ = io.Copy(io.Discard, r)
	})
	app := serving(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprint(w, len(body))
	})
	to := func(addr netip.AddrPort) route.Backend {
		return route.Backend{Service: "shop/x", Endpoints: []route.Endpoint{{Addr: addr}}}
	}
	config := behind()
	config.destination.Routes = &route.Routes{
		Kind: route.HTTPRoute, Matches: []route.Match{{}},
		Rules: []route.Rule{{
			Backends: []route.WeightedBackend{{Weight: 1, Backend: to(app)}},
			Filters: route.Filters{
				RequestHeaders: &route.HeaderChange{Set: []route.Header{{Name: "x-set", Value: "1"}}},
				Mirrors: []route.Mirror{
					{Backend: to(mirror), Numerator: 1, Denominator: 1}, {Backend: to(silent), Numerator: 1, Denominator: 1},
					{Backend: to(mirror), Numerator: 0, Denominator: 1}, {Backend: route.Backend{}, Numerator: 1, Denominator: 1},
				},
			},
		}},
	}
	b := newBench(t, config)
	client := b.conn(t, listen.Outbound, vip)
	r := bufio.NewReader(client)
	for _, size := range []int{0, 40_000} {
		fmt.Fprintf(client, "POST /a?b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", size)
		time.Sleep(10 * time.Millisecond)
		if resp, got := say(t, client, r, strings.Repeat("x", size), "POST"); resp.StatusCode != 200 || got != fmt.Sprint(size) {
			t.Errorf("%v %q", resp, got)
		}
		select {
		case got := <-copies:
			if got != fmt.Sprintf("POST /a?b 1 %d", size) {
				t.Errorf("the copy is %q", got)
			}
		case <-time.After(patience):
			t.Error("no copy")
		}
	}
	client.Close()
	if len(copies) > 0 {
		t.Errorf("one copy too many: %q", <-copies)
	}
}

// TestWhatIsKnownOfATraceIsRecordedAndTold: W3C's way passes as it is, B3's is told
// in W3C's way, too, and no trace is begun.
func TestWhatIsKnownOfATraceIsRecordedAndTold(t *testing.T) {
	app := serving(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Header["Traceparent"], r.Header["B3"]) })
	const id, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	b := newBench(t, behind(app))
	client := b.conn(t, listen.Outbound, vip)
	r := bufio.NewReader(client)
	for _, test := range []struct{ fields, want string }{
		{"", "[] []"},
		{"traceparent: 00-" + id + "-" + span + "-01\r\n", "[00-" + id + "-" + span + "-01] []"},
		{"b3: " + id + "-" + span + "-1\r\n", "[00-" + id + "-" + span + "-01] [" + id + "-" + span + "-1]"},
		{"traceparent: no\r\nX-B3-TraceId: " + id + "\r\nX-B3-SpanId: " + span + "\r\n", "[00-" + id + "-" + span + "-00] []"},
	} {
		if _, body := say(t, client, r, strings.Replace(hello, "\r\n\r\n", "\r\n"+test.fields+"\r\n", 1), "GET"); body != test.want {
			t.Errorf("with %q the application sees %s", test.fields, body)
		}
	}
	client.Close()
	records := b.ended(t)
	for i, want := range []string{strings.Repeat("0", 48), id + span, id + span, id + span} {
		if got := hex.EncodeToString(records[i].TraceID[:]) + hex.EncodeToString(records[i].SpanID[:]); got != want {
			t.Errorf("record %d is of %q", i, got)
		}
	}
}

func TestBodiesAreCountedWithoutHeads(t *testing.T) {
	app := serving(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, strings.Repeat("a", 3000))
	})
	b := newBench(t, behind(app))
	client := b.conn(t, listen.Outbound, vip)
	r := bufio.NewReader(client)
	const head = "POST / HTTP/1.1\r\nHost: back\r\nContent-Length: 5\r\n\r\n"
	say(t, client, r, head+"12345", "POST")
	const largeHead = "POST / HTTP/1.1\r\nHost: back\r\nContent-Length: 100000\r\n\r\n"
	say(t, client, r, largeHead+strings.Repeat("b", 100_000), "POST")
	say(t, client, r, hello, "GET")
	client.Close()
	records := b.ended(t)
	for i, want := range []uint64{5, 100_000, 0} {
		if got := records[i]; got.RequestBodyBytes != want || got.ResponseBodyBytes < 3000 || got.ReceivedBytes <= got.ResponseBodyBytes {
			t.Errorf("record %d: request body %d, want %d; response body %d of %d", i, got.RequestBodyBytes, want, got.ResponseBodyBytes, got.ReceivedBytes)
		}
	}
	if got, want := records[1].SentBytes, uint64(len(largeHead)+100_000); got != want {
		t.Errorf("%d bytes sent, want %d", got, want)
	}
}

// TestTheProxysOwnTimeIsWithoutTheApplications: slow applications are not the
// proxy's fault.
func TestTheProxysOwnTimeIsWithoutTheApplications(t *testing.T) {
	const slow = 300 * time.Millisecond
	app := serving(t, func(http.ResponseWriter, *http.Request) { time.Sleep(slow) })
	b := newBench(t, behind(app))
	var overhead, total time.Duration
	log := b.Log
	b.Log = func(r *telemetry.Record) {
		overhead, total = r.Overhead, r.Total
		log(r)
	}
	client := b.conn(t, listen.Outbound, vip)
	say(t, client, bufio.NewReader(client), hello, "GET")
	client.Close()
	b.ended(t)
	if overhead <= 0 || overhead > slow/2 || total < slow {
		t.Errorf("the proxy's own time is %s of %s", overhead, total)
	}
}

// TestWhatGoesOnIsCountedUntilItEnds: requests while the application thinks, other
// connections while they are open.
func TestWhatGoesOnIsCountedUntilItEnds(t *testing.T) {
	meter := telemetry.NewMeter(func() []route.Destination { return nil })
	open := func() string {
		meter.Refresh()
		out := ""
		for _, o := range meter.Last().GetOpen() {
			out += fmt.Sprintf("%d requests, %d connections to %s ", o.GetRequests(), o.GetConnections(), o.GetPeers().GetService())
		}
		return out
	}
	during := make(chan string, 1)
	app := serving(t, func(http.ResponseWriter, *http.Request) { during <- open() })
	config := behind(closedPort(t), app)
	config.destination.Protocol = route.Undeclared
	b := newBench(t, config)
	b.Begun = meter.Begin
	log := b.Log
	b.Log = func(r *telemetry.Record) {
		meter.End(r)
		log(r)
	}
	client := b.conn(t, listen.Outbound, vip)
	r := bufio.NewReader(client)
	for range 3 {
		say(t, client, r, hello, "GET")
		if got := <-during; got != "1 requests, 0 connections to shop/back " {
			t.Errorf("during a request: %q", got)
		}
	}
	client.Close()
	b.ended(t)

	echo := echoing(t)
	other := b.conn(t, listen.Inbound, echo)
	if _, err := other.Write([]byte("\x00\x00")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(other, make([]byte, 2)); err != nil {
		t.Fatal(err)
	}
	if got := open(); got != "0 requests, 1 connections to  " {
		t.Errorf("with an open connection: %q", got)
	}
	other.Close()
	b.ended(t)
	if got := open(); got != "" {
		t.Errorf("in the end: %q", got)
	}
}
