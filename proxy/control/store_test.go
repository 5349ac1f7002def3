package control

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/identity"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/route"
)

var (
	inside  = netip.MustParseAddrPort("10.96.0.1:80")
	outside = netip.MustParseAddrPort("192.0.2.1:443")
	back    = route.Destination{Service: "shop/back", Endpoints: []route.Endpoint{{Addr: netip.MustParseAddrPort("10.0.0.1:8080"), Pod: "shop/back-0"}}}
)

func proxyResource(version string) *proxypb.Resource {
	return &proxypb.Resource{Name: "proxy", Version: version, Body: &proxypb.Resource_Proxy{Proxy: &proxypb.ProxyConfig{
		OwnAddresses: []string{"10.0.0.9", "::ffff:10.0.0.8"}, MeshRanges: []string{"10.96.0.0/16"},
	}}}
}

func destinationResource(addr netip.AddrPort, version string, d route.Destination) *proxypb.Resource {
	return &proxypb.Resource{Name: proxypb.DestinationName(addr), Version: version,
		Body: &proxypb.Resource_Destination{Destination: proxypb.FromDestination(d)}}
}

// configured is a store with a session that has sent the pod's own config.
func configured(t *testing.T) (*Store, uint64) {
	t.Helper()
	s := NewStore(identity.New())
	t.Cleanup(s.Close)
	session, first := s.begin()
	if diff := cmp.Diff(map[string]string{"proxy": "", "identity": ""}, first.GetVersions()); diff != "" {
		t.Fatal(diff)
	}
	if err := s.apply(session, &proxypb.Update{Resources: []*proxypb.Resource{proxyResource("1")}}); err != nil {
		t.Fatal(err)
	}
	return s, session
}

func reasonOf(err error) reason.Reason {
	var e *reason.Error
	if errors.As(err, &e) {
		return e.Reason
	}
	return reason.None
}

// TestPoliciesAreInForceBeforeTheyAreAcknowledged: what goes on has been looked at by
// them; bad ones change nothing.
func TestPoliciesAreInForceBeforeTheyAreAcknowledged(t *testing.T) {
	s, session := configured(t)
	told := 0
	s.Changed = func() { told++ }
	give := func(version string, action proxypb.AuthorizationPolicy_Action) error {
		r := proxyResource(version)
		r.GetProxy().Authorization = &proxypb.Authorization{Policies: []*proxypb.AuthorizationPolicy{{Name: "shop/a", Action: action}}}
		return s.apply(session, &proxypb.Update{Resources: []*proxypb.Resource{r}})
	}
	if s.Authorization() != nil {
		t.Error("there are policies")
	}
	if err := give("2", proxypb.AuthorizationPolicy_ALLOW); err != nil || told != 1 || s.Authorization().Evaluate(authz.Identity{}, 80, nil).Allowed {
		t.Errorf("%v, told %d times", err, told)
	}
	if err := give("3", 7); err == nil || !strings.Contains(err.Error(), "authorization: policy shop/a: action 7") || told != 1 || s.Authorization() == nil {
		t.Errorf("%v, told %d times", err, told)
	}
	if err := s.apply(session, &proxypb.Update{Resources: []*proxypb.Resource{destinationResource(inside, "1", back)}}); err != nil || told != 1 {
		t.Errorf("%v, told %d times", err, told)
	}
	if err := s.apply(session, &proxypb.Update{Resources: []*proxypb.Resource{proxyResource("4")}}); err != nil || told != 2 || s.Authorization() != nil {
		t.Errorf("%v, told %d times", err, told)
	}
}

func TestReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewStore(identity.New())
		began := time.Now()
		if err := s.Ready(t.Context()); reasonOf(err) != reason.ConfigUnavailable || time.Since(began) != 5*time.Second {
			t.Errorf("%v after %s", err, time.Since(began))
		}
		time.AfterFunc(time.Second, func() {
			session, _ := s.begin()
			_ = s.apply(session, &proxypb.Update{Resources: []*proxypb.Resource{proxyResource("1")}})
		})
		began = time.Now()
		if err := s.Ready(t.Context()); err != nil || time.Since(began) != time.Second {
			t.Errorf("%v after %s", err, time.Since(began))
		}
		if !s.Own(netip.MustParseAddr("10.0.0.9")) || !s.Own(netip.MustParseAddr("10.0.0.8")) || s.Own(inside.Addr()) {
			t.Error("own addresses")
		}
	})
}

