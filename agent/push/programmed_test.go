package push

import (
	"encoding/json"
	"net/http/httptest"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/route"
)

// programmed waits until the agent says that of the one route there is.
func (s *setup) programmed(why string, want model.Use) {
	s.Helper()
	want.Object, want.Parent = "HTTPRoute/shop/back", "shop/back"
	var got []model.Use
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		got = s.pusher.Programmed().Uses
		if cmp.Equal(got, []model.Use{want}) {
			return
		}
	}
	s.Errorf("%s: %+v", why, got)
}

// TestARouteIsProgrammedByWhatProxiesAcknowledge: of its own generation, and not by
// what was sent.
func TestARouteIsProgrammedByWhatProxiesAcknowledge(t *testing.T) {
	s := start(t)
	close(s.synced)
	p := s.stream()
	s.view.set(service, route.Destination{Service: "shop/back"})
	s.view.govern(1)
	p.subscribe(map[string]string{proxypb.DestinationName(service): ""})
	first := p.update()
	if got := s.pusher.Programmed(); len(got.Uses) > 0 || got.Known["HTTPRoute/shop/back"] != 1 {
		t.Errorf("a proxy that has nothing yet is counted: %+v", got)
	}
	p.ack(first)
	s.programmed("acknowledged", model.Use{Generation: 1, Proxies: 1, Acknowledged: 1})

	s.view.govern(2)
	s.view.set(service, route.Destination{Service: "shop/back", Protocol: route.HTTP})
	s.pusher.Changed()
	second := p.update()
	s.programmed("sent", model.Use{Generation: 2, Proxies: 1})
	p.nack(second)
	s.programmed("refused", model.Use{Generation: 2, Proxies: 1, Refused: 1})

	s.view.govern(3)
	s.view.set(service, route.Destination{Service: "shop/back", Protocol: route.Opaque})
	s.pusher.Changed()
	third := p.update()
	s.programmed("what was refused is not what is sent now", model.Use{Generation: 3, Proxies: 1})
	p.nack(third)
	s.programmed("refused again", model.Use{Generation: 3, Proxies: 1, Refused: 1})

	s.view.govern(4)
	s.view.set(service, route.Destination{Service: "shop/back"}) // what the proxy has, after all
	s.pusher.Changed()
	p.silent("it has that")
	s.programmed("unchanged by the new generation", model.Use{Generation: 4, Proxies: 1, Acknowledged: 1})
}

func TestARouteOfManyAddressesIsProgrammedOnceAllAre(t *testing.T) {
	s := start(t)
	close(s.synced)
	p := s.stream()
	other := netip.MustParseAddrPort("[fd00::1]:80")
	for _, addr := range []netip.AddrPort{service, other} {
		s.view.set(addr, route.Destination{Service: "shop/back"})
	}
	s.view.govern(1)
	p.subscribe(map[string]string{proxypb.DestinationName(service): "", proxypb.DestinationName(other): ""})
	p.ack(p.update())
	s.programmed("both acknowledged", model.Use{Generation: 1, Proxies: 1, Acknowledged: 1})
	s.view.govern(2)
	s.view.set(other, route.Destination{Service: "shop/back", Protocol: route.HTTP})
	s.pusher.Changed()
	u := p.update()
	s.programmed("one of them is on its way", model.Use{Generation: 2, Proxies: 1})
	p.ack(u)
	s.programmed("both again", model.Use{Generation: 2, Proxies: 1, Acknowledged: 1})
}

// TestEachParentOfARouteHasACountOfItsOwn: and of two ports that one proxy asks for, a
// parent that is both counts it once.
func TestEachParentOfARouteHasACountOfItsOwn(t *testing.T) {
	s := start(t)
	close(s.synced)
	p := s.stream()
	admin := netip.MustParseAddrPort("10.96.0.1:90")
	govern := func(addr netip.AddrPort, generation int64, parents ...string) {
		var governing []model.Governing
		for _, parent := range parents {
			governing = append(governing, model.Governing{Object: "HTTPRoute/shop/back", Parent: parent, Generation: generation})
		}
		s.view.govern(generation)
		s.view.governed[addr] = governing
	}
	s.view.governed = map[netip.AddrPort][]model.Governing{}
	become := func(generation int64, ofAdmin route.Protocol) {
		govern(service, generation, "shop/back", "shop/back:80")
		govern(admin, generation, "shop/back", "shop/back:90")
		s.view.set(service, route.Destination{Service: "shop/back"})
		s.view.set(admin, route.Destination{Service: "shop/back", Protocol: ofAdmin})
	}
	become(1, route.Undeclared)
	p.subscribe(map[string]string{proxypb.DestinationName(service): "", proxypb.DestinationName(admin): ""})
	p.ack(p.update())
	become(2, route.HTTP)
	s.pusher.Changed()
	p.update() // of port 90
	use := func(parent string, acknowledged int) model.Use {
		return model.Use{Object: "HTTPRoute/shop/back", Parent: parent, Generation: 2, Proxies: 1, Acknowledged: acknowledged}
	}
	want := []model.Use{use("shop/back", 0), use("shop/back:80", 1), use("shop/back:90", 0)}
	if diff := cmp.Diff(want, s.pusher.Programmed().Uses); diff != "" {
		t.Errorf("port 90 is on its way (-want +got):\n%s", diff)
	}
}

