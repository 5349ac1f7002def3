package telemetry

import (
	"fmt"
	"math"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/route"
)

func nothing() []route.Destination { return nil }

// requests is how many a message counts.
func requests(m *proxypb.Metrics) int {
	n := uint64(0)
	for _, x := range m.GetTraffic() {
		for _, c := range x.GetDuration().GetClassic() {
			n += c
		}
	}
	return int(n)
}

// TestADeltaIsSentUntilItIsAcknowledged: sessions may break at any time, and each
// request is in one message.
func TestADeltaIsSentUntilItIsAcknowledged(t *testing.T) {
	m := NewMeter(nothing)
	m.End(full())
	first := m.Take()
	m.End(full())
	m.End(full())
	if requests(first) != 1 || m.Take() != nil {
		t.Fatal("nothing else is sent until it is acknowledged")
	}
	if again := m.Resume(); again != first {
		t.Errorf("a new session is sent %v", again)
	}
	m.Acknowledged(first.GetNumber() + 7) // of nobody's
	if m.Take() != nil {
		t.Error("that was not its number")
	}
	m.Acknowledged(first.GetNumber())
	second := m.Take()
	if requests(second) != 2 || second.GetNumber() == first.GetNumber() {
		t.Errorf("then %v", second)
	}
	m.Acknowledged(second.GetNumber())
	if third := m.Take(); requests(third) != 0 {
		t.Errorf("and then %v", third)
	}
}

func TestThereIsSomethingToSayWhenSomethingChanged(t *testing.T) {
	m := NewMeter(nothing)
	ready := func() bool {
		select {
		case <-m.Ready():
			return true
		default:
			return false
		}
	}
	if ready() || m.Resume() != nil || m.Take() != nil || m.Last() != nil {
		t.Error("nothing has happened")
	}
	m.End(full())
	if !ready() {
		t.Error("a request has ended")
	}
	message := m.Take()
	m.End(full())
	if ready() {
		t.Error("a message is unacknowledged")
	}
	m.Acknowledged(message.GetNumber())
	if !ready() {
		t.Error("another request has ended")
	}
	if last := m.Last(); requests(last) != 1 {
		t.Errorf("at the end: %v", last)
	}
	m.End(full())
	if last := m.Last(); requests(last) != 1 {
		t.Errorf("at the end nothing waits: %v", last)
	}
}

func TestWhatIsCountedOfARequest(t *testing.T) {
	m := NewMeter(nothing)
	r := full()
	r.Attempts, r.RequestBody, r.GRPCStatus, r.Reason = 3, 7, "5", reason.UpstreamClosed
	m.End(r)
	message := m.Take()
	if len(message.GetTraffic()) != 1 {
		t.Fatalf("%v", message)
	}
	x := message.GetTraffic()[0]
	if x.GetRetries() != 2 || x.GetSentBytes() != 7 || x.GetReceivedBytes() != 1800 || x.GetStatus() != 200 || x.GetGrpcStatus() != "5" ||
		x.GetReason() != "upstream_closed" || x.GetProtocol() != "HTTP/1.1" || x.GetRoute() != "HTTPRoute/shop/back" || x.GetOpened()+x.GetClosed() != 0 ||
		x.GetPeers().GetService() != "shop/back" || x.GetPeers().GetWorkload() != "shop/back" || x.GetPeers().GetClient() != "" {
		t.Errorf("%v", x)
	}
	if h := message.GetOutboundOverhead(); h.GetSum() != r.Overhead.Seconds() || message.GetInboundOverhead() != nil {
		t.Errorf("overhead %v", message)
	}
}

func TestAStatusThatIsNoneIsUnknown(t *testing.T) {
	m := NewMeter(nothing)
	for _, status := range []string{"17", "-1", "05", "x", "2", "16"} {
		r := full()
		r.GRPCStatus = status
		m.End(r)
	}
	got := map[string]int{}
	for _, x := range m.Last().GetTraffic() {
		got[x.GetGrpcStatus()] += requests(&proxypb.Metrics{Traffic: []*proxypb.Traffic{x}})
	}
	if len(got) != 2 || got["2"] != 5 || got["16"] != 1 {
		t.Errorf("%v", got)
	}
}

