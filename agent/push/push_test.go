package push

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/route"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	service  = netip.MustParseAddrPort("10.96.0.1:80")
	endpoint = netip.MustParseAddrPort("10.244.0.7:8080")
)

// fakeView is a cluster of one Service at a time.
type fakeView struct {
	mu       sync.Mutex
	dest     map[netip.AddrPort]route.Destination
	routes   []model.Governing // part of every destination but those
	governed map[netip.AddrPort][]model.Governing
	inbound  []model.Governing // part of what holds for callers
	limit    uint32            // of theirs; 0: 1
	revision uint64

	policies    []authz.Policy // that govern every pod
	authorizing []model.Governing
	demanded    map[uint16]route.PeerMode // of the callers of every pod
	demanding   []model.Governing
	probes      []route.Probe // of every pod

	computed int // how often Destination was called
}

func (v *fakeView) Revision(netip.AddrPort) uint64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.revision + 1
}

// Inbound implements View: whoever is asked about, port 8080 has a limit.
func (v *fakeView) Inbound(addrs []netip.Addr) (map[uint16]*route.Policy, []model.Governing) {
	if len(addrs) == 0 {
		return nil, nil
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	limit := &route.RateLimit{Requests: max(v.limit, 1), Per: time.Second, PerClient: true}
	return map[uint16]*route.Policy{8080: {Name: "shop/back", RateLimit: limit}}, v.inbound
}

// Authorization implements View: whatever pod is asked about.
func (v *fakeView) Authorization(string, string, string, map[string]string) ([]authz.Policy, []model.Governing) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.policies, v.authorizing
}

// Peers implements View: the same.
func (v *fakeView) Peers(string, string, string, map[string]string) (route.PeerMode, map[uint16]route.PeerMode, []model.Governing) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return route.Permissive, v.demanded, v.demanding
}

// Probes implements View: they come from 10.0.0.1.
func (v *fakeView) Probes(string, string, string) ([]route.Probe, []netip.Addr) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.probes, []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, 1})}
}

func (v *fakeView) Known() map[string]int64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	out := map[string]int64{}
	for _, r := range v.routes {
		out[r.Object] = r.Generation
	}
	return out
}

func (v *fakeView) Destination(addr netip.AddrPort, _ string) (route.Destination, []model.Governing) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.computed++
	if governing, ok := v.governed[addr]; ok {
		return v.dest[addr], governing
	}
	return v.dest[addr], v.routes
}

// govern has a route of a generation be part of every destination.
func (v *fakeView) govern(generation int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.routes = []model.Governing{{Object: "HTTPRoute/shop/back", Parent: "shop/back", Generation: generation}}
	v.revision++
}

func (v *fakeView) set(addr netip.AddrPort, d route.Destination) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.dest[addr] = d
	v.revision++
}

// fakeProxy serves the control API and leaves the talking to the test.
type fakeProxy struct {
	proxypb.UnimplementedControlServer
	streams chan grpc.BidiStreamingServer[proxypb.ToProxy, proxypb.FromProxy]
	end     chan struct{}
}

func (p *fakeProxy) Session(stream grpc.BidiStreamingServer[proxypb.ToProxy, proxypb.FromProxy]) error {
	p.streams <- stream
	select {
	case <-stream.Context().Done():
	case <-p.end:
	}
	return nil
}

// setup is a pusher with one session to a fake proxy.
type setup struct {
	*testing.T
	pusher   *Pusher
	view     *fakeView
	proxy    *fakeProxy
	synced   chan struct{}
	instance *launch.Instance
	log      fakeLog
	metrics  fakeMetrics
	end      func() // of the session
}

// fakeLog has what is said of journals in words.
type fakeLog chan string

func (f fakeLog) Follow(i *launch.Instance) { f <- "follow " + i.Attachment.PodName }
func (f fakeLog) Leave(i *launch.Instance)  { f <- "leave " + i.Attachment.PodName }
func (f fakeLog) Hurry()                    { f <- "hurry" }

// fakeMetrics has what sessions say in words.
type fakeMetrics chan string