// TestAPolicyIsProgrammedOnceAProxyHasAllOfIt: as a client's, and for its callers. One
// that ceases to be about a proxy's callers is so until it has acknowledged that.
func TestAPolicyIsProgrammedOnceAProxyHasAllOfIt(t *testing.T) {
	const policy = "TrafficPolicy/shop/careful"
	s := start(t)
	close(s.synced)
	p := s.stream()
	outbound, inbound := proxypb.DestinationName(service), proxypb.ProxyResource
	become := func(generation int64, budget, limit uint32, ofCallers bool) {
		governing := []model.Governing{{Object: policy, Generation: generation}}
		s.view.mu.Lock()
		defer s.view.mu.Unlock()
		s.view.routes, s.view.inbound, s.view.limit = governing, nil, limit
		if ofCallers {
			s.view.inbound = governing
		}
		s.view.dest[service] = route.Destination{Service: "shop/back", Policy: &route.Policy{Name: "shop/careful", Budget: budget}}
		s.view.revision++
	}
	is := func(why string, want model.Use) {
		t.Helper()
		want.Object = policy
		var got []model.Use
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			if got = s.pusher.Programmed().Uses; cmp.Equal(got, []model.Use{want}) {
				return
			}
		}
		t.Errorf("%s: %+v", why, got)
	}
	become(1, 10, 1, true)
	p.subscribe(map[string]string{outbound: "", inbound: ""})
	p.ack(p.update())
	is("both acknowledged: it is one proxy", model.Use{Generation: 1, Proxies: 1, Acknowledged: 1})

	become(2, 10, 2, true)
	s.pusher.Changed()
	u := p.update()
	is("what holds for callers is on its way", model.Use{Generation: 2, Proxies: 1})
	p.ack(u)
	is("acknowledged", model.Use{Generation: 2, Proxies: 1, Acknowledged: 1})

	become(3, 20, 2, true)
	s.pusher.Changed()
	u = p.update()
	is("what is for clients is on its way", model.Use{Generation: 3, Proxies: 1})
	p.nack(u)
	is("refused", model.Use{Generation: 3, Proxies: 1, Refused: 1})

	become(4, 10, 3, false)
	s.pusher.Changed()
	u = p.update()
	is("it is for callers no longer, and the proxy has yet to know", model.Use{Generation: 4, Proxies: 1})
	p.ack(u)
	is("it knows", model.Use{Generation: 4, Proxies: 1, Acknowledged: 1})
}

// TestWhoMayCallIsToldAndProgrammed: a policy that governs the pod, once its proxy has
// acknowledged it.
func TestWhoMayCallIsToldAndProgrammed(t *testing.T) {
	s := start(t)
	s.pusher.TrustDomain = "cluster.local"
	close(s.synced)
	p := s.stream()
	become := func(generation int64, rules ...authz.Rule) {
		s.view.mu.Lock()
		defer s.view.mu.Unlock()
		s.view.authorizing = []model.Governing{{Object: "AuthorizationPolicy/shop/p", Generation: generation}}
		s.view.routes = s.view.authorizing
		s.view.policies = []authz.Policy{{Name: "shop/p", Action: authz.Allow, Rules: rules}}
	}
	is := func(why string, want model.Use) {
		t.Helper()
		want.Object = "AuthorizationPolicy/shop/p"
		var got []model.Use
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			if got = s.pusher.Programmed().Uses; cmp.Equal(got, []model.Use{want}) {
				return
			}
		}
		t.Errorf("%s: %+v", why, got)
	}
	become(1)
	p.subscribe(map[string]string{proxypb.ProxyResource: ""})
	u := p.update()
	told := u.GetResources()[0].GetProxy().GetAuthorization()
	if set, err := told.ToSet(); err != nil || told.GetTrustDomain() != "cluster.local" || set.Evaluate(authz.Identity{}, 80, nil).Allowed {
		t.Errorf("it is told %v, %v", told, err)
	}
	p.ack(u)
	is("acknowledged", model.Use{Generation: 1, Proxies: 1, Acknowledged: 1})
	become(2, authz.Rule{})
	s.pusher.Changed()
	u = p.update()
	is("another is on its way", model.Use{Generation: 2, Proxies: 1})
	p.ack(u)
	is("acknowledged", model.Use{Generation: 2, Proxies: 1, Acknowledged: 1})
}

