package relay

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/agent/journal"
	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/route"
)

var frontIdentity = authz.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "front"}

// govern has policies govern the pod, from now on. The first time it is to be called
// before anything is served.
func (f *fakeConfig) govern(t testing.TB, policies ...authz.Policy) *fakeConfig {
	t.Helper()
	set, err := authz.Compile("cluster.local", policies)
	if err != nil {
		t.Fatal(err)
	}
	if f.policies == nil {
		f.policies = &atomic.Pointer[authz.Set]{}
	}
	f.policies.Store(set)
	return f
}

func allowing(rules ...authz.Rule) authz.Policy {
	return authz.Policy{Name: "shop/allow", Action: authz.Allow, Rules: rules}
}

func denying(rules ...authz.Rule) authz.Policy {
	return authz.Policy{Name: "shop/deny", Action: authz.Deny, Rules: rules}
}

func paths(values ...string) authz.Rule {
	h := &authz.HTTP{}
	for _, v := range values {
		h.Paths = append(h.Paths, authz.Path{Prefix: true, Value: v})
	}
	return authz.Rule{HTTP: h}
}

// fromFront is what front's service account may do, and nobody else.
var fromFront = authz.Rule{Sources: []authz.Source{{Namespace: "shop", ServiceAccount: "front"}}}

// counting is an application that counts the requests it gets.
type counting struct {
	addr     netip.AddrPort
	requests atomic.Int32
}

func newCounting(t *testing.T) *counting {
	a := &counting{}
	a.addr = serving2(t, func(w http.ResponseWriter, r *http.Request) {
		a.requests.Add(1)
		fmt.Fprint(w, r.URL.Path)
	})
	return a
}

// refusedHTTP checks an answer to a request that no policy allowed.
func refusedHTTP(t *testing.T, resp *http.Response, policy string) {
	t.Helper()
	status := resp.Header.Get("Proxy-Status")
	if resp.StatusCode != 403 || !strings.Contains(status, "error=http_request_denied") || !strings.Contains(status, "policy_denied") || !strings.Contains(status, policy) {
		t.Errorf("%v, want 403 by %q", resp, policy)
	}
}

// decided checks the records of the inbound side.
func decided(t *testing.T, records []*journal.Record, reason, policy string, want int) {
	t.Helper()
	n, all := 0, ""
	for _, r := range records {
		all += fmt.Sprintf("\n%+v", *r)
		if r.Direction == proxypb.Direction_INBOUND && r.Reason == reason && r.Policy == policy && (reason == "" || r.Error == policy) {
			n++
		}
	}
	if n != want {
		t.Errorf("%d records say %q by %q, want %d:%s", n, reason, policy, want, all)
	}
}

// ways are those by which something gets to the pod's application.
func ways(app netip.AddrPort) map[string]func(t *testing.T) (*bench, listen.Direction, netip.AddrPort) {
	return map[string]func(t *testing.T) (*bench, listen.Direction, netip.AddrPort){
		"inbound": func(t *testing.T) (*bench, listen.Direction, netip.AddrPort) {
			return newBench(t, &fakeConfig{}), listen.Inbound, app
		},
		"handed over": func(t *testing.T) (*bench, listen.Direction, netip.AddrPort) {
			config := behind(app)
			config.own, config.destination.Protocol = app.Addr(), route.Undeclared
			return newBench(t, config), listen.Outbound, vip
		},
	}
}

// TestARequestThatIsNotAllowedIsAnswered403, each beside one that is allowed; the
// application sees nothing of it. The second of each is the poller's.
func TestARequestThatIsNotAllowedIsAnswered403(t *testing.T) {
	app := newCounting(t)
	for name, way := range ways(app.addr) {
		t.Run(name, func(t *testing.T) {
			b, direction, original := way(t)
			b.Config.(*fakeConfig).govern(t, allowing(paths("/hello")), denying(paths("/hello/admin")))
			before := app.requests.Load()
			client := b.conn(t, direction, original)
			r := bufio.NewReader(client)
			ask := func(path string) *http.Response {
				resp, _ := say(t, client, r, "GET "+path+" HTTP/1.1\r\nHost: back\r\n\r\n", "GET")
				return resp
			}
			for range 3 {
				if resp := ask("/hello"); resp.StatusCode != 200 {
					t.Errorf("%v", resp)
				}
				refusedHTTP(t, ask("/other"), authz.NoPolicy)
				for _, path := range []string{"/hello/admin", "/hello/./admin", "/x/..//hello/%61dmin", "http://back/hello/admin/"} {
					refusedHTTP(t, ask(path), "shop/deny")
				}
				if resp := ask("/hello#/admin"); resp.StatusCode != 400 {
					t.Errorf("%v", resp)
				}
			}
			client.Close()
			records := b.ended(t)
			decided(t, records, "", "shop/allow", 3)
			decided(t, records, "policy_denied", authz.NoPolicy, 3)
			decided(t, records, "policy_denied", "shop/deny", 12)
			if n := app.requests.Load() - before; n != 3 {
				t.Errorf("the application was asked %d times", n)
			}
			if n := b.balancer.Active(app.addr); n != 0 {
				t.Errorf("%d requests are counted still", n)
			}
		})
	}
}