func TestWhatIsCountedOfAConnection(t *testing.T) {
	m := NewMeter(nothing)
	r := &Record{Direction: listen.Inbound, Client: netip.MustParseAddrPort("[::ffff:10.0.0.9]:1"), Sent: 3, Received: 4}
	m.Begin(r)
	m.Begin(r) // the same
	message := m.Take()
	if len(message.GetTraffic()) != 1 || message.GetTraffic()[0].GetOpened() != 1 || len(message.GetOpen()) != 1 || message.GetOpen()[0].GetConnections() != 1 {
		t.Errorf("while it is open: %v", message)
	}
	r.Reason = reason.ClientGone
	m.End(r)
	m.Acknowledged(message.GetNumber())
	message = m.Take()
	if len(message.GetTraffic()) != 1 || len(message.GetOpen()) != 0 {
		t.Fatalf("at its end: %v", message)
	}
	x := message.GetTraffic()[0]
	if x.GetOpened() != 0 || x.GetClosed() != 1 || x.GetSentBytes() != 3 || x.GetReceivedBytes() != 4 || x.GetReason() != "client_gone" ||
		x.GetPeers().GetClient() != "10.0.0.9" || x.GetDuration() != nil || message.GetInboundOverhead() != nil {
		t.Errorf("at its end: %v", x)
	}
	refused := &Record{Direction: listen.Outbound, Service: "shop/back", Reason: reason.ConnectRefused}
	m.End(refused) // it never began
	opened, closed := uint64(0), uint64(0)
	for _, x := range m.Last().GetTraffic() {
		opened, closed = opened+x.GetOpened(), closed+x.GetClosed()
	}
	if opened != 1 || closed != 1 {
		t.Errorf("a refused one: %d opened, %d closed", opened, closed)
	}
}

func TestARequestThatGoesToAnotherEndpointGoesOnThere(t *testing.T) {
	m := NewMeter(nothing)
	r := full()
	m.Begin(r)
	r.Workload = "shop/back-v2"
	m.Begin(r)
	open := m.Take().GetOpen()
	if len(open) != 1 || open[0].GetRequests() != 1 || open[0].GetPeers().GetWorkload() != "shop/back-v2" {
		t.Errorf("%v", open)
	}
	in := r.Inbound(authz.Identity{})
	m.End(r)
	m.End(in) // the other side of a call to its own pod, which was never begun
	if open := m.Last().GetOpen(); open != nil {
		t.Errorf("in the end %v", open)
	}
}

// TestLabelsAreBounded: first callers are not told apart, then nothing is.
func TestLabelsAreBounded(t *testing.T) {
	m := NewMeter(nothing)
	const n = 2000
	var begun []*Record
	for i := range n {
		in := &Record{Direction: listen.Inbound, Protocol: "HTTP/1.1", Status: 200, Client: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), 1)}
		out := &Record{Direction: listen.Outbound, Protocol: "HTTP/1.1", Status: 200, Service: fmt.Sprintf("shop/s%d", i)}
		for _, r := range []*Record{in, out} {
			m.Begin(r)
			begun = append(begun, r)
			ended := *r
			ended.open = nil
			m.End(&ended)
		}
	}
	message := m.Take()
	if got := requests(message); got != 2*n {
		t.Errorf("%d requests, want %d", got, 2*n)
	}
	if got := len(message.GetTraffic()); got > allSets+4 {
		t.Errorf("%d sets of labels", got)
	}
	if got := len(message.GetOpen()); got > allSets+4 {
		t.Errorf("%d sets of labels of what is open", got)
	}
	anonymous, other := uint64(0), uint64(0)
	for _, x := range message.GetOpen() {
		switch p := x.GetPeers(); {
		case p.GetOther():
			other += x.GetRequests()
		case p.GetDirection() == proxypb.Direction_INBOUND && p.GetClient() == "":
			anonymous += x.GetRequests()
		}
	}
	if anonymous < n/2 || other < n/2 {
		t.Errorf("of callers %d are not told apart, of destinations %d", anonymous, other)
	}
	counted := 0
	for _, x := range message.GetTraffic() {
		if p := x.GetPeers(); p.GetDirection() == proxypb.Direction_INBOUND && p.GetClient() == "" && !p.GetOther() {
			counted += requests(&proxypb.Metrics{Traffic: []*proxypb.Traffic{x}})
		}
	}
	if counted < n/2 {
		t.Errorf("%d requests of callers that are not told apart", counted)
	}
	for _, r := range begun {
		m.End(r)
	}
	if open := m.Last().GetOpen(); open != nil {
		t.Errorf("in the end %d are open", len(open))
	}
}