// TestWhatIsDemandedOfCallersIsToldAndProgrammed is the same of a PeerAuthentication.
func TestWhatIsDemandedOfCallersIsToldAndProgrammed(t *testing.T) {
	s := start(t)
	close(s.synced)
	p := s.stream()
	s.view.mu.Lock()
	s.view.demanded = map[uint16]route.PeerMode{80: route.Strict, 81: route.Disable}
	s.view.demanding = []model.Governing{{Object: "PeerAuthentication/shop/p", Generation: 1}}
	s.view.routes = s.view.demanding
	s.view.probes = []route.Probe{{Port: 80, Target: "/ready"}, {Port: 81, GRPC: true}}
	s.view.mu.Unlock()
	p.subscribe(map[string]string{proxypb.ProxyResource: ""})
	u := p.update()
	mode, byPort, err := u.GetResources()[0].GetProxy().ToPeers()
	if err != nil || mode != route.Permissive || !cmp.Equal(byPort, s.view.demanded) {
		t.Errorf("it is told %d %v, %v", mode, byPort, err)
	}
	probes, err := u.GetResources()[0].GetProxy().ToProbes()
	if err != nil || !cmp.Equal(probes.Declared, s.view.probes) || len(probes.From) != 1 || probes.From[0].String() != "10.0.0.1" {
		t.Errorf("it is told of probes %v, %v", probes, err)
	}
	p.ack(u)
	want := []model.Use{{Object: "PeerAuthentication/shop/p", Generation: 1, Proxies: 1, Acknowledged: 1}}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		got := s.pusher.Programmed().Uses
		if cmp.Equal(got, want) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%+v", got)
		}
	}
}

// TestAProxyThatDoesNotAnswerIsCounted: it serves what it has, and the route is not
// everywhere.
func TestAProxyThatDoesNotAnswerIsCounted(t *testing.T) {
	s := start(t)
	close(s.synced)
	p := s.stream()
	s.view.set(service, route.Destination{Service: "shop/back"})
	s.view.govern(1)
	p.subscribe(map[string]string{proxypb.DestinationName(service): ""})
	p.ack(p.update())
	s.proxy.end <- struct{}{}
	s.stream() // which says nothing
	s.programmed("before it says anything", model.Use{Generation: 1, Proxies: 1, Acknowledged: 1})
	s.view.govern(2)
	s.pusher.Changed()
	s.programmed("a generation it was not told of", model.Use{Generation: 2, Proxies: 1})
	s.end()
	if got := s.pusher.Programmed().Uses; len(got) > 0 {
		t.Errorf("a proxy that has ended is counted: %+v", got)
	}
}

// TestAResumedProxyIsCounted: an agent that starts again knows nothing but what its
// proxies say they have.
func TestAResumedProxyIsCounted(t *testing.T) {
	s := start(t)
	close(s.synced)
	p := s.stream()
	s.view.set(service, route.Destination{Service: "shop/back"})
	s.view.govern(1)
	name := proxypb.DestinationName(service)
	p.subscribe(map[string]string{name: ""})
	u := p.update()
	p.ack(u)
	s.proxy.end <- struct{}{}

	p = s.stream()
	p.say(&proxypb.FromProxy{Message: &proxypb.FromProxy_Subscribe{Subscribe: &proxypb.Subscribe{
		Versions: map[string]string{name: u.GetResources()[0].GetVersion()}, ProxyVersion: "v1",
	}}})
	for deadline := time.Now().Add(5 * time.Second); !cmp.Equal(map[string]int{"v1": 1}, s.pusher.Versions()); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("versions: %v", s.pusher.Versions())
		}
	}
	s.programmed("resumed", model.Use{Generation: 1, Proxies: 1, Acknowledged: 1})
	answer := httptest.NewRecorder()
	s.pusher.ServeProgrammed(answer, httptest.NewRequest("GET", ProgrammedPath, nil))
	var served model.Programmed
	if err := json.Unmarshal(answer.Body.Bytes(), &served); err != nil || !cmp.Equal(served, s.pusher.Programmed()) {
		t.Errorf("served %+v, %v", served, err)
	}
}
