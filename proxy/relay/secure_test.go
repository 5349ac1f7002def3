package relay

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/agent/journal"
	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/mtls"
	"github.com/weirmesh/weir/proxy/mtls/mtlstest"
	"github.com/weirmesh/weir/proxy/route"
	"github.com/weirmesh/weir/proxy/telemetry"
)

var (
	frontID = mtlstest.ID("shop", "front")
	backID  = mtlstest.ID("shop", "back")
)

// far is the proxy of an application, at an address of its own, where it is told that
// connections were going to the application.
type far struct {
	*bench
	addr     netip.AddrPort
	accepted atomic.Int32
	stop     func() // accepting
}

// ended is the bench's, once no connection comes any more.
func (f *far) ended(t testing.TB) []*journal.Record {
	f.stop()
	return f.bench.ended(t)
}

func newFar(t testing.TB, id *mtls.Identity, mode route.PeerMode, app netip.AddrPort) *far {
	t.Helper()
	return newFarOf(t, id, &fakeConfig{peers: mode}, app)
}

func newFarOf(t testing.TB, id *mtls.Identity, config *fakeConfig, app netip.AddrPort) *far {
	t.Helper()
	f := &far{bench: newBench(t, config)}
	if id != nil {
		f.TLS = &mtls.Handshaker{Source: mtlstest.Of(id)}
	}
	f.Hello = 50 * time.Millisecond
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f.addr = l.Addr().(*net.TCPAddr).AddrPort()
	var accepting sync.WaitGroup
	accepting.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f.accepted.Add(1)
			f.handlers.Add(1)
			go f.handle(context.Background(), listen.Conn{
				TCPConn: c.(*net.TCPConn), Direction: listen.Inbound, Original: app, Accepted: time.Now(),
				Peer: c.RemoteAddr().(*net.TCPAddr).AddrPort(),
			})
		}
	})
	f.stop = func() {
		l.Close()
		accepting.Wait()
	}
	t.Cleanup(f.stop)
	return f
}

// newNear is the proxy of a client, of a Service whose endpoints have to show backID.
func newNear(t testing.TB, id *mtls.Identity, protocol route.Protocol, endpoints ...netip.AddrPort) *bench {
	t.Helper()
	config := behind(endpoints...)
	config.destination.Protocol = protocol
	for i := range config.destination.Endpoints {
		config.destination.Endpoints[i].Identity = backID
	}
	b := newBench(t, config)
	b.TLS = &mtls.Handshaker{Source: mtlstest.Of(id)}
	return b
}

// inMesh is a client's proxy and an application's.
func inMesh(t testing.TB, protocol route.Protocol, mode route.PeerMode, app netip.AddrPort) (*bench, *far) {
	t.Helper()
	ca := mtlstest.NewCA(t)
	f := newFar(t, ca.Identity(backID, nil), mode, app)
	return newNear(t, ca.Identity(frontID, nil), protocol, f.addr), f
}

// over ends both, and returns what each has logged.
func over(t testing.TB, near *bench, far *far) ([]*journal.Record, []*journal.Record) {
	t.Helper()
	logged := near.ended(t)
	return logged, far.ended(t)
}

// wiretap passes connections on, and keeps what went by.
type wiretap struct {
	addr  netip.AddrPort
	mu    sync.Mutex
	bytes []byte
}

func (w *wiretap) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.bytes = append(w.bytes, p...)
	return len(p), nil
}

func newWiretap(t *testing.T, to netip.AddrPort) *wiretap {
	t.Helper()
	w := &wiretap{}
	w.addr = scripted(t, func(c *net.TCPConn, _ *bufio.Reader) {
		onward, err := net.Dial("tcp", to.String())
		if err != nil {
			return
		}
		defer onward.Close()
		var back sync.WaitGroup
		back.Go(func() {
			_, _ = io.Copy(c, io.TeeReader(onward, w))
			_ = c.CloseWrite()
		})
		_, _ = io.Copy(onward, io.TeeReader(c, w))
		_ = onward.(*net.TCPConn).CloseWrite()
		back.Wait()
	})
	return w
}

func TestNothingGoesInPlainToWhoHasToShowItsIdentity(t *testing.T) {
	const marker = "nobody-may-read-this"
	for _, plain := range []bool{false, true} {
		app := serving(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) })
		near, far := inMesh(t, route.HTTP, route.Permissive, app)
		tap := newWiretap(t, far.addr)
		endpoint := &near.Config.(*fakeConfig).destination.Endpoints[0]
		if endpoint.Addr = tap.addr; plain {
			endpoint.Identity = ""
		}
		client := near.conn(t, listen.Outbound, vip)
		r := bufio.NewReader(client)
		text := fmt.Sprintf("POST / HTTP/1.1\r\nHost: back\r\nContent-Length: %d\r\n\r\n%s", len(marker), marker)
		if resp, body := say(t, client, r, text, "POST"); resp.StatusCode != 200 || body != marker {
			t.Errorf("%v %q", resp, body)
		}
		client.Close()
		over(t, near, far)
		tap.mu.Lock()
		if seen := bytes.Contains(tap.bytes, []byte(marker)); seen != plain {
			t.Errorf("in plain %v, seen %v", plain, seen)
		}
		tap.mu.Unlock()
	}
}

