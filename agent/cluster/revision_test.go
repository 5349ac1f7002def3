package cluster

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/agent/decide"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// few is a small world, in which random changes often meet.
const few = 3

func fewAddress(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, 0, byte(i)}), 80)
}

func fewName(i int) string { return fmt.Sprintf("s%d", i) }

// disturb makes one random change.
func disturb(s *Store, random *rand.Rand) {
	pick := func() int { return random.IntN(few) }
	service, other := fewName(pick()), fewName(pick())
	shop := key{"shop", service}
	target := model.Target{Namespace: "shop", Name: other, Port: 80}
	switch random.IntN(18) {
	case 0, 1:
		s.tables.services.set(model.Service{Namespace: "shop", Name: service, Local: pick() == 0, ClusterIPs: []netip.Addr{fewAddress(pick()).Addr()},
			Ports: []model.ServicePort{{Port: 80, Protocol: model.TCP}}})
	case 2:
		s.tables.services.drop(shop)
	case 3, 4:
		s.tables.slices.set(model.EndpointSlice{Namespace: "shop", Name: service, Service: other, Ports: []model.EndpointPort{{Port: 80, Protocol: model.TCP}},
			Endpoints: []model.Endpoint{{Address: fewAddress(pick()).Addr(), Ready: true, Pod: "shop/" + fewName(pick())}}})
	case 5:
		s.tables.slices.drop(shop)
	case 6, 7:
		rule := model.RouteRule{Backends: []model.BackendRef{{Target: target, Weight: 1}}}
		if pick() == 0 {
			rule = model.RouteRule{Filters: &model.RouteFilters{Mirrors: []model.RouteMirror{{Target: target, Numerator: 1, Denominator: 1}}}}
		}
		s.tables.routes.set(model.Route{Kind: route.HTTPRoute, Namespace: "shop", Name: service, Rules: []model.RouteRule{rule},
			Parents: []model.ParentRef{{Namespace: "shop", Name: fewName(pick())}}})
	case 8:
		s.tables.routes.drop(routeKey{route.HTTPRoute, shop})
	case 9:
		s.tables.policies.set(model.TrafficPolicy{Namespace: "shop", Name: service, Service: other, Policy: route.Policy{Affinity: time.Duration(pick())}})
	case 10:
		s.tables.policies.drop(shop)
	case 11, 12:
		s.setPeer(&model.Peer{Namespace: "shop", Name: service, Workload: other, ServiceAccount: "a", Captured: pick() > 0,
			Addresses: []netip.Addr{fewAddress(pick()).Addr()}})
	case 13:
		s.dropPeer(shop)
	case 14:
		s.setPod(compact(model.Pod{Namespace: "shop", Name: service, Labels: map[string]string{"app": other}}))
	case 15:
		s.dropPod(shop)
	case 16:
		s.tables.peerAuth.set(model.PeerAuthentication{Namespace: "shop", Name: service, Mode: new(route.Disable),
			Selector: model.Selector{{Key: "app", Operator: model.In, Values: []string{other}}}})
	case 17:
		s.tables.peerAuth.drop(shop)
	}
}

// TestADestinationOfTheSameRevisionIsTheSame: whatever changes, one that has become
// another has another revision.
func TestADestinationOfTheSameRevisionIsTheSame(t *testing.T) {
	s, random := NewStore(), rand.New(rand.NewPCG(1, 2))
	s.Reach = decide.NewReach(decide.Defaults())
	type seen struct {
		revision    uint64
		destination route.Destination
	}
	var last [few]seen
	others, kept := 0, 0
	for range 5_000 {
		disturb(s, random)
		for i := range last {
			now := seen{s.Revision(fewAddress(i)), told(s, fewAddress(i))}
			switch diff := cmp.Diff(last[i].destination, now.destination, netipValues); {
			case diff != "" && now.revision == last[i].revision:
				t.Fatalf("revision %d is of two destinations:\n%s", now.revision, diff)
			case diff != "":
				others++
			case now.revision == last[i].revision:
				kept++
			}
			last[i] = now
		}
	}
	t.Logf("%d times a destination was another, %d times its revision said it was not", others, kept)
	if others < 500 || kept < 500 {
		t.Error("the test looks at too little")
	}
}

// TestOtherServicesLeaveARevision: or every proxy would look at all it has after
// every change there is.
func TestOtherServicesLeaveARevision(t *testing.T) {
	s := NewStore()
	set := func(name string, ip int) {
		s.tables.services.set(model.Service{Namespace: "shop", Name: name, ClusterIPs: []netip.Addr{fewAddress(ip).Addr()}})
	}
	set("back", 1)
	set("canary", 2)
	s.tables.routes.set(model.Route{Kind: route.HTTPRoute, Namespace: "shop", Name: "back", Parents: []model.ParentRef{{Namespace: "shop", Name: "back"}},
		Rules: []model.RouteRule{{Backends: []model.BackendRef{{Target: model.Target{Namespace: "shop", Name: "canary"}}}}}})
	before := s.Revision(fewAddress(1))
	set("other", 3)
	s.tables.slices.set(model.EndpointSlice{Namespace: "shop", Name: "other-x", Service: "other"})
	s.tables.slices.set(model.EndpointSlice{Namespace: "shop", Name: "nobody-x", Service: "nobody"})
	s.tables.routes.set(model.Route{Kind: route.HTTPRoute, Namespace: "shop", Name: "other", Parents: []model.ParentRef{{Namespace: "shop", Name: "other"}}})
	s.tables.policies.set(model.TrafficPolicy{Namespace: "shop", Name: "other", Service: "other"})
	s.tables.namespaces.set(model.Namespace{Name: "shop"})
	if s.Revision(fewAddress(1)) != before {
		t.Error("what is about another Service changed it")
	}
	s.tables.slices.set(model.EndpointSlice{Namespace: "shop", Name: "canary-x", Service: "canary"})
	if s.Revision(fewAddress(1)) == before {
		t.Error("a slice of its route's backend did not change it")
	}
}

// TestOnlyPodsAndNamespacesConcernCapture: rules in all pods' namespaces are compared
// when it may be others that are captured, not when an endpoint comes.
func TestOnlyPodsAndNamespacesConcernCapture(t *testing.T) {
	s := NewStore()
	signalled := func() bool {
		select {
		case <-s.PodsChanged():
			return true
		default:
			return false
		}
	}
	for _, change := range []struct {
		name string
		make func()
		want bool
	}{
		{"a Service", func() { s.tables.services.set(model.Service{Namespace: "shop", Name: "back"}) }, false},
		{"a slice", func() { s.tables.slices.set(model.EndpointSlice{Namespace: "shop", Name: "back-x", Service: "back"}) }, false},
		{"a pod", func() { s.setPod(compact(model.Pod{Namespace: "shop", Name: "front"})) }, true},
		{"the same pod", func() { s.setPod(compact(model.Pod{Namespace: "shop", Name: "front"})) }, false},
		{"a namespace", func() { s.tables.namespaces.set(model.Namespace{Name: "shop"}) }, true},
		{"a pod that goes", func() { s.dropPod(key{"shop", "front"}) }, true},
		{"the first full view", s.markSynced, true},
	} {
		change.make()
		if got := signalled(); got != change.want {
			t.Errorf("%s: signalled %v", change.name, got)
		}
	}
}