// TestATunnelHasNoPath: a rule about paths does not let a CONNECT pass, nor does one about
// no path refuse it.
func TestATunnelHasNoPath(t *testing.T) {
	app := scripted(t, func(c *net.TCPConn, r *bufio.Reader) {
		if _, err := http.ReadRequest(r); err == nil {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
		}
	})
	const connect = "CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n"
	for _, tt := range []struct {
		policy authz.Policy
		status int
	}{
		{allowing(paths("")), 403},
		{allowing(authz.Rule{HTTP: &authz.HTTP{Methods: []string{"CONNECT"}}}), 200},
		{denying(paths("/admin")), 200},
		{denying(authz.Rule{HTTP: &authz.HTTP{}}), 403},
	} {
		b := newBench(t, (&fakeConfig{}).govern(t, tt.policy))
		client := b.conn(t, listen.Inbound, app)
		_, _ = io.WriteString(client, connect)
		resp, err := http.ReadResponse(bufio.NewReader(client), &http.Request{Method: "CONNECT"})
		if err != nil || resp.StatusCode != tt.status {
			t.Errorf("%+v: %v, %v", tt.policy, resp, err)
		}
		client.Close()
		b.ended(t)
	}
}

func TestAStreamThatIsNotAllowedIsRefused(t *testing.T) {
	app := newCounting(t)
	for name, way := range ways(app.addr) {
		t.Run(name, func(t *testing.T) {
			b, direction, original := way(t)
			b.Config.(*fakeConfig).govern(t, allowing(paths("/hello")))
			client := b.client2(t, direction, original, 0)
			before := app.requests.Load()
			for range 2 {
				if resp, _ := call(t, client, "GET", "/hello/a", ""); resp.StatusCode != 200 {
					t.Errorf("%v", resp)
				}
				resp, _ := call(t, client, "POST", "/other", "x")
				refusedHTTP(t, resp, authz.NoPolicy)
				resp, _ = call(t, client, "POST", "/other/Method", "", "Content-Type", "application/grpc")
				if resp.StatusCode != 200 || resp.Header.Get("Grpc-Status") != "7" || !strings.Contains(resp.Header.Get("Grpc-Message"), authz.NoPolicy) {
					t.Errorf("%v", resp)
				}
			}
			records := b.ended(t)
			decided(t, records, "", "shop/allow", 2)
			decided(t, records, "policy_denied", authz.NoPolicy, 4)
			if n := app.requests.Load() - before; n != 2 {
				t.Errorf("the application was asked %d times", n)
			}
		})
	}
}

func isReset(t *testing.T, c net.Conn) {
	t.Helper()
	if _, err := io.Copy(io.Discard, c); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%v, want a reset", err)
	}
}

// TestAConnectionThatIsNotAllowedIsReset: one that carries no HTTP, whoever speaks first.
func TestAConnectionThatIsNotAllowedIsReset(t *testing.T) {
	echo := echoing(t)
	greeting := scripted(t, func(c *net.TCPConn, _ *bufio.Reader) { _, _ = io.WriteString(c, "220 hello\r\n") })
	for name, way := range ways(echo) {
		t.Run(name, func(t *testing.T) {
			b, direction, original := way(t)
			config := b.Config.(*fakeConfig).govern(t, allowing(paths("/hello")))
			client := b.conn(t, direction, original)
			_, _ = io.WriteString(client, "\x00\x01\x02\x03")
			isReset(t, client)
			config.govern(t, allowing(authz.Rule{Ports: []uint16{echo.Port()}}))
			exchange(t, b.conn(t, direction, original), 1<<16)
			records := b.ended(t)
			decided(t, records, "policy_denied", authz.NoPolicy, 1)
			decided(t, records, "", "shop/allow", 1)
		})
	}
	for name, way := range ways(greeting) {
		t.Run("silent, "+name, func(t *testing.T) {
			b, direction, original := way(t)
			config := b.Config.(*fakeConfig).govern(t, allowing(fromFront))
			isReset(t, b.conn(t, direction, original))
			config.govern(t, allowing(authz.Rule{}))
			client := b.conn(t, direction, original)
			if text, err := io.ReadAll(client); string(text) != "220 hello\r\n" {
				t.Errorf("%q, %v", text, err)
			}
			client.Close()
			decided(t, b.ended(t), "policy_denied", authz.NoPolicy, 1)
		})
	}
}