func TestRequestsOfHTTP1ShareConnectionsWithTLS(t *testing.T) {
	app := serving(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		_, _ = w.Write(body)
	})
	near, far := inMesh(t, route.HTTP, route.Permissive, app)
	client := near.conn(t, listen.Outbound, vip)
	r := bufio.NewReaderSize(client, 1<<20)
	for _, size := range []int{0, 1, 1024, 16 << 10, 300 << 10, 5 << 20} {
		want := strings.Repeat("0123456789abcdef", size/16+1)[:size]
		for range 3 {
			head := fmt.Sprintf("POST / HTTP/1.1\r\nHost: back\r\nContent-Length: %d\r\n\r\n", size)
			go func() { _, _ = io.WriteString(client, head+want) }()
			if resp, body := answered(t, r, "POST"); resp.StatusCode != 200 || body != want {
				t.Errorf("%d bytes: %v, %d bytes", size, resp, len(body))
			}
		}
	}
	client.Close()
	logged, _ := over(t, near, far)
	if n := far.accepted.Load(); n != 1 {
		t.Errorf("%d connections for %d requests", n, len(logged))
	}
	for _, r := range logged {
		if r.Reason != "" || r.UpstreamAddress != far.addr {
			t.Errorf("record %v", r)
		}
	}
}

func TestStreamsOfHTTP2GoThroughTLS(t *testing.T) {
	app := serving2(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "Grpc-Status")
		w.Header().Set("Content-Type", r.Header.Get("Content-Type"))
		_, _ = io.Copy(w, r.Body)
		w.Header().Set("Grpc-Status", "0")
	})
	near, far := inMesh(t, route.HTTP2, route.Permissive, app)
	client := near.client2(t, listen.Outbound, vip, 0)
	want := strings.Repeat("0123456789abcdef", 64<<10)
	var calls sync.WaitGroup
	for range 8 {
		calls.Go(func() {
			resp, body := call(t, client, "POST", "/pkg.Service/Method", want, "Content-Type", "application/grpc")
			if body != want || resp.Trailer.Get("Grpc-Status") != "0" || resp.Header.Get("Content-Type") != "application/grpc" {
				t.Errorf("%v, %d bytes, trailers %v", resp.Status, len(body), resp.Trailer)
			}
		})
	}
	calls.Wait()
	logged, _ := over(t, near, far)
	if n := far.accepted.Load(); n != 1 || len(logged) != 8 {
		t.Errorf("%d connections, records %v", n, logged)
	}
}

func TestTCPGoesThroughTLSAsItIs(t *testing.T) {
	for _, size := range []int{16, 8 << 20} {
		near, far := inMesh(t, route.Opaque, route.Permissive, echoing(t))
		exchange(t, near.conn(t, listen.Outbound, vip), size)
		logged, inbound := over(t, near, far)
		for _, records := range [][]*journal.Record{logged, inbound} {
			if len(records) != 1 || records[0].Reason != "" || records[0].SentBytes != uint64(size) || records[0].ReceivedBytes != uint64(size) {
				t.Errorf("records %v", records)
			}
		}
	}
}

// TestEitherEndMayFinishFirst: the other one goes on.
func TestEitherEndMayFinishFirst(t *testing.T) {
	heard := make(chan string, 1)
	app := scripted(t, func(c *net.TCPConn, r *bufio.Reader) {
		_, _ = io.WriteString(c, "hello, I speak first")
		_ = c.CloseWrite()
		rest, _ := io.ReadAll(r)
		heard <- string(rest)
	})
	near, far := inMesh(t, route.Undeclared, route.Strict, app)
	client := near.conn(t, listen.Outbound, vip)
	if got, err := io.ReadAll(client); string(got) != "hello, I speak first" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	_, _ = io.WriteString(client, "and I last")
	_ = client.CloseWrite()
	if got := <-heard; got != "and I last" {
		t.Errorf("the application heard %q", got)
	}
	over(t, near, far)
}

func TestAResetGoesThroughTLS(t *testing.T) {
	app := scripted(t, func(c *net.TCPConn, r *bufio.Reader) {
		_, _ = r.ReadByte()
		_ = c.SetLinger(0)
	})
	near, far := inMesh(t, route.Opaque, route.Permissive, app)
	client := near.conn(t, listen.Outbound, vip)
	_, _ = io.WriteString(client, "x")
	if n, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%d, %v, want a reset", n, err)
	}
	over(t, near, far)
}

// TestAnEndpointThatShowsAnotherIdentityIsPassedOver: its address was another pod's.
func TestAnEndpointThatShowsAnotherIdentityIsPassedOver(t *testing.T) {
	for _, version := range []int{0, 1, 2} {
		ca := mtlstest.NewCA(t)
		app := serving2(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "served") })
		other := newFar(t, ca.Identity(mtlstest.ID("shop", "other"), nil), route.Permissive, app)
		right := newFar(t, ca.Identity(backID, nil), route.Permissive, app)
		near := newNear(t, ca.Identity(frontID, nil), []route.Protocol{route.Opaque, route.HTTP, route.HTTP2}[version], other.addr, right.addr)
		for i := 0; i < 6 || i < 100 && other.accepted.Load() == 0; i++ {
			if got := near.try(t, version); got != "200" {
				t.Errorf("version %d: %q", version, got)
			}
		}
		logged := near.ended(t)
		if refused := other.ended(t); len(refused) == 0 || refused[0].Reason != "tls_refused" {
			t.Errorf("the other's records: %v", refused)
		}
		right.ended(t)
		for _, r := range logged {
			if r.Reason != "" || r.UpstreamAddress != right.addr {
				t.Errorf("record %v", r)
			}
		}
	}
}

