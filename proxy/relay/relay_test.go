package relay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/agent/journal"
	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/route"
	"github.com/weirmesh/weir/proxy/sock/socktest"
	"github.com/weirmesh/weir/proxy/telemetry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is what a test has for what it waits for, if that comes at all: much more
// than it takes, on a busy machine with the race detector.
const patience = time.Minute

// fakeConfig knows one Service.
type fakeConfig struct {
	unready     error
	own         netip.Addr
	opaque      uint16
	inbound     *route.Policy
	policies    *atomic.Pointer[authz.Set] // nil: none, for good
	service     netip.AddrPort
	destination route.Destination
	peers       route.PeerMode
	peersNow    func() route.PeerMode // instead of peers, if not nil
	probes      route.Probes
}

func (f *fakeConfig) Ready(context.Context) error { return f.unready }
func (f *fakeConfig) Own(a netip.Addr) bool       { return a == f.own }
func (f *fakeConfig) Opaque(port uint16) bool     { return port == f.opaque }
func (f *fakeConfig) Inbound(uint16) *route.Policy {
	return f.inbound
}
func (f *fakeConfig) Authorization() *authz.Set {
	if f.policies == nil {
		return nil
	}
	return f.policies.Load()
}
func (f *fakeConfig) Probes() route.Probes { return f.probes }
func (f *fakeConfig) Peers(uint16) route.PeerMode {
	if f.peersNow != nil {
		return f.peersNow()
	}
	return f.peers
}
func (f *fakeConfig) Known(a netip.AddrPort) (route.Destination, bool) {
	d, _ := f.Destination(context.Background(), a)
	return d, true
}
func (f *fakeConfig) Destination(_ context.Context, a netip.AddrPort) (route.Destination, error) {
	if a == f.service {
		return f.destination, nil
	}
	return route.Destination{}, nil
}

// bench is a server with what it logged.
type bench struct {
	Server
	mu      sync.Mutex
	records []*journal.Record
	clients []net.Conn       // to be closed when all is done
	meter   *telemetry.Meter // counts what is logged; nil: nothing is counted

	identity authz.Identity // of peers
}

func newBench(t testing.TB, config *fakeConfig) *bench {
	b := &bench{}
	b.Config = config
	b.Log = func(r *telemetry.Record) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.records = append(b.records, new(r.Row()))
		if b.meter != nil {
			b.meter.End(r)
		}
	}
	t.Cleanup(b.pipes.close)
	t.Cleanup(func() {
		b.handlers.Wait() // as Serve does
		b.streams.close()
		b.sessions.close()
		b.pollers.close()
	})
	return b
}

// conn is a client's connection, and the handling of its other end.
func (b *bench) conn(t testing.TB, d listen.Direction, original netip.AddrPort) *net.TCPConn {
	t.Helper()
	return b.connOf(t, d, netip.AddrFrom4([4]byte{127, 0, 0, 1}), original)
}

// connOf is conn of a client with that address, as the proxy is told.
func (b *bench) connOf(t testing.TB, d listen.Direction, caller netip.Addr, original netip.AddrPort) *net.TCPConn {
	t.Helper()
	client, accepted := loopback(t)
	b.handlers.Add(1)
	go b.handle(context.Background(), listen.Conn{
		TCPConn: accepted, Direction: d, Original: original, Accepted: time.Now(), Identity: b.identity, ID: b.identity.String(),
		Peer: netip.AddrPortFrom(caller, client.LocalAddr().(*net.TCPAddr).AddrPort().Port()),
	})
	return client
}

// loopback is a client's connection, and its other end, which is for the handler to
// close.
func loopback(t testing.TB) (*net.TCPConn, *net.TCPConn) {
	t.Helper()
	client, server := socktest.Connected(t, "tcp", "127.0.0.1:0")
	_ = client.SetDeadline(time.Now().Add(patience))
	return client.(*net.TCPConn), server.(*net.TCPConn)
}