// TestAnApplicationIsNotConnectedToForWhomNothingIsAllowed, however long the client waits
// before it says something: what it says is answered.
func TestAnApplicationIsNotConnectedToForWhomNothingIsAllowed(t *testing.T) {
	connected := make(chan struct{}, 1)
	app := scripted(t, func(*net.TCPConn, *bufio.Reader) { connected <- struct{}{} })
	b := newBench(t, (&fakeConfig{}).govern(t, allowing(fromFront)))
	client := b.conn(t, listen.Inbound, app)
	time.Sleep(50 * time.Millisecond)
	resp, _ := say(t, client, bufio.NewReader(client), hello, "GET")
	refusedHTTP(t, resp, authz.NoPolicy)
	client.Close()
	b.ended(t)
	select {
	case <-connected:
		t.Error("the application was connected to")
	default:
	}
}

func TestThePeersIdentityIsTheConnections(t *testing.T) {
	app := newCounting(t)
	for _, who := range []authz.Identity{frontIdentity, {}} {
		b := newBench(t, (&fakeConfig{}).govern(t, allowing(fromFront)))
		b.identity = who
		client := b.conn(t, listen.Inbound, app.addr)
		resp, _ := say(t, client, bufio.NewReader(client), hello, "GET")
		if (resp.StatusCode == 200) != who.Known() {
			t.Errorf("%v of %v", resp, who)
		}
		client.Close()
		b.ended(t)
	}
}

func TestAnAuditRefusesNothingAndIsInTheRecord(t *testing.T) {
	app := newCounting(t)
	deny := denying(paths("/hello"))
	deny.Audit = true
	other := deny
	other.Name = "shop/other"
	b := newBench(t, (&fakeConfig{}).govern(t, deny, other))
	client := b.conn(t, listen.Inbound, app.addr)
	if resp, _ := say(t, client, bufio.NewReader(client), hello, "GET"); resp.StatusCode != 200 {
		t.Errorf("%v", resp)
	}
	client.Close()
	records := b.ended(t)
	if len(records) != 1 || records[0].Audited != "shop/deny,shop/other" || records[0].Policy != "" || records[0].Reason != "" {
		t.Errorf("%v", records)
	}
}

// TestWhatIsNotAllowedAnyMoreEnds: what goes on as policies change, and only that which
// they do not allow.
func TestWhatIsNotAllowedAnyMoreEnds(t *testing.T) {
	echo := echoing(t)
	for name, way := range ways(echo) {
		t.Run("connection, "+name, func(t *testing.T) {
			b, direction, original := way(t)
			config := b.Config.(*fakeConfig).govern(t)
			client := b.conn(t, direction, original)
			ping(t, client, client)
			config.govern(t, allowing(authz.Rule{}))
			b.Recheck()
			ping(t, client, client)
			config.govern(t, denying(authz.Rule{}))
			b.Recheck()
			isReset(t, client)
			decided(t, b.ended(t), "policy_denied", "shop/deny", 1)
		})
	}
	switching := scripted(t, func(c *net.TCPConn, r *bufio.Reader) {
		if _, err := http.ReadRequest(r); err != nil {
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
		_, _ = io.Copy(c, r)
	})
	for name, way := range ways(switching) {
		t.Run("tunnel, "+name, func(t *testing.T) {
			b, direction, original := way(t)
			config := b.Config.(*fakeConfig).govern(t)
			client := b.conn(t, direction, original)
			r := bufio.NewReader(client)
			if resp, _ := say(t, client, r, "GET /ws HTTP/1.1\r\nHost: back\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n", "GET"); resp.StatusCode != 101 {
				t.Fatal(resp)
			}
			ping(t, client, r)
			config.govern(t, allowing(paths("/ws")))
			b.Recheck()
			ping(t, client, r)
			config.govern(t, denying(paths("/ws")))
			b.Recheck()
			isReset(t, client)
			decided(t, b.ended(t), "policy_denied", "shop/deny", 1)
		})
	}
	streaming := serving2(t, func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		w.WriteHeader(200)
		_ = http.NewResponseController(w).Flush()
		line := make([]byte, 5)
		for {
			if _, err := io.ReadFull(r.Body, line); err != nil {
				break
			}
			_, _ = w.Write(line)
			_ = http.NewResponseController(w).Flush()
		}
		<-r.Context().Done()
	})
	for name, way := range ways(streaming) {
		t.Run("stream, "+name, func(t *testing.T) {
			b, direction, original := way(t)
			config := b.Config.(*fakeConfig).govern(t)
			client := b.client2(t, direction, original, 0)
			body, write := io.Pipe()
			req, err := http.NewRequestWithContext(t.Context(), "POST", "http://back/stream", body)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			ping(t, write, resp.Body)
			config.govern(t, allowing(paths("/stream")))
			b.Recheck()
			ping(t, write, resp.Body)
			config.govern(t, denying(paths("/stream")))
			b.Recheck()
			if _, err := io.ReadAll(resp.Body); err == nil {
				t.Error("the stream ended as if nothing were")
			}
			write.Close()
			if resp, _ := call(t, client, "GET", "/stream", ""); resp.StatusCode != 403 {
				t.Errorf("%v, on the same connection", resp)
			}
			decided(t, b.ended(t), "policy_denied", "shop/deny", 2)
		})
		t.Run("upload, "+name, func(t *testing.T) {
			b, direction, original := way(t)
			config := b.Config.(*fakeConfig).govern(t)
			client := b.conn(t, direction, original)
			r := bufio.NewReader(client)
			_, _ = io.WriteString(client, "POST /stream HTTP/1.1\r\nHost: back\r\nContent-Length: 1000\r\n\r\n")
			resp, err := http.ReadResponse(r, &http.Request{Method: "POST"})
			if err != nil {
				t.Fatal(err)
			}
			ping(t, client, resp.Body)
			config.govern(t, allowing(paths("/stream")))
			b.Recheck()
			ping(t, client, resp.Body)
			config.govern(t, denying(paths("/stream")))
			b.Recheck()
			isReset(t, client)
			decided(t, b.ended(t), "policy_denied", "shop/deny", 1)
		})
	}
}