// TestADecisionIsCountedOnce, as soon as what it is about goes to the application, and
// only where that is.
func TestADecisionIsCountedOnce(t *testing.T) {
	m := NewMeter(nothing)
	counted := func() map[string]uint64 {
		out := map[string]uint64{}
		message := m.Take()
		for _, d := range message.GetDecisions() {
			out[fmt.Sprint(d.GetPeers().GetClient(), " ", d.GetPolicy(), " ", d.GetVerdict())] += d.GetCount()
		}
		m.Acknowledged(message.GetNumber())
		return out
	}
	r := &Record{Direction: listen.Inbound, Client: netip.MustParseAddrPort("10.0.0.9:40000")}
	r.Decide(authz.Decision{Allowed: true, Policy: "shop/a", Audited: []string{"shop/b", "shop/c"}})
	m.Begin(r)
	m.Begin(r)
	want := map[string]uint64{"10.0.0.9 shop/a ALLOW": 1, "10.0.0.9 shop/b AUDIT_DENY": 1, "10.0.0.9 shop/c AUDIT_DENY": 1}
	if diff := cmp.Diff(want, counted()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	r.Decide(authz.Decision{Policy: authz.NoPolicy})
	m.End(r)
	if diff := cmp.Diff(map[string]uint64{"10.0.0.9 no policy allowed it DENY": 1}, counted()); diff != "" {
		t.Errorf("of one that is not allowed any more, -want +got:\n%s", diff)
	}
	m.End(&Record{Direction: listen.Inbound, Client: r.Client})
	handedOver := &Record{Direction: listen.Outbound, Client: r.Client}
	handedOver.Decide(authz.Decision{Policy: "shop/a"})
	m.End(handedOver)
	if got := counted(); len(got) != 0 {
		t.Errorf("without policies, or at the caller: %v", got)
	}
	m.End(handedOver.Inbound(authz.Identity{}))
	if got := counted(); got["10.0.0.9 shop/a DENY"] != 1 {
		t.Errorf("%v", got)
	}
}

// TestFailedAttemptsAreCountedByReason, of so many peers that they are bounded.
func TestFailedAttemptsAreCountedByReason(t *testing.T) {
	m := NewMeter(nothing)
	r := full()
	for range 2 {
		m.Failed(r, reason.CertExpired)
	}
	m.Failed(r, reason.ConnectRefused)
	for n := range allSets + 10 {
		r.Workload = "shop/w" + strconv.Itoa(n)
		m.Failed(r, reason.ConnectRefused)
	}
	select {
	case <-m.Ready():
	default:
		t.Error("there is something to say")
	}
	got, other, sets := map[string]uint64{}, uint64(0), 0
	for _, x := range m.Take().GetFailures() {
		sets++
		got[x.GetReason()] += x.GetCount()
		if x.GetPeers().GetOther() {
			other += x.GetCount()
		}
	}
	if got["cert_expired"] != 2 || got["connect_refused"] != allSets+11 || len(got) != 2 || other != 12 || sets != allSets+1 {
		t.Errorf("%v in %d sets, %d of others", got, sets, other)
	}
	m.Acknowledged(m.number)
	m.Failed(r, reason.CertExpired)
	if next := m.Take().GetFailures(); len(next) != 1 || next[0].GetCount() != 1 {
		t.Errorf("then %v", next)
	}
}

func TestEndpointsAreReadyOrEjected(t *testing.T) {
	addr := func(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }
	backend := route.Backend{Service: "shop/back", Endpoints: []route.Endpoint{
		{Addr: addr("10.0.0.1:80"), Workload: "shop/a"}, {Addr: addr("10.0.0.2:80"), Workload: "shop/a"}, {Addr: addr("10.0.0.3:80"), Workload: "shop/b"},
	}}
	d := route.Destination{Service: "shop/back", Endpoints: backend.Endpoints, Routes: &route.Routes{Rules: []route.Rule{{
		Backends: []route.WeightedBackend{{Backend: backend}, {Backend: route.Backend{Service: "shop/other", Endpoints: backend.Endpoints[:1]}}},
	}}}}
	m := NewMeter(func() []route.Destination { return []route.Destination{d, {}, d} })
	m.Ejected(&backend, addr("10.0.0.2:80"), 50*time.Millisecond)
	m.Ejected(&backend, addr("10.0.0.2:80"), 50*time.Millisecond)
	say := func(message *proxypb.Metrics) map[string]string {
		out := map[string]string{}
		for _, e := range message.GetEndpoints() {
			out[e.GetPeers().GetService()+" "+e.GetPeers().GetWorkload()] = fmt.Sprint(e.GetReady(), " ready, ", e.GetEjected(), " ejected")
		}
		return out
	}
	message := m.Take()
	got := say(message)
	if len(got) != 3 || got["shop/back shop/a"] != "1 ready, 1 ejected" || got["shop/back shop/b"] != "1 ready, 0 ejected" || got["shop/other shop/a"] != "1 ready, 0 ejected" {
		t.Errorf("%v", got)
	}
	if e := message.GetEjections(); len(e) != 1 || e[0].GetCount() != 2 || e[0].GetPeers().GetWorkload() != "shop/a" {
		t.Errorf("%v", e)
	}
	m.Acknowledged(message.GetNumber())
	time.Sleep(60 * time.Millisecond)
	message = m.Take() // without anything else happening
	if got := say(message); got["shop/back shop/a"] != "2 ready, 0 ejected" || message.GetEjections() != nil {
		t.Errorf("after its time: %v", message)
	}
}

// TestBucketsHaveTheirValues: in both grains, and so have their bounds.
func TestBucketsHaveTheirValues(t *testing.T) {
	for _, d := range []time.Duration{1, time.Microsecond, 499 * time.Microsecond, 500 * time.Microsecond, 501 * time.Microsecond, time.Second, 2 * time.Second, 2*time.Second + 1, time.Minute, time.Hour} {
		var h histogram
		h.observe(d)
		m := h.message()
		v := d.Seconds()
		for i, n := range m.GetClassic() {
			lower, upper := math.Inf(-1), math.Inf(1)
			if i > 0 {
				lower = proxypb.Buckets[i-1]
			}
			if i < len(proxypb.Buckets) {
				upper = proxypb.Buckets[i]
			}
			if in := lower < v && v <= upper; in != (n == 1) {
				t.Errorf("%s: %d in (%v, %v]", d, n, lower, upper)
			}
		}
		i := float64(m.GetNativeIndexes()[0])
		if lower, upper := math.Exp2((i-1)/8), math.Exp2(i/8); v <= lower || v > upper {
			t.Errorf("%s in (%v, %v]", d, lower, upper)
		}
	}
	var h histogram
	for _, d := range []time.Duration{0, 3 * time.Second, time.Millisecond, 3 * time.Second} {
		h.observe(d)
	}
	m := h.message()
	if m.GetZero() != 1 || len(m.GetNativeCounts()) != 2 || m.GetNativeCounts()[1] != 2 || m.GetNativeIndexes()[0] > m.GetNativeIndexes()[1] {
		t.Errorf("%v", m)
	}
}

// TestACallersNamespaceIsThatOfItsIdentity, and what two proxies speak is told apart.
func TestACallersNamespaceIsThatOfItsIdentity(t *testing.T) {
	m := NewMeter(nothing)
	shown := &Record{
		Direction: listen.Inbound, Protocol: "HTTP/2", Status: 200, Peer: "spiffe://cluster.test/ns/shop/sa/front", PeerNamespace: "shop", Secure: true,
		Authorization: authz.Decision{Allowed: true, Policy: "shop/p"}, decided: uncounted,
	}
	m.Begin(shown)
	m.End(shown)
	m.End(&Record{Direction: listen.Inbound, Protocol: "HTTP/2", Status: 200})
	m.End(&Record{Direction: listen.Outbound, Protocol: "HTTP/2", Status: 200, Service: "shop/back", Secure: true})
	message := m.Take()
	got := map[string]int{}
	for _, x := range message.GetTraffic() {
		got[fmt.Sprintf("%v %s %v", x.GetPeers().GetDirection(), x.GetPeers().GetNamespace(), x.GetMutualTls())] += requests(&proxypb.Metrics{Traffic: []*proxypb.Traffic{x}})
	}
	if diff := cmp.Diff(map[string]int{"INBOUND shop true": 1, "INBOUND  false": 1, "OUTBOUND  true": 1}, got); diff != "" {
		t.Error(diff)
	}
	if d := message.GetDecisions(); len(d) != 1 || d[0].GetPeers().GetNamespace() != "shop" {
		t.Errorf("decisions %v", d)
	}
}
