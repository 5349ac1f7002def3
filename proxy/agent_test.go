package main

import (
	"context"
	"net/netip"
	"strconv"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/weirmesh/weir/agent/journal"
	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/route"
)

// fakeAgent is an agent's session with one proxy.
type fakeAgent struct {
	own      []netip.Addr
	mesh     []string
	identity *proxypb.Identity                                      // nil: the pod has none
	sign     func(*proxypb.CertificateRequest) *proxypb.Certificate // where it has

	authorization *proxypb.Authorization // told at the start of a session
	classic       bool                   // ProxyConfig's, the same

	mu           sync.Mutex
	destinations map[netip.AddrPort]route.Destination
	asked        []string
	records      []*journal.Record
	counted      []*proxypb.Traffic
	ejections    []*proxypb.Ejections
	failures     []*proxypb.Failures
	acked        int
	requests     int
	keptUntil    []time.Time   // of memory files
	changed      chan struct{} // closed and made anew at each change
}

// connect begins a session; it ends with the test, or when what it returns is
// called.
func (a *fakeAgent) connect(t testing.TB, path string) func() {
	t.Helper()
	a.changed = make(chan struct{})
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := proxypb.NewControlClient(conn).Session(ctx)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go a.serve(stream, done)
	var reading sync.WaitGroup
	records := journalOf(t, path)
	reading.Go(func() { a.read(ctx, records) })
	stop := sync.OnceFunc(func() {
		cancel()
		<-done
		reading.Wait()
		records.Close()
		conn.Close()
	})
	t.Cleanup(stop)
	a.await(t, "the first config to be acknowledged", func() bool { return a.acked > 0 })
	return stop
}

func (a *fakeAgent) serve(stream grpc.BidiStreamingClient[proxypb.ToProxy, proxypb.FromProxy], done chan<- struct{}) {
	defer close(done)
	nonce := uint64(0)
	for {
		msg, err := stream.Recv()
		if err != nil {
			return
		}
		if m := msg.GetMetrics(); m != nil {
			// An error is Recv's, too.
			_ = stream.Send(&proxypb.ToProxy{Message: &proxypb.ToProxy_MetricsAck{MetricsAck: &proxypb.MetricsAck{Number: m.GetNumber()}}})
		}
		if m := msg.GetCertificateRequest(); m != nil {
			_ = stream.Send(&proxypb.ToProxy{Message: &proxypb.ToProxy_Certificate{Certificate: a.sign(m)}})
		}
		update := a.hear(msg)
		if update == nil {
			continue
		}
		nonce++
		update.Nonce = nonce
		if stream.Send(&proxypb.ToProxy{Message: &proxypb.ToProxy_Update{Update: update}}) != nil {
			return
		}
	}
}

// read takes in the access log until ctx is done, and what there is then.
func (a *fakeAgent) read(ctx context.Context, from *journal.Reader) {
	buf := make([]byte, journal.MinBuffer)
	for last := false; !last; {
		select {
		case <-ctx.Done():
			last = true
		case <-time.After(2 * time.Millisecond):
		}
		var got []*journal.Record
		_, err := from.Read(buf, func(r *journal.Record) { got = append(got, new(r.Clone())) })
		if err != nil {
			panic(err)
		}
		if got == nil {
			continue
		}
		a.mu.Lock()
		a.records = append(a.records, got...)
		close(a.changed)
		a.changed = make(chan struct{})
		a.mu.Unlock()
	}
}

// hear takes a message in, and returns the update it calls for.
func (a *fakeAgent) hear(msg *proxypb.FromProxy) *proxypb.Update {
	a.mu.Lock()
	defer a.mu.Unlock()
	defer func() {
		close(a.changed)
		a.changed = make(chan struct{})
	}()
	switch m := msg.GetMessage().(type) {
	case *proxypb.FromProxy_Ack:
		a.acked++
	case *proxypb.FromProxy_CertificateRequest:
		a.requests++
	case *proxypb.FromProxy_CertificateKept:
		a.keptUntil = append(a.keptUntil, time.Unix(0, m.CertificateKept.GetNotAfterUnixNanos()))
	case *proxypb.FromProxy_Metrics:
		a.counted = append(a.counted, m.Metrics.GetTraffic()...)
		a.ejections = append(a.ejections, m.Metrics.GetEjections()...)
		a.failures = append(a.failures, m.Metrics.GetFailures()...)
	case *proxypb.FromProxy_Subscribe:
		update := &proxypb.Update{}
		for name := range m.Subscribe.GetVersions() {
			a.asked = append(a.asked, name)
			update.Resources = append(update.Resources, a.resource(name))
		}
		return update
	}
	return nil
}

func (a *fakeAgent) resource(name string) *proxypb.Resource {
	r := &proxypb.Resource{Name: name, Version: "v" + strconv.Itoa(len(a.asked))}
	if name == proxypb.ProxyResource {
		config := &proxypb.ProxyConfig{MeshRanges: a.mesh, Authorization: a.authorization, ClassicKeyExchange: a.classic}
		for _, own := range a.own {
			config.OwnAddresses = append(config.OwnAddresses, own.String())
		}
		r.Body = &proxypb.Resource_Proxy{Proxy: config}
		return r
	}
	if name == proxypb.IdentityResource {
		r.Body = &proxypb.Resource_Identity{Identity: a.identity}
		if a.identity == nil {
			r.Body = &proxypb.Resource_Identity{Identity: &proxypb.Identity{}}
		}
		return r
	}
	addr, err := proxypb.ParseDestinationName(name)
	if err != nil {
		panic(err)
	}
	r.Body = &proxypb.Resource_Destination{Destination: proxypb.FromDestination(a.destinations[addr])}
	return r
}

// await waits until holds, which is called with the lock held.
func (a *fakeAgent) await(t testing.TB, what string, holds func() bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		a.mu.Lock()
		ok, changed := holds(), a.changed
		a.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("waited in vain for %s; records: %v", what, a.records)
		}
	}
}

// record waits for the nth record, from 0.
func (a *fakeAgent) record(t testing.TB, n int) *journal.Record {
	t.Helper()
	a.await(t, "access log record "+strconv.Itoa(n), func() bool { return len(a.records) > n })
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.records[n]
}