// TestDestinationWaitsTogether: many ask, one subscription, one answer.
func TestDestinationWaitsTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, session := configured(t)
		var all sync.WaitGroup
		for range 50 {
			all.Go(func() {
				d, err := s.Destination(t.Context(), inside)
				if err != nil || !cmp.Equal(d, back, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })) {
					t.Errorf("%v, %v", d, err)
				}
			})
		}
		synctest.Wait()
		sub, unsub := s.changes(session)
		want := &proxypb.Subscribe{Versions: map[string]string{"dst/10.96.0.1:80": ""}}
		if diff := cmp.Diff(want, sub, protocmp.Transform()); diff != "" || unsub != nil {
			t.Error(diff, unsub)
		}
		time.Sleep(time.Second)
		if err := s.apply(session, &proxypb.Update{Resources: []*proxypb.Resource{destinationResource(inside, "7", back)}}); err != nil {
			t.Error(err)
		}
		all.Wait()
		if sub, unsub := s.changes(session); sub != nil || unsub != nil {
			t.Errorf("asked again: %v, %v", sub, unsub)
		}
		// Held: at once, also without an agent.
		began := time.Now()
		if d, err := s.Destination(t.Context(), inside); err != nil || d.Service != "shop/back" || time.Since(began) != 0 {
			t.Errorf("%v, %v after %s", d, err, time.Since(began))
		}
		_, first := s.begin()
		if diff := cmp.Diff(map[string]string{"proxy": "1", "identity": "", "dst/10.96.0.1:80": "7"}, first.GetVersions()); diff != "" {
			t.Error(diff)
		}
	})
}

// TestDestinationWithoutAgent is decision 14: outside the mesh's ranges it passes
// after 5 s, inside it fails.
func TestDestinationWithoutAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, session := configured(t)
		for _, c := range []struct {
			addr  netip.AddrPort
			waits time.Duration
			want  reason.Reason
		}{
			{outside, 5 * time.Second, reason.None},
			{outside, 0, reason.None}, // somebody has waited before
			{inside, 5 * time.Second, reason.DestinationUnknown},
			{inside, 5 * time.Second, reason.DestinationUnknown},
		} {
			began := time.Now()
			d, err := s.Destination(t.Context(), c.addr)
			if reasonOf(err) != c.want || (err == nil) != (c.want == reason.None) || time.Since(began) != c.waits || d.Service != "" {
				t.Errorf("%s: %v, %v after %s", c.addr, d, err, time.Since(began))
			}
		}
		// The agent is back: it is asked for both, and the next one waits for it.
		session, first := s.begin()
		if len(first.GetVersions()) != 4 {
			t.Errorf("asked for %v", first)
		}
		time.AfterFunc(time.Second, func() {
			_ = s.apply(session, &proxypb.Update{Resources: []*proxypb.Resource{destinationResource(outside, "1", back)}})
		})
		if d, err := s.Destination(t.Context(), outside); err != nil || d.Service != "shop/back" {
			t.Errorf("%v, %v", d, err)
		}

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := s.Destination(ctx, inside); reasonOf(err) != reason.Shutdown {
			t.Errorf("cancelled: %v", err)
		}
	})
}

func TestDestinationIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, session := configured(t)
		put := func(addr netip.AddrPort) {
			go func() { _, _ = s.Destination(t.Context(), addr) }()
			synctest.Wait()
			if err := s.apply(session, &proxypb.Update{Resources: []*proxypb.Resource{destinationResource(addr, "1", back)}}); err != nil {
				t.Error(err)
			}
			synctest.Wait()
		}
		put(inside)
		put(outside)
		s.changes(session)
		time.Sleep(9 * time.Minute)
		if _, err := s.Destination(t.Context(), inside); err != nil { // used again
			t.Error(err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		sub, unsub := s.changes(session)
		want := &proxypb.Unsubscribe{Names: []string{"dst/192.0.2.1:443"}}
		if diff := cmp.Diff(want, unsub, protocmp.Transform()); diff != "" || sub != nil {
			t.Error(diff, sub)
		}
		time.Sleep(9 * time.Minute)
		synctest.Wait()
		if _, unsub := s.changes(session); len(unsub.GetNames()) != 1 || len(s.destinations) != 0 || s.used.Len() != 0 {
			t.Errorf("%v; still held: %v", unsub, s.destinations)
		}
		// Seen once more it is asked for once more.
		put(outside)
		if sub, _ := s.changes(session); sub.GetVersions()["dst/192.0.2.1:443"] != "1" {
			t.Errorf("asked for %v", sub)
		}
	})
}