// TestWhyThereIsNoTLSIsAnswered, and nothing goes in plain instead.
func TestWhyThereIsNoTLSIsAnswered(t *testing.T) {
	expired := func(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Unix(1, 0), time.Unix(2, 0) }
	ca, foreign := mtlstest.NewCA(t), mtlstest.NewCA(t)
	good := ca.Identity(frontID, nil)
	stranger := foreign.Identity(frontID, nil)
	stranger.Roots = good.Roots
	var asked atomic.Int32
	app := serving2(t, func(http.ResponseWriter, *http.Request) { asked.Add(1) })
	for _, c := range []struct {
		name      string
		near, far *mtls.Identity
		want      string // the client's reason
		seen      string // the application's proxy's; empty: it was not asked
	}{
		{"another identity", good, ca.Identity(frontID, nil), "peer_identity", "tls_refused"},
		{"expired", good, ca.Identity(backID, expired), "cert_expired", "tls_refused"},
		{"the own one expired", ca.Identity(frontID, expired), ca.Identity(backID, nil), "cert_expired", ""},
		{"none of its own", nil, ca.Identity(backID, nil), "cert_unavailable", ""},
		{"a foreign CA", good, foreign.Identity(backID, nil), "cert_untrusted", "tls_refused"},
		{"a client of a foreign CA", stranger, ca.Identity(backID, nil), "tls_refused", "cert_untrusted"},
	} {
		for _, version := range []int{1, 2} {
			t.Run(fmt.Sprintf("%s, HTTP/%d", c.name, version), func(t *testing.T) {
				f := newFar(t, c.far, route.Permissive, app)
				near := newNear(t, c.near, route.HTTP, f.addr)
				near.TLS.Patience = 10 * time.Millisecond
				if got := near.try(t, version); !strings.HasPrefix(got, "503weir; error=") || !strings.Contains(got, `"`+c.want) {
					t.Errorf("%q, want %s", got, c.want)
				}
				logged, seen := over(t, near, f)
				if len(logged) != 1 || logged[0].Reason != c.want {
					t.Errorf("records %v, want %s", logged, c.want)
				}
				if c.seen == "" && len(seen) > 0 || c.seen != "" && (len(seen) == 0 || seen[0].Reason != c.seen) {
					t.Errorf("the application's proxy: %v, want %q", seen, c.seen)
				}
			})
		}
	}
	if asked.Load() > 0 {
		t.Error("the application was asked")
	}
}

func TestAConnectionWaitsForTheCertificate(t *testing.T) {
	ca := mtlstest.NewCA(t)
	app := serving(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "served") })
	f := newFar(t, ca.Identity(backID, nil), route.Permissive, app)
	near := newNear(t, nil, route.HTTP, f.addr)
	got := make(chan string, 1)
	go func() { got <- near.try(t, 1) }()
	near.TLS.Source.(*mtlstest.Source).Set(ca.Identity(frontID, nil))
	if got := <-got; got != "200" {
		t.Errorf("%q", got)
	}
	over(t, near, f)
}

// TestOtherRootsAreOtherConnections: nothing is sent on one that was made under
// another trust.
func TestOtherRootsAreOtherConnections(t *testing.T) {
	ca := mtlstest.NewCA(t)
	app := serving2(t, func(http.ResponseWriter, *http.Request) {})
	for _, version := range []int{1, 2} {
		f := newFar(t, ca.Identity(backID, nil), route.Permissive, app)
		id := ca.Identity(frontID, nil)
		near := newNear(t, id, route.HTTP, f.addr)
		ask := func() string { return near.try(t, 2) }
		if version == 1 { // on one connection: on another one it may be asked before the first is done
			client := near.conn(t, listen.Outbound, vip)
			near.clients = append(near.clients, client)
			r := bufio.NewReader(client)
			ask = func() string {
				resp, _ := say(t, client, r, hello, "GET")
				return fmt.Sprint(resp.StatusCode)
			}
		}
		for range 2 {
			if got := ask(); got != "200" {
				t.Fatal(got)
			}
		}
		before := f.accepted.Load()
		later := *id
		later.Trust++
		near.TLS.Source.(*mtlstest.Source).Set(&later)
		if got := ask(); got != "200" {
			t.Fatal(got)
		}
		if n := f.accepted.Load(); before != 1 || n != 2 {
			t.Errorf("HTTP/%d: %d connections under one trust, %d under two", version, before, n)
		}
		over(t, near, f)
	}
}

// brief is of a certificate that ends in a second or two: it tells whole seconds only
// (RFC 5280, 4.1.2.5).
func brief(c *x509.Certificate) {
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(2*time.Second)
}