// ping sends something and waits until it has come back.
func ping(t *testing.T, w io.Writer, r io.Reader) {
	t.Helper()
	got := make([]byte, 5)
	if _, err := io.WriteString(w, "ping\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(r, got); err != nil || string(got) != "ping\n" {
		t.Fatalf("%q, %v", got, err)
	}
}

// TestARequestThatWaitsForItsAnswerIsNotAllowedAnyMore: a poller's, and a goroutine's.
func TestARequestThatWaitsForItsAnswerIsNotAllowedAnyMore(t *testing.T) {
	app, asked, answers := thinking(t)
	config := &fakeConfig{}
	b := newBench(t, config)
	for _, want := range []step{away, atAnswer} {
		config.govern(t, allowing(paths("/hello")))
		client := b.conn(t, listen.Inbound, app)
		r := bufio.NewReader(client)
		if want == atAnswer { // the first has to connect
			go func() { <-asked; answers <- "x" }()
			say(t, client, r, hello, "GET")
		}
		_, _ = io.WriteString(client, hello)
		<-asked
		b.only(t).comes(t, want)
		b.Recheck() // changes nothing
		config.govern(t, denying(paths("/hello")))
		began := time.Now()
		b.Recheck()
		resp, _ := answered(t, r, "GET")
		refusedHTTP(t, resp, "shop/deny")
		if took := time.Since(began); took > lookEvery*4/5 {
			t.Errorf("after %s, when it is looked after anyway", took)
		}
		config.govern(t)
		done := make(chan struct{})
		go func() {
			<-asked
			for { // the application may not have missed the request that was refused
				select {
				case answers <- "y":
				case <-done:
					return
				}
			}
		}()
		if resp, body := say(t, client, r, hello, "GET"); resp.StatusCode != 200 || body != "y" {
			t.Errorf("%v %q, on the same connection", resp, body)
		}
		close(done)
		client.Close()
		b.handlers.Wait()
	}
	decided(t, b.ended(t), "policy_denied", "shop/deny", 2)
}

// TestWhatWasDialledBeforeThereWasARequestIsNoWayAround: to a client that is silent at
// first its server may speak first, so it is connected to it already.
func TestWhatWasDialledBeforeThereWasARequestIsNoWayAround(t *testing.T) {
	app := newCounting(t)
	b, direction, original := ways(app.addr)["handed over"](t)
	b.Config.(*fakeConfig).govern(t, allowing(paths("/hello")))
	client := b.conn(t, direction, original)
	for b.balancer.Active(app.addr) == 0 {
		time.Sleep(time.Millisecond)
	}
	r := bufio.NewReader(client)
	resp, _ := say(t, client, r, "GET /other HTTP/1.1\r\nHost: back\r\n\r\n", "GET")
	refusedHTTP(t, resp, authz.NoPolicy)
	if resp, _ := say(t, client, r, hello, "GET"); resp.StatusCode != 200 {
		t.Errorf("%v", resp)
	}
	client.Close()
	decided(t, b.ended(t), "policy_denied", authz.NoPolicy, 1)
	if n := app.requests.Load(); n != 1 {
		t.Errorf("the application was asked %d times", n)
	}
}
