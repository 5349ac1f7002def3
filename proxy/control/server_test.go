package control

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/agent/journal"
	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/identity"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/telemetry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serving is a control server on a socket.
func serving(t *testing.T) (*Server, string) {
	t.Helper()
	s, path, _ := servingUntil(t, nil)
	return s, path
}

// servingUntil is one that ends with the test, or before by the function.
func servingUntil(t *testing.T, draining <-chan struct{}) (*Server, string, func()) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	store := NewStore(identity.New())
	records, err := journal.Create()
	if err != nil {
		t.Fatal(err)
	}
	says := func(what string) func(int) error {
		return func(fd int) error {
			_, err := unix.Write(fd, []byte(what))
			return err
		}
	}
	s := &Server{
		Store: store, Journal: records, Meter: telemetry.NewMeter(store.Destinations), Version: "v1",
		Handover: says("listeners"), Identity: says("identity"), Records: says("journal"), Draining: draining,
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, int(f.Fd())) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		s.Store.Close()
		records.Close()
		f.Close()
	})
	return s, path, cancel
}

func connect(t *testing.T, path string) grpc.BidiStreamingClient[proxypb.ToProxy, proxypb.FromProxy] {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	stream, err := proxypb.NewControlClient(conn).Session(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

func receiveOne(t *testing.T, stream grpc.BidiStreamingClient[proxypb.ToProxy, proxypb.FromProxy]) *proxypb.FromProxy {
	t.Helper()
	msg, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	return msg
}

func send(t *testing.T, stream grpc.BidiStreamingClient[proxypb.ToProxy, proxypb.FromProxy], u *proxypb.Update) {
	t.Helper()
	if err := stream.Send(&proxypb.ToProxy{Message: &proxypb.ToProxy_Update{Update: u}}); err != nil {
		t.Fatal(err)
	}
}

// TestACertificateIsAskedForAndAnsweredInTheSession: and what was under way is in the
// next one, too.
func TestACertificateIsAskedForAndAnsweredInTheSession(t *testing.T) {
	s, path := serving(t)
	running, stop := context.WithCancel(t.Context())
	defer stop()
	go s.Store.identity.Run(running)
	const id = "spiffe://cluster.local/ns/shop/sa/front"
	root := selfSigned(t)
	stream := connect(t, path)
	receiveOne(t, stream)
	send(t, stream, &proxypb.Update{Nonce: 1, Resources: []*proxypb.Resource{proxyResource("1"), {
		Name: "identity", Version: "7", Body: &proxypb.Resource_Identity{Identity: &proxypb.Identity{Id: id}},
	}}})
	if got := receiveOne(t, stream).GetNack(); !strings.Contains(got.GetError(), "without a trust domain") {
		t.Errorf("answer %v", got)
	}
	told := &proxypb.Identity{Id: id, TrustDomain: "cluster.local", Roots: [][]byte{root}}
	send(t, stream, &proxypb.Update{Nonce: 2, Resources: []*proxypb.Resource{proxyResource("1"), {
		Name: "identity", Version: "8", Body: &proxypb.Resource_Identity{Identity: told},
	}}})
	request := receiveRequest(t, stream)
	send(t, stream, &proxypb.Update{Nonce: 3, Removed: []string{"identity"}}) // by an agent that knows none
	stream = connect(t, path)
	if got := receiveOne(t, stream).GetSubscribe().GetVersions()["identity"]; got != "8" {
		t.Errorf("it has version %q", got)
	}
	if got := receiveRequest(t, stream); !proto.Equal(got, request) {
		t.Errorf("asked again: %v", got)
	}
	answer := &proxypb.Certificate{Number: request.GetNumber(), Error: "denied"}
	if err := stream.Send(&proxypb.ToProxy{Message: &proxypb.ToProxy_Certificate{Certificate: answer}}); err != nil {
		t.Fatal(err)
	}
	if got := receiveRequest(t, stream); got.GetNumber() <= request.GetNumber() {
		t.Errorf("after a refusal: %v", got)
	}
}

// receiveRequest skips what else there is to say.
func receiveRequest(t *testing.T, stream grpc.BidiStreamingClient[proxypb.ToProxy, proxypb.FromProxy]) *proxypb.CertificateRequest {
	t.Helper()
	for {
		msg := receiveOne(t, stream)
		if nack := msg.GetNack(); nack != nil {
			t.Errorf("refused: %v", nack)
		}
		if m := msg.GetCertificateRequest(); m != nil {
			return m
		}
	}
}

// selfSigned is a certificate in DER.
func selfSigned(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestSession(t *testing.T) {
	s, path := serving(t)
	stream := connect(t, path)
	first := receiveOne(t, stream).GetSubscribe()
	if got := first.GetProxyVersion(); got != "v1" {
		t.Errorf("the proxy calls itself %q", got)
	}
	if got := first.GetVersions(); !cmp.Equal(got, map[string]string{"proxy": "", "identity": ""}) {
		t.Errorf("first %v", got)
	}
	send(t, stream, &proxypb.Update{Nonce: 5, Resources: []*proxypb.Resource{{Name: "proxy", Version: "1"}}})
	if got := receiveOne(t, stream).GetNack(); got.GetNonce() != 5 || got.GetError() == "" {
		t.Errorf("answer %v", got)
	}
	send(t, stream, &proxypb.Update{Nonce: 6, Resources: []*proxypb.Resource{proxyResource("2")}})
	if got := receiveOne(t, stream).GetAck(); got.GetNonce() != 6 {
		t.Errorf("answer %v", got)
	}
	if err := s.Store.Ready(t.Context()); err != nil {
		t.Error(err)
	}

	asked := make(chan string, 1)
	go func() {
		d, err := s.Store.Destination(t.Context(), inside)
		if err != nil {
			t.Error(err)
		}
		asked <- d.Service
	}()
	if got := receiveOne(t, stream).GetSubscribe().GetVersions(); !cmp.Equal(got, map[string]string{"dst/10.96.0.1:80": ""}) {
		t.Errorf("asked for %v", got)
	}
	send(t, stream, &proxypb.Update{Nonce: 7, Resources: []*proxypb.Resource{destinationResource(inside, "3", back)}})
	if got := <-asked; got != "shop/back" {
		t.Errorf("told %q", got)
	}
	receiveOne(t, stream) // Ack

	// Another agent comes: it counts.
	second := connect(t, path)
	if got := receiveOne(t, second).GetSubscribe().GetVersions(); !cmp.Equal(got, map[string]string{"proxy": "2", "identity": "", "dst/10.96.0.1:80": "3"}) {
		t.Errorf("second session: %v", got)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Aborted {
		t.Errorf("the first session ends with %v", err)
	}
	if got := receiveOne(t, second).GetMetrics().GetEndpoints(); len(got) != 1 || got[0].GetPeers().GetService() != "shop/back" {
		t.Errorf("metrics %v", got)
	}
	_ = second.CloseSend()
	if _, err := second.Recv(); !errors.Is(err, io.EOF) && status.Code(err) != codes.Unknown {
		t.Errorf("it ends with %v", err)
	}
}

func TestFirstByte(t *testing.T) {
	_, path := serving(t)
	for _, c := range []struct{ say, want string }{{"L", "listeners"}, {"I", "identity"}, {"J", "journal"}, {"X", ""}, {"", ""}} {
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(2 * peekTimeout))
		if c.say != "" {
			if _, err := io.WriteString(conn, c.say); err != nil {
				t.Fatal(err)
			}
		}
		got, err := io.ReadAll(conn)
		if string(got) != c.want || errors.Is(err, unix.ETIMEDOUT) || c.want != "" && err != nil {
			t.Errorf("%q: answer %q, %v", c.say, got, err)
		}
		conn.Close()
	}
}

// FuzzFirstByte: only HTTP/2's preface gets to gRPC, only L to the listeners, only I to
// the identity, only J to the journal.
func FuzzFirstByte(f *testing.F) {
	for _, s := range []string{"", "P", "L", "I", "J", "PRI * HTTP/2.0", "\x16"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		want := forNothing
		switch {
		case bytes.HasPrefix(b, []byte("P")):
			want = forRPC
		case bytes.HasPrefix(b, []byte("L")):
			want = forListeners
		case bytes.HasPrefix(b, []byte("I")):
			want = forIdentity
		case bytes.HasPrefix(b, []byte("J")):
			want = forJournal
		}
		if got := kindOf(b); got != want {
			t.Errorf("%q is %d, want %d", b, got, want)
		}
	})
}

// FuzzUpdate: whatever an agent sends is taken or refused.
func FuzzUpdate(f *testing.F) {
	f.Add("proxy", "1", "10.0.0.1", "10.0.0.0/8", uint32(80), uint32(90))
	f.Add("dst/10.0.0.1:80", "1", "10.0.0.2:80", "a/b", uint32(0), uint32(1<<16))
	f.Fuzz(func(t *testing.T, name, version, x, y string, first, last uint32) {
		s := NewStore(identity.New())
		defer s.Close()
		session, _ := s.begin()
		_ = s.apply(session, &proxypb.Update{Removed: []string{name}, Resources: []*proxypb.Resource{
			{Name: name, Version: version, Body: &proxypb.Resource_Proxy{Proxy: &proxypb.ProxyConfig{OwnAddresses: []string{x}, MeshRanges: []string{y},
				OpaquePorts: []*proxypb.PortRange{{First: first, Last: last}}}}},
		}})
		_ = s.apply(session, &proxypb.Update{Resources: []*proxypb.Resource{
			{Name: name, Version: version, Body: &proxypb.Resource_Destination{Destination: &proxypb.Destination{Service: y, Endpoints: []*proxypb.Endpoint{{Address: x}}}}},
		}})
	})
}

// TestMetricsAreSentAgainUntilTheyAreAcknowledged: by the session, or by the next one.
func TestMetricsAreSentAgainUntilTheyAreAcknowledged(t *testing.T) {
	s, path := serving(t)
	ended := func(workload string) {
		s.Meter.End(&telemetry.Record{Direction: listen.Outbound, Protocol: "HTTP/1.1", Service: "shop/back", Workload: workload})
	}
	ended("shop/a") // before somebody comes
	stream := connect(t, path)
	receiveOne(t, stream) // Subscribe
	first := receiveOne(t, stream).GetMetrics()
	if got := first.GetTraffic(); len(got) != 1 || got[0].GetPeers().GetWorkload() != "shop/a" {
		t.Fatalf("first %v", first)
	}
	ended("shop/b")

	second := connect(t, path) // the first one has not acknowledged it
	receiveOne(t, second)
	if got := receiveOne(t, second).GetMetrics(); got.GetNumber() != first.GetNumber() || !proto.Equal(got, first) {
		t.Errorf("again %v, want %v", got, first)
	}
	if err := second.Send(&proxypb.ToProxy{Message: &proxypb.ToProxy_MetricsAck{MetricsAck: &proxypb.MetricsAck{Number: first.GetNumber()}}}); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	next := receiveOne(t, second).GetMetrics()
	if got := next.GetTraffic(); len(got) != 1 || got[0].GetPeers().GetWorkload() != "shop/b" || next.GetNumber() == first.GetNumber() {
		t.Errorf("next %v", next)
	}
	if took := time.Since(began); took > 2*measureEvery || took < measureEvery/2 {
		t.Errorf("it came after %s", took)
	}
	if err := second.Send(&proxypb.ToProxy{Message: &proxypb.ToProxy_MetricsAck{MetricsAck: &proxypb.MetricsAck{Number: next.GetNumber()}}}); err != nil {
		t.Fatal(err)
	}
	// Other endpoints are told of, traffic or not.
	send(t, second, &proxypb.Update{Nonce: 1, Resources: []*proxypb.Resource{proxyResource("1")}})
	receiveOne(t, second) // Ack
	if m := receiveOne(t, second).GetMetrics(); m == nil || m.GetTraffic() != nil {
		t.Errorf("after an update %v", m)
	}
}

// TestADrainingProxySaysSo, once to each agent that comes.
func TestADrainingProxySaysSo(t *testing.T) {
	draining := make(chan struct{})
	s, path, _ := servingUntil(t, draining)
	stream := connect(t, path)
	receiveOne(t, stream) // Subscribe
	close(draining)
	for range 2 {
		if m := receiveOne(t, stream); m.GetDraining() == nil {
			t.Errorf("it says %v", m)
		}
		fill(s.Journal)
		if m := receiveOne(t, stream); m.GetRecordsWaiting() == nil {
			t.Errorf("then it says %v", m)
		}
		read(t, s.Journal)
		stream = connect(t, path)
		receiveOne(t, stream) // Subscribe
	}
}

// TestTheLastWordsAreMetrics: what a proxy's end has still to say is said.
func TestTheLastWordsAreMetrics(t *testing.T) {
	s, path, end := servingUntil(t, nil)
	stream := connect(t, path)
	receiveOne(t, stream) // Subscribe
	s.Meter.End(&telemetry.Record{Direction: listen.Inbound, Protocol: "HTTP/1.1"})
	end()
	counted := 0
	for {
		m, err := stream.Recv()
		if err != nil {
			break
		}
		counted += len(m.GetMetrics().GetTraffic())
	}
	if counted != 1 {
		t.Errorf("%d counted, want 1", counted)
	}
}

// TestTheAgentIsToldOfAJournalThatFillsUp: also when that happened before it came.
func TestTheAgentIsToldOfAJournalThatFillsUp(t *testing.T) {
	s, path := serving(t)
	fill(s.Journal)
	stream := connect(t, path)
	receiveOne(t, stream) // Subscribe
	for range 2 {
		if m := receiveOne(t, stream); m.GetRecordsWaiting() == nil {
			t.Errorf("it says %v", m)
		}
		read(t, s.Journal)
		fill(s.Journal)
	}
}

// fill puts records until more than half of the journal is unread, and not all of it.
func fill(w *journal.Writer) {
	for n := range journal.Capacity / journal.MaxText * 3 / 4 {
		w.Put(&journal.Record{Error: strings.Repeat(string(rune('a'+n%26)), journal.MaxText)})
	}
}

// read is an agent that comes, reads everything, and goes.
func read(t *testing.T, w *journal.Writer) {
	fd, err := unix.FcntlInt(uintptr(w.File()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	r, err := journal.Open(os.NewFile(uintptr(fd), "journal"))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for buf := make([]byte, journal.MinBuffer); r.Waiting() > 0; {
		if _, err := r.Read(buf, func(*journal.Record) {}); err != nil {
			t.Fatal(err)
		}
	}
	w.Put(&journal.Record{}) // it is seen that it is empty
}