// TestAConnectionIsUsedNoLongerThanItsCertificates: of the caller, and of the callee.
func TestAConnectionIsUsedNoLongerThanItsCertificates(t *testing.T) {
	app := serving2(t, func(http.ResponseWriter, *http.Request) {})
	for whose, change := range map[string][2]func(*x509.Certificate){"the caller's": {brief, nil}, "the callee's": {nil, brief}} {
		for _, version := range []int{1, 2} {
			t.Run(fmt.Sprintf("%s, HTTP/%d", whose, version), func(t *testing.T) {
				t.Parallel()
				ca := mtlstest.NewCA(t)
				front, back := ca.Identity(frontID, change[0]), ca.Identity(backID, change[1])
				f := newFar(t, back, route.Permissive, app)
				near := newNear(t, front, route.HTTP, f.addr)
				end := front.Certificate.Leaf.NotAfter
				if other := back.Certificate.Leaf.NotAfter; other.Before(end) {
					end = other
				}
				got := near.try(t, version)
				for ; time.Now().Before(end) && got == "200"; time.Sleep(10 * time.Millisecond) {
					got = near.try(t, version)
				}
				if got != "200" && time.Now().Before(end) {
					t.Fatalf("%s, before the end", got)
				}
				// HTTP/2's goes on until the other end has it end.
				for limit := time.Now().Add(10 * time.Second); version == 2 && got == "200" && time.Now().Before(limit); time.Sleep(10 * time.Millisecond) {
					got = near.try(t, version)
				}
				if got = near.try(t, version); !strings.HasPrefix(got, "503") || !strings.Contains(got, "cert_expired") {
					t.Errorf("%s, after the end", got)
				}
				over(t, near, f)
			})
		}
	}
}

// TestAnInboundConnectionEndsWithItsCertificates: whatever its client would have.
func TestAnInboundConnectionEndsWithItsCertificates(t *testing.T) {
	app := serving(t, func(http.ResponseWriter, *http.Request) {})
	ca := mtlstest.NewCA(t)
	f := newFar(t, ca.Identity(backID, nil), route.Permissive, app)
	conn, err := net.Dial("tcp", f.addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	caller := ca.Identity(frontID, brief)
	client, err := (&mtls.Handshaker{}).Client(t.Context(), conn.(*net.TCPConn), caller, backID)
	if err != nil {
		t.Fatal(err)
	}
	_ = client.SetDeadline(time.Now().Add(20 * time.Second))
	r := bufio.NewReader(client)
	if _, err := io.WriteString(client, hello); err != nil {
		t.Fatal(err)
	}
	answered(t, r, "GET")
	_, err = r.ReadByte()
	if after := time.Since(caller.Certificate.Leaf.NotAfter); after < 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s after the certificate: %v", after, err)
	}
	f.ended(t)
}

// TestWhatAPortTakes: plain connections, an application's own TLS, servers that speak
// first, by what the port demands.
func TestWhatAPortTakes(t *testing.T) {
	ca := mtlstest.NewCA(t)
	id := ca.Identity(backID, nil)
	certificate := []tls.Certificate{*ca.Identity(mtlstest.ID("shop", "app"), nil).Certificate}
	speaksFirst := scripted(t, func(c *net.TCPConn, _ *bufio.Reader) { _, _ = io.WriteString(c, "220 ready\r\n") })
	ownTLS := scripted(t, func(c *net.TCPConn, r *bufio.Reader) {
		server := tls.Server(readFirst{c, r}, &tls.Config{Certificates: certificate})
		_, _ = io.Copy(server, server)
		_ = server.CloseWrite()
	})
	asks := func(c *net.TCPConn) (string, error) {
		exchanged := bytes.Repeat([]byte("x"), 100<<10)
		go func() {
			_, _ = c.Write(exchanged)
			_ = c.CloseWrite()
		}()
		got, err := io.ReadAll(c)
		return fmt.Sprint(len(got) == len(exchanged)), err
	}
	listens := func(c *net.TCPConn) (string, error) {
		got, err := io.ReadAll(c)
		return string(got), err
	}
	encrypts := func(config *tls.Config) func(*net.TCPConn) (string, error) {
		return func(c *net.TCPConn) (string, error) {
			config.InsecureSkipVerify = true
			client := tls.Client(c, config)
			if _, err := io.WriteString(client, "hello"); err != nil {
				return "", err
			}
			got := make([]byte, 5)
			if _, err := io.ReadFull(client, got); err != nil {
				return "", err
			}
			_ = client.CloseWrite()
			_, err := client.Read(make([]byte, 1))
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return string(got), err
		}
	}
	for _, c := range []struct {
		name string
		mode route.PeerMode
		app  netip.AddrPort
		talk func(*net.TCPConn) (string, error)
		want string // what comes back
		why  string // the record's reason
	}{
		{"plain", route.Permissive, echoing(t), asks, "true", ""},
		{"plain", route.Disable, echoing(t), asks, "true", ""},
		{"plain", route.Strict, echoing(t), asks, "", "plaintext_refused"},
		{"a server that speaks first", route.Permissive, speaksFirst, listens, "220 ready\r\n", ""},
		{"a server that speaks first", route.Disable, speaksFirst, listens, "220 ready\r\n", ""},
		{"its own TLS", route.Permissive, ownTLS, encrypts(&tls.Config{}), "hello", ""},
		{"its own TLS", route.Disable, ownTLS, encrypts(&tls.Config{}), "hello", ""},
		{"its own TLS", route.Strict, ownTLS, encrypts(&tls.Config{NextProtos: []string{"h2"}}), "", "tls_protocol"},
		{"TLS too old", route.Strict, ownTLS, encrypts(&tls.Config{MaxVersion: tls.VersionTLS12}), "", "tls_version"},
		{"no certificate", route.Strict, ownTLS, encrypts(&tls.Config{NextProtos: []string{mtls.Protocol}}), "", "cert_missing"},
		{"a client that ends and listens", route.Strict, speaksFirst, func(c *net.TCPConn) (string, error) {
			_ = c.CloseWrite()
			return listens(c)
		}, "", ""},
		{"a probe that only connects", route.Strict, echoing(t), func(c *net.TCPConn) (string, error) { return "", c.Close() }, "", ""},
	} {
		t.Run(fmt.Sprintf("%s, mode %d", c.name, c.mode), func(t *testing.T) {
			f := newFar(t, id, c.mode, c.app)
			client, err := net.Dial("tcp", f.addr.String())
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			_ = client.SetDeadline(time.Now().Add(patience))
			got, err := c.talk(client.(*net.TCPConn))
			if c.why == "" && (got != c.want || err != nil) || c.why != "" && err == nil {
				t.Errorf("%q, %v", got, err)
			}
			client.Close()
			if records := f.ended(t); len(records) != 1 || records[0].Reason != c.why {
				t.Errorf("records %v, want %q", records, c.why)
			}
		})
	}
}