// TestDestinationBound: a port scan makes the store hold no more than maxHeld, and
// the ones in use stay.
func TestDestinationBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, session := configured(t)
		go func() { _, _ = s.Destination(t.Context(), inside) }()
		synctest.Wait()
		if err := s.apply(session, &proxypb.Update{Resources: []*proxypb.Resource{destinationResource(inside, "1", back)}}); err != nil {
			t.Error(err)
		}
		s.changes(session)
		var scan sync.WaitGroup
		for port := range 3 * maxHeld {
			scan.Go(func() {
				_, _ = s.Destination(t.Context(), netip.AddrPortFrom(outside.Addr(), uint16(port+1)))
			})
			if port%1000 == 0 {
				synctest.Wait()
				if d, err := s.Destination(t.Context(), inside); err != nil || d.Service != "shop/back" {
					t.Fatalf("%v, %v", d, err)
				}
			}
		}
		synctest.Wait()
		if n := len(s.destinations); n != maxHeld || s.used.Len() != n {
			t.Errorf("%d held, want %d", n, maxHeld)
		}
		sub, unsub := s.changes(session)
		if len(sub.GetVersions()) != maxHeld-1 || unsub != nil {
			t.Errorf("%d subscribed, %v not", len(sub.GetVersions()), unsub)
		}
		scan.Wait()
	})
}

// TestApplyWholeOrNothing: one bad resource, and nothing of the update is taken.
func TestApplyWholeOrNothing(t *testing.T) {
	zero := route.Destination{Service: "a/b", Endpoints: []route.Endpoint{{Addr: netip.MustParseAddrPort("10.0.0.1:0")}}}
	orphan := route.Destination{Endpoints: back.Endpoints}
	for i, bad := range []*proxypb.Update{
		{Resources: []*proxypb.Resource{{Name: "proxy", Version: "2", Body: &proxypb.Resource_Proxy{Proxy: &proxypb.ProxyConfig{OwnAddresses: []string{"me"}}}}}},
		{Resources: []*proxypb.Resource{{Name: "proxy", Version: "2", Body: &proxypb.Resource_Proxy{Proxy: &proxypb.ProxyConfig{MeshRanges: []string{"10.0.0.0"}}}}}},
		{Resources: []*proxypb.Resource{opaqueResource(0, 80)}},
		{Resources: []*proxypb.Resource{opaqueResource(81, 80)}},
		{Resources: []*proxypb.Resource{opaqueResource(1, 65536)}},
		{Resources: []*proxypb.Resource{{Name: "pr0xy", Version: "2", Body: proxyResource("").Body}}},
		{Resources: []*proxypb.Resource{proxyResource("")}},
		{Resources: []*proxypb.Resource{{Name: "dst/x", Version: "2", Body: destinationResource(inside, "", back).Body}}},
		{Resources: []*proxypb.Resource{{Name: "dst/1.2.3.4:5", Version: "2"}}},
		{Resources: []*proxypb.Resource{destinationResource(inside, "2", zero)}},
		{Resources: []*proxypb.Resource{destinationResource(inside, "2", orphan)}},
		{Removed: []string{"proxy"}},
		{Removed: []string{"x"}},
	} {
		s, session := configured(t)
		_, cancel := context.WithCancel(t.Context())
		s.mu.Lock()
		s.use(inside)
		s.mu.Unlock()
		good := destinationResource(inside, "1", back)
		bad.Resources = append([]*proxypb.Resource{good}, bad.GetResources()...)
		if err := s.apply(session, bad); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%d: %v", i, err)
		}
		_, first := s.begin()
		if diff := cmp.Diff(map[string]string{"proxy": "1", "identity": "", "dst/10.96.0.1:80": ""}, first.GetVersions()); diff != "" {
			t.Errorf("%d: %s", i, diff)
		}
		cancel()
	}
}