// accepting is a server that does the same with each connection, and then closes it.
func accepting(t testing.TB, serve func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		conns.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// echoing is a server that gives back what it gets.
func echoing(t *testing.T) netip.AddrPort {
	t.Helper()
	return accepting(t, func(c *net.TCPConn) { _, _ = io.Copy(c, c) })
}

func closedPort(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func exchange(t *testing.T, c *net.TCPConn, size int) {
	t.Helper()
	want := bytes.Repeat([]byte("0123456789abcdef"), size/16)
	go func() {
		_, _ = c.Write(want)
		_ = c.CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes came back of %d, %v", len(got), len(want), err)
	}
}

func TestRelay(t *testing.T) {
	service := netip.MustParseAddrPort("10.96.0.1:80")
	backend := echoing(t)
	refused := reason.ConnectRefused.String()
	for _, c := range []struct {
		name      string
		config    fakeConfig
		direction listen.Direction
		original  netip.AddrPort
		reasons   []string // of the records; "" for one that went well
		upstream  netip.AddrPort
	}{
		{name: "passed through", direction: listen.Outbound, original: backend, reasons: []string{""}, upstream: backend},
		{name: "inbound", direction: listen.Inbound, original: backend, reasons: []string{""}, upstream: backend},
		{name: "service", direction: listen.Outbound, original: service, reasons: []string{""}, upstream: backend,
			config: fakeConfig{service: service, destination: route.Destination{Service: "a/b", Endpoints: []route.Endpoint{{Addr: backend}}}}},
		{name: "inbound asks for no service", direction: listen.Inbound, original: backend, reasons: []string{""}, upstream: backend,
			config: fakeConfig{service: backend, destination: route.Destination{Service: "a/b"}}},
		{name: "handed over", direction: listen.Outbound, original: service, reasons: []string{"", ""}, upstream: backend,
			config: fakeConfig{service: service, own: backend.Addr(), destination: route.Destination{Service: "a/b", Endpoints: []route.Endpoint{{Addr: backend}}}}},
		{name: "another endpoint", direction: listen.Outbound, original: service, reasons: []string{""}, upstream: backend,
			config: fakeConfig{service: service, destination: route.Destination{Service: "a/b", Endpoints: []route.Endpoint{{Addr: closedPort(t)}, {Addr: backend}}}}},
		{name: "at most three", direction: listen.Outbound, original: service, reasons: []string{refused},
			config: fakeConfig{service: service, destination: route.Destination{Service: "a/b", Endpoints: []route.Endpoint{
				{Addr: closedPort(t)}, {Addr: closedPort(t)}, {Addr: closedPort(t)}, {Addr: closedPort(t)}, {Addr: closedPort(t)}}}}},
		{name: "no endpoints", direction: listen.Outbound, original: service, reasons: []string{"no_endpoints"},
			config: fakeConfig{service: service, destination: route.Destination{Service: "a/b"}}},
		{name: "refused", direction: listen.Inbound, original: closedPort(t), reasons: []string{refused}},
		{name: "not configured", direction: listen.Inbound, original: backend, reasons: []string{"config_unavailable"},
			config: fakeConfig{unready: &reason.Error{Reason: reason.ConfigUnavailable}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, &c.config)
			client := b.conn(t, c.direction, c.original)
			if c.reasons[0] == "" {
				exchange(t, client, 1<<20)
			} else if _, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("%v, want a reset", err)
			}
			b.handlers.Wait()
			if len(b.records) != len(c.reasons) {
				t.Fatalf("records %v", b.records)
			}
			for i, r := range b.records {
				if r.Reason != c.reasons[i] || c.upstream.IsValid() && r.UpstreamAddress != c.upstream {
					t.Errorf("record %v", r)
				}
			}
			for _, e := range c.config.destination.Endpoints {
				if n := b.balancer.Active(e.Addr); n != 0 {
					t.Errorf("%d connections to %s counted", n, e.Addr)
				}
			}
		})
	}
}

// TestWithoutPipes: when descriptors have run out, bytes take the slow way.
func TestWithoutPipes(t *testing.T) {
	b := newBench(t, &fakeConfig{})
	client := b.conn(t, listen.Outbound, echoing(t))
	if _, err := client.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(client, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	b.pipes.close()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	_, got := b.pipes.get()
	exchange(t, client, 1<<20)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if got {
		t.Error("there were pipes")
	}
	b.handlers.Wait()
}

func TestOverload(t *testing.T) {
	b := newBench(t, &fakeConfig{})
	b.MaxConnections = 1
	to := echoing(t)
	first := b.conn(t, listen.Outbound, to)
	if _, err := first.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(first, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	second := b.conn(t, listen.Outbound, to)
	if _, err := second.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%v, want a reset", err)
	}
	first.Close()
	b.handlers.Wait()
	exchange(t, b.conn(t, listen.Outbound, to), 16) // there is room again
	b.handlers.Wait()
	if len(b.records) != 3 || b.records[0].Reason != "overload" {
		t.Errorf("records %v", b.records)
	}
}

// TestServeEnds: Serve goes when its connections have gone, or when its time is up.
func TestServeEnds(t *testing.T) {
	for _, patient := range []bool{true, false} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		f, err := l.(*net.TCPListener).File()
		if err != nil {
			t.Fatal(err)
		}
		listener, err := listen.New(listen.Inbound, int(f.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		b := newBench(t, &fakeConfig{})
		b.Drain = 50 * time.Millisecond
		if patient {
			b.Drain = time.Minute
		}
		client := b.conn(t, listen.Inbound, echoing(t))
		if _, err := client.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(client, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- b.Serve(ctx, []*listen.Listener{listener}) }()
		cancel()
		want := reason.Shutdown.String()
		if patient {
			want = ""
			exchange(t, client, 1<<20)
		} else if _, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%v, want a reset", err)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if len(b.records) != 1 || b.records[0].Reason != want {
			t.Errorf("records %v, want %q", b.records, want)
		}
		f.Close()
		l.Close()
	}
}