// readFirst is a connection of which a reader has read some.
type readFirst struct {
	net.Conn
	io.Reader
}

func (r readFirst) Read(p []byte) (int, error) { return r.Reader.Read(p) }

// TestAProxyIsKnownHoweverItIsAwaited: where plain connections are the rule, and where
// it may take its time to say hello; and where nobody else is allowed.
func TestAProxyIsKnownHoweverItIsAwaited(t *testing.T) {
	front := authz.Source{TrustDomain: mtlstest.TrustDomain, Namespace: "shop", ServiceAccount: "front"}
	for _, mode := range []route.PeerMode{route.Permissive, route.Strict, route.Disable} {
		for _, governed := range []bool{false, true} {
			app := serving2(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "served") })
			ca, config := mtlstest.NewCA(t), &fakeConfig{peers: mode}
			if governed {
				config.govern(t, allowing(authz.Rule{Sources: []authz.Source{front}}))
			}
			far := newFarOf(t, ca.Identity(backID, nil), config, app)
			near := newNear(t, ca.Identity(frontID, nil), route.HTTP, far.addr)
			for _, version := range []int{1, 2} {
				if got := near.try(t, version); got != "200" {
					t.Errorf("mode %d, governed %t, HTTP/%d: %q", mode, governed, version, got)
				}
			}
			over(t, near, far)
		}
	}
}

// TestAProxyIsKnownWhereNobodyLooks: on a port that is opaque.
func TestAProxyIsKnownWhereNobodyLooks(t *testing.T) {
	front := authz.Source{TrustDomain: mtlstest.TrustDomain, Namespace: "shop", ServiceAccount: "front"}
	for _, mode := range []route.PeerMode{route.Permissive, route.Strict, route.Disable} {
		for _, governed := range []bool{false, true} {
			app := echoing(t)
			ca, config := mtlstest.NewCA(t), &fakeConfig{peers: mode, opaque: app.Port()}
			if governed {
				config.govern(t, allowing(authz.Rule{Sources: []authz.Source{front}}))
			}
			far := newFarOf(t, ca.Identity(backID, nil), config, app)
			near := newNear(t, ca.Identity(frontID, nil), route.Opaque, far.addr)
			exchange(t, near.conn(t, listen.Outbound, vip), 16)
			_, inbound := over(t, near, far)
			if len(inbound) != 1 || inbound[0].Reason != "" || inbound[0].PeerIdentity != frontID {
				t.Errorf("mode %d, governed %t: records %v", mode, governed, inbound)
			}
		}
	}
}

// TestAnEndpointOfThisVeryPodIsNotGoneToThroughAProxy: it is handed over in here.
func TestAnEndpointOfThisVeryPodIsNotGoneToThroughAProxy(t *testing.T) {
	ca := mtlstest.NewCA(t)
	app := serving(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "served") })
	near := newNear(t, ca.Identity(backID, nil), route.HTTP, app)
	near.Config.(*fakeConfig).own = app.Addr()
	if got := near.try(t, 1); got != "200" {
		t.Errorf("%q", got)
	}
	near.ended(t)
}

// TestWhatIsNoServiceMayHaveToShowItsIdentity: a pod whose address is dialled.
func TestWhatIsNoServiceMayHaveToShowItsIdentity(t *testing.T) {
	app := serving2(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "served") })
	for _, version := range []int{0, 1, 2} {
		near, far := inMesh(t, route.HTTP, route.Strict, app)
		config := near.Config.(*fakeConfig)
		config.destination = route.Destination{Identity: backID, Protocol: []route.Protocol{route.Opaque, route.HTTP, route.HTTP2}[version]}
		config.service = far.addr
		was := vip
		vip = far.addr
		if got := near.try(t, version); got != "200" {
			t.Errorf("version %d: %q", version, got)
		}
		vip = was
		over(t, near, far)
	}
}