func opaqueResource(first, last uint32) *proxypb.Resource {
	return &proxypb.Resource{Name: "proxy", Version: "2", Body: &proxypb.Resource_Proxy{Proxy: &proxypb.ProxyConfig{
		OpaquePorts: []*proxypb.PortRange{{First: 3306, Last: 3306}, {First: first, Last: last}},
	}}}
}

func TestOpaque(t *testing.T) {
	s := NewStore(identity.New())
	defer s.Close()
	if s.Opaque(3306) {
		t.Error("opaque before there is a config")
	}
	session, _ := s.begin()
	if err := s.apply(session, &proxypb.Update{Resources: []*proxypb.Resource{opaqueResource(5000, 65535)}}); err != nil {
		t.Fatal(err)
	}
	for port, want := range map[uint16]bool{3305: false, 3306: true, 3307: false, 4999: false, 5000: true, 65535: true} {
		if got := s.Opaque(port); got != want {
			t.Errorf("%d: %v", port, got)
		}
	}
}

func TestTheKeyExchangeIsWhatTheAgentSaysNow(t *testing.T) {
	s, session := configured(t)
	for i, want := range []bool{false, true, false} {
		update := &proxypb.Update{Resources: []*proxypb.Resource{{Name: "proxy", Version: strconv.Itoa(i), Body: &proxypb.Resource_Proxy{
			Proxy: &proxypb.ProxyConfig{ClassicKeyExchange: want},
		}}}}
		if err := s.apply(session, update); err != nil || s.ClassicKeyExchange() != want {
			t.Errorf("%d: classic %v, %v", i, s.ClassicKeyExchange(), err)
		}
	}
}

func TestWhatHoldsForCallersIsByPort(t *testing.T) {
	s, session := configured(t)
	if s.Inbound(8080) != nil {
		t.Error("there is a policy that nobody sent")
	}
	limit := &proxypb.Policy{Name: "shop/back", RateLimit: &proxypb.RateLimit{Requests: 1, Per: 1e9, PerClient: true}}
	update := func(port uint32) *proxypb.Update {
		return &proxypb.Update{Resources: []*proxypb.Resource{{Name: "proxy", Version: "2", Body: &proxypb.Resource_Proxy{
			Proxy: &proxypb.ProxyConfig{Inbound: map[uint32]*proxypb.Policy{port: limit}},
		}}}}
	}
	if err := s.apply(session, update(8080)); err != nil {
		t.Fatal(err)
	}
	if p := s.Inbound(8080); p == nil || p.Name != "shop/back" || !p.RateLimit.PerClient || s.Inbound(8081) != nil {
		t.Errorf("%+v, and %+v", p, s.Inbound(8081))
	}
	if err := s.apply(session, update(70000)); err == nil || s.Inbound(8080) == nil {
		t.Errorf("port 70000: %v", err)
	}
}

// TestSuperseded: what an older session says or asks does not count.
func TestSuperseded(t *testing.T) {
	s, old := configured(t)
	_, first := s.begin()
	if first.GetVersions()["proxy"] != "1" {
		t.Errorf("%v", first)
	}
	if err := s.apply(old, &proxypb.Update{Resources: []*proxypb.Resource{proxyResource("2")}}); !errors.Is(err, errSuperseded) {
		t.Errorf("%v", err)
	}
	s.mu.Lock()
	s.use(inside)
	s.mu.Unlock()
	if sub, _ := s.changes(old); sub != nil {
		t.Errorf("the old session is told %v", sub)
	}
	if sub, _ := s.changes(old + 1); len(sub.GetVersions()) != 1 {
		t.Errorf("the new session is told %v", sub)
	}
}

// TestForgottenBeforeTold: the session hears of a destination that it knows, and of
// no other.
func TestForgottenBeforeTold(t *testing.T) {
	s, session := configured(t)
	s.mu.Lock()
	s.forget(s.use(inside))
	s.mu.Unlock()
	if sub, unsub := s.changes(session); sub != nil || unsub != nil {
		t.Errorf("told %v, %v of what came and went", sub, unsub)
	}
	s.mu.Lock()
	s.use(inside)
	s.mu.Unlock()
	s.changes(session)
	s.mu.Lock()
	s.forget(s.use(inside))
	s.forget(s.use(inside))
	s.mu.Unlock()
	if sub, unsub := s.changes(session); sub != nil || len(unsub.GetNames()) != 1 {
		t.Errorf("told %v, %v of what went, came and went", sub, unsub)
	}
}