func (f fakeMetrics) Report(_ *launch.Instance, m *proxypb.Metrics) {
	f <- fmt.Sprint("report ", m.GetNumber())
}
func (f fakeMetrics) Forget(*launch.Instance) { f <- "forget" }
func (f fakeMetrics) Certificate(_ *launch.Instance, end time.Time) {
	f <- "certificate until " + end.UTC().Format(time.DateOnly)
}
func (f fakeMetrics) Rejected(kind string) { f <- "rejected " + kind }
func (f fakeMetrics) Converged(kind string, took time.Duration) {
	f <- fmt.Sprint("converged ", kind, " ", took > 0 && took < 10*time.Second)
}

// heard is what sessions have said by now.
func (f fakeMetrics) heard() []string {
	var out []string
	for {
		select {
		case x := <-f:
			out = append(out, x)
		default:
			return out
		}
	}
}

func start(t *testing.T) *setup { return startWith(t, nil) }

func startWith(t *testing.T, issuer Issuer) *setup {
	s := &setup{
		T:       t,
		view:    &fakeView{dest: map[netip.AddrPort]route.Destination{}},
		proxy:   &fakeProxy{streams: make(chan grpc.BidiStreamingServer[proxypb.ToProxy, proxypb.FromProxy]), end: make(chan struct{})},
		synced:  make(chan struct{}),
		log:     make(fakeLog, 20),
		metrics: make(fakeMetrics, 20),
	}
	path := filepath.Join(t.TempDir(), "p.sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	proxypb.RegisterControlServer(server, s.proxy)
	go func() { _ = server.Serve(listener) }()
	s.instance = launch.NewInstance(launch.Attachment{
		PodNamespace: "shop", PodName: "front", Addresses: []netip.Addr{netip.MustParseAddr("10.244.0.5")},
		OpaquePorts: []capture.PortRange{{First: 3306, Last: 3306}, {First: 5000, Last: 5999}},
	}, path)
	s.pusher = &Pusher{
		View:   s.view,
		Issuer: issuer,
		WaitSynced: func(ctx context.Context) error {
			select {
			case <-s.synced:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		},
		MeshRanges: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
		AccessLog:  s.log,
		Metrics:    s.metrics,
		Log:        slog.New(slog.DiscardHandler),
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.pusher.Session(ctx, s.instance)
	}()
	s.end = func() {
		cancel()
		<-done
	}
	t.Cleanup(func() {
		s.end()
		server.Stop()
	})
	return s
}

func (s *setup) stream() *peer {
	select {
	case stream := <-s.proxy.streams:
		p := &peer{setup: s, stream: stream, updates: make(chan *proxypb.Update), acks: make(chan uint64, 5), certificates: make(chan *proxypb.Certificate, 5)}
		go p.read()
		return p
	case <-time.After(5 * time.Second):
		s.Fatal("no session")
		return nil
	}
}

// peer is one stream as the fake proxy sees it.
type peer struct {
	*setup
	stream  grpc.BidiStreamingServer[proxypb.ToProxy, proxypb.FromProxy]
	updates chan *proxypb.Update
	acks    chan uint64 // of metrics

	certificates chan *proxypb.Certificate
}

func (p *peer) read() {
	for {
		msg, err := p.stream.Recv()
		if err != nil {
			return
		}
		if ack := msg.GetMetricsAck(); ack != nil {
			p.acks <- ack.GetNumber()
			continue
		}
		if c := msg.GetCertificate(); c != nil {
			p.certificates <- c
			continue
		}
		select {
		case p.updates <- msg.GetUpdate():
		case <-p.stream.Context().Done():
			return
		}
	}
}

func (p *peer) say(msg *proxypb.FromProxy) {
	if err := p.stream.Send(msg); err != nil {
		p.Fatal(err)
	}
}

func (p *peer) subscribe(versions map[string]string) {
	p.say(&proxypb.FromProxy{Message: &proxypb.FromProxy_Subscribe{Subscribe: &proxypb.Subscribe{Versions: versions}}})
}

func (p *peer) ack(u *proxypb.Update) {
	p.say(&proxypb.FromProxy{Message: &proxypb.FromProxy_Ack{Ack: &proxypb.Ack{Nonce: u.GetNonce()}}})
}

func (p *peer) nack(u *proxypb.Update) {
	p.say(&proxypb.FromProxy{Message: &proxypb.FromProxy_Nack{Nack: &proxypb.Nack{Nonce: u.GetNonce(), Error: "no"}}})
}

func (p *peer) update() *proxypb.Update {
	select {
	case u := <-p.updates:
		return u
	case <-time.After(5 * time.Second):
		p.Fatal("no update")
		return nil
	}
}

// silent says that no update comes.
func (p *peer) silent(why string) {
	select {
	case u := <-p.updates:
		p.Fatalf("%s: got %v", why, u)
	case <-time.After(50 * time.Millisecond):
	}
}

func names(u *proxypb.Update) []string {
	var out []string
	for _, r := range u.GetResources() {
		out = append(out, r.GetName())
	}
	return out
}

func TestNothingIsSentBeforeTheViewIsComplete(t *testing.T) {
	s := start(t)
	p := s.stream()
	p.subscribe(map[string]string{proxypb.ProxyResource: ""})
	p.silent("the view is not synced")
	close(s.synced)
	if diff := cmp.Diff([]string{"proxy"}, names(p.update())); diff != "" {
		t.Error(diff)
	}
}

func TestAProxyIsReadyWhenItAcknowledgedItsFirstConfig(t *testing.T) {
	s := start(t)
	s.pusher.ClassicKeyExchange = true // the session waits for synced
	close(s.synced)
	p := s.stream()
	p.subscribe(map[string]string{proxypb.ProxyResource: ""})
	u := p.update()
	select {
	case <-s.instance.Acked():
		t.Fatal("ready before the acknowledgement")
	default:
	}
	config := u.GetResources()[0].GetProxy()
	if diff := cmp.Diff([]*proxypb.PortRange{{First: 3306, Last: 3306}, {First: 5000, Last: 5999}}, config.GetOpaquePorts(), protocmp.Transform()); diff != "" {
		t.Errorf("opaque ports: %s", diff)
	}
	if !config.GetClassicKeyExchange() {
		t.Error("the key exchange is not the option's")
	}
	if p := config.GetInbound()[8080]; p.GetName() != "shop/back" || !p.GetRateLimit().GetPerClient() {
		t.Errorf("what holds for its callers: %v", config.GetInbound())
	}
	if diff := cmp.Diff([]string{"10.244.0.5"}, config.GetOwnAddresses()); diff != "" {
		t.Error(diff)
	}
	p.ack(u)
	select {
	case <-s.instance.Acked():
	case <-time.After(5 * time.Second):
		t.Fatal("not ready after the acknowledgement")
	}
}

func TestADestinationIsSentWhenSubscribedAndAgainOnlyWhenItChanged(t *testing.T) {
	s := start(t)
	close(s.synced)
	p := s.stream()
	name := proxypb.DestinationName(service)
	s.view.set(service, route.Destination{Service: "shop/back"})
	p.subscribe(map[string]string{name: ""})
	u := p.update()
	if got := u.GetResources()[0].GetDestination().GetService(); got != "shop/back" {
		t.Errorf("service %q", got)
	}
	p.ack(u)
	s.pusher.Changed()
	p.silent("nothing changed")

	s.view.set(service, route.Destination{Service: "shop/back", Endpoints: []route.Endpoint{{Addr: endpoint}}})
	s.pusher.Changed()
	u = p.update()
	if got := u.GetResources()[0].GetDestination().GetEndpoints()[0].GetAddress(); got != endpoint.String() {
		t.Errorf("endpoint %q", got)
	}
}

func TestADestinationIsComputedAgainOnlyIfItMayBeAnother(t *testing.T) {
	s := start(t)
	close(s.synced)
	p := s.stream()
	p.subscribe(map[string]string{proxypb.DestinationName(service): ""})
	p.ack(p.update())
	for range 5 {
		s.pusher.Changed() // of something else
		p.silent("nothing changed")
	}
	s.view.mu.Lock()
	defer s.view.mu.Unlock()
	if s.view.computed != 1 {
		t.Errorf("computed %d times", s.view.computed)
	}
}

func TestChangesDuringAnUpdateAreSentTogetherAfterIt(t *testing.T) {
	s := start(t)
	close(s.synced)
	p := s.stream()
	other := netip.MustParseAddrPort("10.96.0.2:80")
	p.subscribe(map[string]string{proxypb.DestinationName(service): "", proxypb.DestinationName(other): ""})
	first := p.update()
	for i := range 5 {
		s.view.set(service, route.Destination{Service: "shop/back", Endpoints: make([]route.Endpoint, i)})
		s.view.set(other, route.Destination{Service: "shop/other"})
		s.pusher.Changed()
	}
	p.silent("an update is on its way")
	p.ack(first)
	if got := len(p.update().GetResources()); got != 2 {
		t.Errorf("%d resources in one update, want 2", got)
	}
}

func TestWhatAProxyRefusedIsNotSentAgainUntilItChanges(t *testing.T) {
	s := start(t)
	close(s.synced)
	p := s.stream()
	p.subscribe(map[string]string{proxypb.DestinationName(service): ""})
	p.nack(p.update())
	s.pusher.Changed()
	p.silent("it was refused")
	s.view.set(service, route.Destination{Service: "shop/back"})
	s.pusher.Changed()
	p.ack(p.update())
}

func TestAResumedProxyIsSentOnlyWhatDiffers(t *testing.T) {
	s := start(t)
	close(s.synced)
	p := s.stream()
	name := proxypb.DestinationName(service)
	p.subscribe(map[string]string{proxypb.ProxyResource: "", name: ""})
	u := p.update()
	held := map[string]string{}
	for _, r := range u.GetResources() {
		held[r.GetName()] = r.GetVersion()
	}
	p.ack(u)
	s.proxy.end <- struct{}{} // the stream breaks; the pusher comes again

	p = s.stream()
	p.subscribe(held)
	p.silent("the proxy holds everything")
	select {
	case <-s.instance.Acked():
	case <-time.After(5 * time.Second):
		t.Fatal("a proxy that holds its config is ready")
	}
}

// TestAProxysJournalIsFollowedFromItsFirstSessionToItsEnd: whatever becomes of streams.
func TestAProxysJournalIsFollowedFromItsFirstSessionToItsEnd(t *testing.T) {
	s := start(t)
	p := s.stream()
	p.say(&proxypb.FromProxy{Message: &proxypb.FromProxy_RecordsWaiting{}})
	s.heard("follow front", "hurry")
	s.proxy.end <- struct{}{} // the stream breaks; the pusher comes again
	p = s.stream()
	p.say(&proxypb.FromProxy{Message: &proxypb.FromProxy_RecordsWaiting{}})
	s.heard("hurry")
	s.end()
	s.heard("leave front")
}

// heard wants to be told this of journals, and nothing else.
func (s *setup) heard(want ...string) {
	s.Helper()
	for _, want := range want {
		select {
		case got := <-s.log:
			if got != want {
				s.Errorf("it was told %q, want %q", got, want)
			}
		case <-time.After(5 * time.Second):
			s.Fatalf("not a word, want %q", want)
		}
	}
	if len(s.log) > 0 {
		s.Errorf("then it was told %q", <-s.log)
	}
}

func TestMetricsAreAcknowledgedOnceTheyAreCounted(t *testing.T) {
	s := start(t)
	close(s.synced)
	p := s.stream()
	for _, number := range []uint64{7, 8} {
		p.say(&proxypb.FromProxy{Message: &proxypb.FromProxy_Metrics{Metrics: &proxypb.Metrics{Number: number}}})
		select {
		case got := <-p.acks:
			if heard := s.metrics.heard(); got != number || !cmp.Equal(heard, []string{fmt.Sprint("report ", number)}) {
				t.Errorf("acknowledged %d, want %d; counted %v", got, number, heard)
			}
		case <-time.After(5 * time.Second):
			t.Fatal("not acknowledged")
		}
	}
}

// TestConvergenceIsFromAChangeToItsAcknowledgement: what is sent because it was asked
// for is no change, and what is refused has not arrived.
func TestConvergenceIsFromAChangeToItsAcknowledgement(t *testing.T) {
	s := start(t)
	close(s.synced)
	p := s.stream()
	p.subscribe(map[string]string{proxypb.ProxyResource: "", proxypb.DestinationName(service): ""})
	p.ack(p.update())
	s.pusher.Changed() // nothing that matters
	p.silent("nothing changed")
	if got := s.metrics.heard(); got != nil {
		t.Errorf("without a change: %v", got)
	}
	s.view.set(service, route.Destination{Service: "shop/back"})
	s.pusher.Changed()
	p.ack(p.update())
	p.silent("it was acknowledged")
	s.view.set(service, route.Destination{Service: "shop/other"})
	s.pusher.Changed()
	p.nack(p.update())
	p.silent("it was refused")
	if diff := cmp.Diff([]string{"converged destination true", "rejected destination"}, s.metrics.heard()); diff != "" {
		t.Error(diff)
	}
}