// TestWhatIsWrittenIsSent, though nothing is written after it: TLS takes more than the
// socket has room for.
func TestWhatIsWrittenIsSent(t *testing.T) {
	ca := mtlstest.NewCA(t)
	one, other := loopback(t)
	t.Cleanup(func() { other.Close() })
	shaken := make(chan *mtls.Conn, 1)
	go func() {
		c, err := (&mtls.Handshaker{}).Server(context.Background(), other, ca.Identity(backID, nil), nil)
		if err != nil {
			t.Error(err)
		}
		shaken <- c
	}()
	secure, err := (&mtls.Handshaker{}).Client(t.Context(), one, ca.Identity(frontID, nil), backID)
	peer := <-shaken
	if err != nil || peer == nil {
		t.Fatal(err)
	}
	_ = secure.SetDeadline(time.Now().Add(patience))
	_ = peer.SetDeadline(time.Now().Add(patience))
	c, err := newConn(one)
	if err != nil {
		t.Fatal(err)
	}
	c.secure = secure
	sent := 0
	for block := make([]byte, 1<<20); ; {
		rest := c.writeNow(block)
		if sent += len(block) - len(rest); len(rest) == len(block) {
			break
		}
	}
	if !c.unsent() {
		t.Fatal("there is room for all")
	}
	got := make(chan error, 1)
	go func() {
		_, err := io.ReadFull(peer, make([]byte, sent))
		got <- err
	}()
	if _, err := c.Write(nil); err != nil || c.unsent() {
		t.Errorf("unsent %v, %v", c.unsent(), err)
	}
	if err := <-got; err != nil {
		t.Error(err)
	}
}

// TestDeclaredProbesComeInPlain, from the node's own addresses, and whatever policies
// say; nothing else does.
func TestDeclaredProbesComeInPlain(t *testing.T) {
	ca := mtlstest.NewCA(t)
	app := serving2(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path) })
	local, other := netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("10.9.9.9")
	const refused = "plaintext_refused"
	for _, c := range []struct {
		name    string
		from    netip.Addr // of the node
		port    uint16
		request string
		want    string // the record's reason
	}{
		{"a declared one", local, app.Port(), "GET /healthz?full HTTP/1.1\r\nHost: a\r\n\r\n", ""},
		{"from elsewhere", other, app.Port(), "GET /healthz?full HTTP/1.1\r\nHost: a\r\n\r\n", refused},
		{"of another port", local, app.Port() + 1, "GET /healthz?full HTTP/1.1\r\nHost: a\r\n\r\n", refused},
		{"another query", local, app.Port(), "GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", refused},
		{"another path", local, app.Port(), "GET /healthz/../admin?full HTTP/1.1\r\nHost: a\r\n\r\n", refused},
		{"another method", local, app.Port(), "POST /healthz?full HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", refused},
		{"one that is to be a tunnel", local, app.Port(), "GET /healthz?full HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", refused},
		{"something else than HTTP", local, app.Port(), "\x00\x01", refused},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := &fakeConfig{peers: route.Strict, probes: route.Probes{
				From: []netip.Addr{c.from}, Declared: []route.Probe{{Port: c.port, Target: "/healthz?full"}},
			}}
			f := newFarOf(t, ca.Identity(backID, nil), config.govern(t, allowing(fromFront)), app)
			client, err := net.Dial("tcp", f.addr.String())
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			_ = client.SetDeadline(time.Now().Add(patience))
			_, _ = io.WriteString(client, c.request)
			r := bufio.NewReader(client)
			resp, err := http.ReadResponse(r, nil)
			if c.want == "" && (err != nil || resp.StatusCode != 200) || c.want != "" && !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("%v, %v", resp, err)
			}
			if c.want == "" && err == nil { // and nothing else behind it
				_, _ = io.Copy(io.Discard, resp.Body)
				_, _ = io.WriteString(client, "GET /admin HTTP/1.1\r\nHost: a\r\n\r\n")
				if _, err := r.ReadByte(); !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("another request: %v", err)
				}
			}
			client.Close()
			records := f.ended(t)
			if len(records) == 0 || records[0].Reason != c.want {
				t.Errorf("records %v, want %q", records, c.want)
			}
		})
	}
}

func TestAProbeOfGRPCIsOneCall(t *testing.T) {
	ca := mtlstest.NewCA(t)
	app := serving2(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path) })
	f := newFarOf(t, ca.Identity(backID, nil), &fakeConfig{peers: route.Strict, probes: route.Probes{
		From: []netip.Addr{netip.MustParseAddr("127.0.0.1")}, Declared: []route.Probe{{Port: app.Port(), GRPC: true}},
	}}, app)
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: patience}
	ask := func(path string) error {
		resp, err := client.Post("http://"+f.addr.String()+path, "application/grpc", nil)
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	if err := ask("/grpc.health.v1.Health/Check"); err != nil {
		t.Error(err)
	}
	if err := ask("/grpc.health.v1.Health/Watch"); err == nil {
		t.Error("something else is answered")
	}
	transport.CloseIdleConnections()
	f.ended(t)
}

// TestAServerThatSpokeTooEarlyIsAskedAgain: its proxy took ours, whose hello was late, for
// a plain client that waits to hear something.
func TestAServerThatSpokeTooEarlyIsAskedAgain(t *testing.T) {
	ca := mtlstest.NewCA(t)
	f := newFar(t, ca.Identity(backID, nil), route.Permissive, echoing(t))
	early, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer early.Close()
	go func() {
		for n := 0; ; n++ {
			c, err := early.Accept()
			if err != nil {
				return
			}
			if n == 0 {
				_, _ = io.WriteString(c, "220 mail.example.com\r\n")
				continue // it stays open
			}
			to, err := net.Dial("tcp", f.addr.String())
			if err != nil {
				t.Error(err)
				return
			}
			go func() { _, _ = io.Copy(to, c) }()
			go func() { _, _ = io.Copy(c, to) }()
		}
	}()
	near := newNear(t, ca.Identity(frontID, nil), route.Opaque, early.Addr().(*net.TCPAddr).AddrPort())
	client := near.conn(t, listen.Outbound, vip)
	ping(t, client, client)
	client.Close()
	near.ended(t)
}