func TestRemoved(t *testing.T) {
	s, session := configured(t)
	s.mu.Lock()
	s.use(inside)
	s.mu.Unlock()
	if err := s.apply(session, &proxypb.Update{Removed: []string{"dst/10.96.0.1:80"}}); err != nil {
		t.Fatal(err)
	}
	if len(s.destinations) != 0 {
		t.Error("still held")
	}
}

func BenchmarkDestinationHeld(b *testing.B) {
	s := NewStore(identity.New())
	defer s.Close()
	session, _ := s.begin()
	for i := range 20 {
		addr := netip.AddrPortFrom(inside.Addr(), uint16(i+1))
		s.mu.Lock()
		s.use(addr)
		s.mu.Unlock()
		if err := s.apply(session, &proxypb.Update{Resources: []*proxypb.Resource{destinationResource(addr, fmt.Sprint(i), back)}}); err != nil {
			b.Fatal(err)
		}
	}
	addr := netip.AddrPortFrom(inside.Addr(), 7)
	b.ReportAllocs()
	for b.Loop() {
		_, _ = s.Destination(context.Background(), addr)
	}
}

func TestWhatAPortDemandsOfItsCallers(t *testing.T) {
	s := NewStore(identity.New())
	defer s.Close()
	if s.Peers(8080) != route.Strict {
		t.Error("nobody has said that plain connections are taken")
	}
	session, _ := s.begin()
	demanding := func(most, of8080 proxypb.PeerMode) *proxypb.Update {
		return &proxypb.Update{Resources: []*proxypb.Resource{{Name: "proxy", Version: "2", Body: &proxypb.Resource_Proxy{
			Proxy: &proxypb.ProxyConfig{Peers: most, PeersByPort: map[uint32]proxypb.PeerMode{8080: of8080}},
		}}}}
	}
	if err := s.apply(session, demanding(proxypb.PeerMode_STRICT, proxypb.PeerMode_DISABLE)); err != nil {
		t.Fatal(err)
	}
	if s.Peers(8080) != route.Disable || s.Peers(8081) != route.Strict {
		t.Errorf("8080 %d, 8081 %d", s.Peers(8080), s.Peers(8081))
	}
	for _, unknown := range []*proxypb.Update{demanding(3, 0), demanding(0, -1)} {
		if err := s.apply(session, unknown); err == nil || s.Peers(8081) != route.Strict {
			t.Errorf("a mode that is none: %v", err)
		}
	}
}

func TestTheKubeletsProbesAreKnown(t *testing.T) {
	s, session := configured(t)
	node := netip.MustParseAddr("10.0.0.1")
	probing := func(p *proxypb.Probe, from string) *proxypb.Update {
		return &proxypb.Update{Resources: []*proxypb.Resource{{Name: "proxy", Version: "2", Body: &proxypb.Resource_Proxy{
			Proxy: &proxypb.ProxyConfig{Probes: []*proxypb.Probe{p}, NodeAddresses: []string{from}},
		}}}}
	}
	if s.Probes().Of(node, 8080) {
		t.Error("probes that nobody declared")
	}
	if err := s.apply(session, probing(&proxypb.Probe{Port: 8080, Target: "/healthz"}, node.String())); err != nil {
		t.Fatal(err)
	}
	if p := s.Probes(); !p.Of(node, 8080) || p.Of(node, 8081) || p.Of(node.Next(), 8080) {
		t.Errorf("%+v", p)
	}
	for want, u := range map[string]*proxypb.Update{
		"a probe of port 0":     probing(&proxypb.Probe{Target: "/healthz"}, node.String()),
		"70000 is more than":    probing(&proxypb.Probe{Port: 70000, Target: "/healthz"}, node.String()),
		`of "healthz"`:          probing(&proxypb.Probe{Port: 8080, Target: "healthz"}, node.String()),
		"node address: ParseAd": probing(&proxypb.Probe{Port: 8080, Grpc: true}, "n1"),
	} {
		if err := s.apply(session, u); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}