// metered has what a bench logs counted as well.
func (b *bench) metered() *telemetry.Meter {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.meter = telemetry.NewMeter(func() []route.Destination { return nil })
	b.Failed = b.meter.Failed
	return b.meter
}

// failedOf is how many connections have ended so, and how many otherwise.
func failedOf(m *telemetry.Meter, d proxypb.Direction, why string) (uint64, uint64) {
	var so, otherwise uint64
	for _, x := range m.Last().GetTraffic() {
		if x.GetReason() == why && x.GetPeers().GetDirection() == d {
			so += x.GetClosed()
		} else {
			otherwise += x.GetClosed()
		}
	}
	return so, otherwise
}

// expired has a certificate expire long ago.
func expired(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Unix(1, 0), time.Unix(2, 0) }

// TestEveryFailedHandshakeIsCountedUnderItsReason, beside the one that is right.
func TestEveryFailedHandshakeIsCountedUnderItsReason(t *testing.T) {
	ca, foreign := mtlstest.NewCA(t), mtlstest.NewCA(t)
	id := ca.Identity(backID, nil)
	leaf := func(change func(*x509.Certificate)) *tls.Config {
		return &tls.Config{Certificates: []tls.Certificate{*ca.Identity(frontID, change).Certificate}}
	}
	for _, c := range []struct {
		name   string
		config *tls.Config
		want   string
	}{
		{"as a proxy does it", leaf(nil), ""},
		{"TLS 1.0", &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS10}, "tls_version"},
		{"TLS 1.1", &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}, "tls_version"},
		{"TLS 1.2", &tls.Config{MaxVersion: tls.VersionTLS12}, "tls_version"},
		{"another ALPN", &tls.Config{NextProtos: []string{"h2", "http/1.1"}}, "tls_protocol"},
		{"no ALPN", &tls.Config{NextProtos: []string{}}, "tls_protocol"},
		{"no certificate", &tls.Config{}, "cert_missing"},
		{"a foreign CA", &tls.Config{Certificates: []tls.Certificate{*foreign.Identity(frontID, nil).Certificate}}, "cert_untrusted"},
		{"an expired leaf", leaf(expired), "cert_expired"},
		{"a leaf of tomorrow", leaf(func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(24*time.Hour), time.Now().Add(48*time.Hour)
		}), "cert_not_yet_valid"},
		{"two URI SANs", leaf(func(c *x509.Certificate) {
			c.URIs = append(c.URIs, &url.URL{Scheme: "spiffe", Host: "other.test", Path: "/x"})
		}), "cert_malformed"},
		{"another trust domain", leaf(func(c *x509.Certificate) { c.URIs[0].Host = "other.test" }), "trust_domain"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFar(t, id, route.Strict, echoing(t))
			meter := f.metered()
			tcp, err := net.Dial("tcp", f.addr.String())
			if err != nil {
				t.Fatal(err)
			}
			defer tcp.Close()
			_ = tcp.SetDeadline(time.Now().Add(patience))
			if c.config.InsecureSkipVerify = true; c.config.NextProtos == nil {
				c.config.NextProtos = []string{mtls.Protocol}
			}
			client := tls.Client(tcp, c.config)
			_, _ = io.WriteString(client, "hello")
			got := make([]byte, 5)
			_, err = io.ReadFull(client, got)
			if (err == nil) != (c.want == "") {
				t.Errorf("%q, %v", got, err)
			}
			_ = client.CloseWrite()
			records := f.ended(t)
			if len(records) != 1 || records[0].Reason != c.want || records[0].TLSNanos <= 0 || c.want != "" && records[0].UpstreamAddress.IsValid() {
				t.Errorf("records %v, want %q", records, c.want)
			}
			shown := map[bool]string{true: frontID, false: ""}[c.want == ""]
			if records[0].PeerIdentity != shown {
				t.Errorf("the peer is %q, want %q", records[0].PeerIdentity, shown)
			}
			if n, others := failedOf(meter, proxypb.Direction_INBOUND, c.want); n != 1 || others != 0 {
				t.Errorf("%d counted under %q, %d otherwise", n, c.want, others)
			}
		})
	}
}

// TestAFailedHandshakeWithAnEndpointIsCountedUnderItsReason, beside one that is right.
func TestAFailedHandshakeWithAnEndpointIsCountedUnderItsReason(t *testing.T) {
	ca, foreign := mtlstest.NewCA(t), mtlstest.NewCA(t)
	for _, c := range []struct {
		name      string
		near, far *mtls.Identity
		want      string
	}{
		{"as it is to be", ca.Identity(frontID, nil), ca.Identity(backID, nil), ""},
		{"another pod's", ca.Identity(frontID, nil), ca.Identity(frontID, nil), "peer_identity"},
		{"expired", ca.Identity(frontID, nil), ca.Identity(backID, expired), "cert_expired"},
		{"a foreign CA", ca.Identity(frontID, nil), foreign.Identity(backID, nil), "cert_untrusted"},
		{"the own one expired", ca.Identity(frontID, expired), ca.Identity(backID, nil), "cert_expired"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFar(t, c.far, route.Permissive, echoing(t))
			near := newNear(t, c.near, route.Opaque, f.addr)
			meter := near.metered()
			client := near.conn(t, listen.Outbound, vip)
			_, _ = io.WriteString(client, "hello")
			_ = client.CloseWrite()
			got, err := io.ReadAll(client)
			if (string(got) == "hello" && err == nil) != (c.want == "") {
				t.Errorf("%q, %v", got, err)
			}
			records, _ := over(t, near, f)
			shown := map[bool]string{true: backID, false: ""}[c.want == ""]
			if len(records) != 1 || records[0].Reason != c.want || records[0].PeerIdentity != shown || (records[0].TLSNanos > 0) != (c.want == "") {
				t.Errorf("records %v, want %q", records, c.want)
			}
			if n, others := failedOf(meter, proxypb.Direction_OUTBOUND, c.want); n != 1 || others != 0 {
				t.Errorf("%d counted under %q, %d otherwise", n, c.want, others)
			}
		})
	}
}

// TestBothEndsAreToldWhoTheOtherWas, and the handshake's time once.
func TestBothEndsAreToldWhoTheOtherWas(t *testing.T) {
	app := serving2(t, func(http.ResponseWriter, *http.Request) {})
	for _, version := range []int{1, 2} {
		near, far := inMesh(t, route.HTTP, route.Strict, app)
		mutual := near.metered()
		if version == 1 {
			client := near.conn(t, listen.Outbound, vip)
			r := bufio.NewReader(client)
			for range 3 {
				_, _ = say(t, client, r, hello, "GET")
			}
			client.Close()
		} else {
			client := near.client2(t, listen.Outbound, vip, 0)
			for range 3 {
				_, _ = call(t, client, "GET", "/", "")
			}
		}
		outbound, inbound := over(t, near, far)
		for i, r := range inbound {
			if r.PeerIdentity != frontID || (r.TLSNanos > 0) != (i == 0) {
				t.Errorf("HTTP/%d, inbound: %v", version, r)
			}
		}
		for i, r := range outbound {
			if r.PeerIdentity != backID || (r.TLSNanos > 0) != (i == 0 && version == 1) || r.TLSNanos > r.ConnectNanos || i > 0 && r.ConnectNanos > 0 {
				t.Errorf("HTTP/%d, outbound: %v", version, r)
			}
		}
		traffic := mutual.Last().GetTraffic()
		if len(outbound) != 3 || len(inbound) != 3 || len(traffic) != 1 || !traffic[0].GetMutualTls() {
			t.Errorf("HTTP/%d: %d and %d records, counted %v", version, len(outbound), len(inbound), traffic)
		}
	}
}

// TestACallToThePodItselfIsItsOwn: in the records of both sides it goes without TLS.
func TestACallToThePodItselfIsItsOwn(t *testing.T) {
	for name, prepare := range toApplication(t, serving2(t, func(http.ResponseWriter, *http.Request) {})) {
		b, direction, original, want := prepare(t)
		if direction == listen.Inbound {
			continue
		}
		for _, version := range []int{1, 2} {
			if version == 1 {
				client := b.conn(t, direction, original)
				_, _ = say(t, client, bufio.NewReader(client), hello, "GET")
				client.Close()
			} else {
				_, _ = call(t, b.client2(t, direction, original, 0), "GET", "/", "")
			}
		}
		records := b.ended(t)
		for _, r := range records {
			if shown := map[proxypb.Direction]string{proxypb.Direction_INBOUND: strings.TrimPrefix(want, "URI=")}[r.Direction]; r.PeerIdentity != shown || r.TLSNanos != 0 {
				t.Errorf("%s: %v", name, r)
			}
		}
		if len(records) != 4 {
			t.Errorf("%s: %d records", name, len(records))
		}
	}
}

// TestWhatIsPlainEndsWhenMTLSIsDemanded: the requests of a connection that came before, and
// a connection that carries none.
func TestWhatIsPlainEndsWhenMTLSIsDemanded(t *testing.T) {
	ca := mtlstest.NewCA(t)
	app := serving2(t, func(http.ResponseWriter, *http.Request) {})
	for name, original := range map[string]netip.AddrPort{"HTTP/1": app, "TCP": echoing(t)} {
		t.Run(name, func(t *testing.T) {
			var mode atomic.Uint32 // Permissive
			f := newFarOf(t, ca.Identity(backID, nil), &fakeConfig{peersNow: func() route.PeerMode { return route.PeerMode(mode.Load()) }}, original)
			client, err := net.Dial("tcp", f.addr.String())
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			_ = client.SetDeadline(time.Now().Add(patience))
			r := bufio.NewReader(client)
			if name == "TCP" {
				ping(t, client, r)
			} else if resp, _ := say(t, client, r, hello, "GET"); resp.StatusCode != 200 {
				t.Errorf("%v", resp)
			}
			mode.Store(uint32(route.Strict))
			f.Recheck()
			if name != "TCP" {
				_, _ = io.WriteString(client, hello)
			}
			if _, err := r.ReadByte(); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("%v, want a reset", err)
			}
			client.Close()
			if records := f.ended(t); records[len(records)-1].Reason != "plaintext_refused" {
				t.Errorf("records %v", records)
			}
		})
	}
}
