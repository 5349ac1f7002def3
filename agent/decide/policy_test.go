package decide

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// aPolicy is about a Service, made at that hour.
func aPolicy(namespace, name, service string, hour int, p route.Policy) model.TrafficPolicy {
	p.Name = namespace + "/" + name
	return model.TrafficPolicy{
		Namespace: namespace, Name: name, Service: service, Created: time.Date(2026, 3, 1, hour, 0, 0, 0, time.UTC), Policy: p,
	}
}

// names are the policies that are in force for shop/back itself and for the backends
// of its one route; "-" is none.
func names(d route.Destination) []string {
	name := func(p *route.Policy) string {
		if p == nil {
			return "-"
		}
		return p.Name
	}
	out := []string{name(d.Policy)}
	if d.Routes != nil {
		for _, b := range d.Routes.Rules[0].Backends {
			out = append(out, name(b.Backend.Policy))
		}
	}
	return out
}

func TestAPolicyIsAboutItsServiceAlone(t *testing.T) {
	m := newMesh(aRoute(route.HTTPRoute, "shop", "canary", backendRefs(ref("shop", "back", 80, 1), ref("shop", "v1", 80, 1), ref("lab", "v2", 80, 1))))
	m.policies = []model.TrafficPolicy{
		aPolicy("shop", "own", "back", 1, route.Policy{}), aPolicy("lab", "other", "back", 1, route.Policy{}), aPolicy("lab", "far", "v2", 1, route.Policy{}),
	}
	if diff := cmp.Diff([]string{"shop/own", "shop/own", "-", "lab/far"}, names(m.dial(t, "yard", 80))); diff != "" {
		t.Errorf("the Service's, and each backend's (-want +got):\n%s", diff)
	}
	m.routes[0] = aRoute(route.HTTPRoute, "shop", "canary")
	if diff := cmp.Diff([]string{"shop/own", "shop/own"}, names(m.dial(t, "yard", 80))); diff != "" {
		t.Errorf("a rule without backends is about the Service itself (-want +got):\n%s", diff)
	}
	m.routes = nil
	for _, port := range []uint16{80, 90, 33} {
		if diff := cmp.Diff([]string{"shop/own"}, names(m.dial(t, "yard", port))); diff != "" {
			t.Errorf("port %d, of all ports (-want +got):\n%s", port, diff)
		}
	}
}

// TestAPodCountsItsCallersWhereAPolicySaysSo: at the ports by which its Services reach
// it, of both families, ready or not; the oldest policy's limit counts, and clients'
// own proxies count nothing.
func TestAPodCountsItsCallersWhereAPolicySaysSo(t *testing.T) {
	each := func(n uint32) route.Policy {
		return route.Policy{RateLimit: &route.RateLimit{Requests: n, Per: time.Second, PerClient: true}}
	}
	m := newMesh()
	m.policies = []model.TrafficPolicy{
		aPolicy("shop", "young", "back", 3, each(3)), aPolicy("shop", "old", "back", 2, each(2)), aPolicy("lab", "oldest", "v2", 1, each(1)),
		aPolicy("shop", "own", "v1", 1, route.Policy{RateLimit: &route.RateLimit{Requests: 9, Per: time.Second}}),
	}
	m.slices["lab/v2"][0].Endpoints[0].Ready = false
	// shop/back's pod is behind lab/v2 as well, at its first port.
	m.slices["lab/v2"][0].Endpoints = append(m.slices["lab/v2"][0].Endpoints, m.slices["shop/back"][0].Endpoints...)
	m.slices["lab/v2"][0].Ports = m.slices["lab/v2"][0].Ports[:1]
	for i := range m.policies {
		m.policies[i].Generation = int64(i)
	}
	limits := func(addrs ...string) (map[uint16]string, []model.Governing) {
		var parsed []netip.Addr
		for _, a := range addrs {
			parsed = append(parsed, netip.MustParseAddr(a))
		}
		out := map[uint16]string{}
		inbound, governing := Inbound(parsed, m.policies, m.about, m.find)
		for port, p := range inbound {
			if out[port] = p.Name; p.RateLimit == nil || !p.RateLimit.PerClient {
				t.Errorf("port %d: %+v", port, p)
			}
		}
		return out, governing
	}
	old, oldest := model.Governing{Object: "TrafficPolicy/shop/old", Generation: 1}, model.Governing{Object: "TrafficPolicy/lab/oldest", Generation: 2}
	for _, tt := range []struct {
		addrs     []string
		want      map[uint16]string
		governing []model.Governing
	}{
		{[]string{"10.0.0.7"}, map[uint16]string{8000: "lab/oldest", 8001: "shop/old", 8002: "shop/old"}, []model.Governing{oldest, old}},
		{[]string{"10.0.0.9"}, map[uint16]string{8000: "lab/oldest"}, []model.Governing{oldest}},
		{[]string{"10.0.0.99", "fd00::7"}, map[uint16]string{8000: "shop/old", 8001: "shop/old", 8002: "shop/old"}, []model.Governing{old}},
		{[]string{"10.0.0.8"}, map[uint16]string{}, nil},
	} {
		got, governing := limits(tt.addrs...)
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%v (-want +got):\n%s", tt.addrs, diff)
		}
		if diff := cmp.Diff(tt.governing, governing); diff != "" {
			t.Errorf("%v are governed by (-want +got):\n%s", tt.addrs, diff)
		}
	}
	// All ports of its pod are another's.
	m.slices["shop/back"] = m.slices["shop/back"][:1]
	m.slices["shop/back"][0].Ports = m.slices["shop/back"][0].Ports[:1]
	if _, governing := limits("10.0.0.7"); !slices.Equal(governing, []model.Governing{oldest}) {
		t.Errorf("a policy that comes too late for all ports governs: %v", governing)
	}
	if p := m.dial(t, "shop", 80).Policy; p == nil || p.Name != "shop/old" || p.RateLimit != nil {
		t.Errorf("clients of shop/back are told %+v", p)
	}
}

func TestMirrorsObeyTheirOwnPolicy(t *testing.T) {
	m := newMesh(aRoute(route.HTTPRoute, "shop", "canary", rule(func(r *model.RouteRule) {
		r.Filters = &model.RouteFilters{Mirrors: []model.RouteMirror{{Target: model.Target{Namespace: "lab", Name: "v2", Port: 80}, Numerator: 1, Denominator: 1}}}
	})))
	m.policies = []model.TrafficPolicy{aPolicy("lab", "far", "v2", 1, route.Policy{})}
	if got := m.dial(t, "shop", 80).Routes.Rules[0].Filters.Mirrors[0].Backend.Policy; got == nil || got.Name != "lab/far" {
		t.Errorf("got %+v", got)
	}
}

func TestOfTwoPoliciesTheOlderIsInForce(t *testing.T) {
	young, old, twin := aPolicy("shop", "a", "back", 2, route.Policy{}), aPolicy("shop", "b", "back", 1, route.Policy{}), aPolicy("shop", "c", "back", 1, route.Policy{})
	m := newMesh()
	for range 2 {
		m.policies = append([]model.TrafficPolicy{young, twin, old}, m.policies...)
		slices.Reverse(m.policies)
		if diff := cmp.Diff([]string{"shop/b"}, names(m.dial(t, "shop", 80))); diff != "" {
			t.Errorf("in whatever order they are found (-want +got):\n%s", diff)
		}
		m.policies = m.policies[:3]
	}
	want := map[string]Condition{
		"a": {Reason: Conflicted, Message: "TrafficPolicy b is about Service shop/back too, and older"},
		"b": {True: true, Reason: Accepted},
		"c": {Reason: Conflicted, Message: "TrafficPolicy b is about Service shop/back too, and older"},
	}
	for _, p := range []model.TrafficPolicy{young, old, twin} {
		if diff := cmp.Diff(want[p.Name], PolicyAccepted(p, m.about, m.find)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", p.Name, diff)
		}
	}
}

func TestWhatBecomesOfAPolicy(t *testing.T) {
	for _, tt := range []struct {
		promise string
		policy  model.TrafficPolicy
		want    Condition
	}{
		{"its Service is there", aPolicy("shop", "a", "back", 1, route.Policy{}), Condition{True: true, Reason: Accepted}},
		{"a headless one, which routes may name", aPolicy("shop", "a", "headless", 1, route.Policy{}), Condition{True: true, Reason: Accepted}},
		{"there is none", aPolicy("shop", "a", "nobody", 1, route.Policy{}), Condition{Reason: TargetNotFound, Message: "there is no Service shop/nobody"}},
		{"only one in another namespace", aPolicy("shop", "a", "v2", 1, route.Policy{}), Condition{Reason: TargetNotFound, Message: "there is no Service shop/v2"}},
		{"one that has no endpoints", aPolicy("shop", "a", "outside", 1, route.Policy{}), Condition{Reason: TargetNotFound, Message: "Service shop/outside is of type ExternalName"}},
	} {
		m := newMesh()
		m.policies = []model.TrafficPolicy{tt.policy}
		if diff := cmp.Diff(tt.want, PolicyAccepted(tt.policy, m.about, m.find)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.promise, diff)
		}
	}
}

func TestTheServicesAffinityIsPartOfItsPolicy(t *testing.T) {
	m := newMesh(aRoute(route.HTTPRoute, "shop", "canary", backendRefs(ref("shop", "back", 80, 1))))
	m.policies = []model.TrafficPolicy{aPolicy("shop", "a", "back", 1, route.Policy{Balance: route.Random, Budget: 30})}
	dial := func(affinity time.Duration) (*route.Policy, *route.Policy) {
		svc := m.services["shop/back"]
		svc.Affinity = affinity
		m.services["shop/back"] = svc
		d := m.dial(t, "shop", 80)
		return d.Policy, d.Routes.Rules[0].Backends[0].Backend.Policy
	}
	own, backend := dial(time.Hour)
	want := &route.Policy{Name: "shop/a", Balance: route.Random, Budget: 30, Affinity: time.Hour}
	if diff := cmp.Diff([]*route.Policy{want, want}, []*route.Policy{own, backend}); diff != "" {
		t.Errorf("beside what the policy says (-want +got):\n%s", diff)
	}
	if own, _ = dial(0); own.Affinity != 0 || m.policies[0].Policy.Affinity != 0 {
		t.Errorf("taken away it is still there: %+v", own)
	}
	m.policies = nil
	own, backend = dial(time.Hour)
	if want := (&route.Policy{Affinity: time.Hour}); !cmp.Equal(want, own) || !cmp.Equal(want, backend) {
		t.Errorf("without a policy: %+v, %+v", own, backend)
	}
	if own, backend = dial(0); own != nil || backend != nil {
		t.Errorf("with neither: %+v, %+v", own, backend)
	}
}

func TestAPolicyCountsForBothFamilies(t *testing.T) {
	m := newMesh()
	svc := m.services["shop/back"]
	svc.ClusterIPs = append(svc.ClusterIPs, netip.MustParseAddr("fd96::7"))
	m.policies = []model.TrafficPolicy{aPolicy("shop", "a", "back", 1, route.Policy{})}
	d := Destination(svc, nil, m.find, m.about, Client{}, netip.MustParseAddrPort("[fd96::7]:80"))
	if diff := cmp.Diff([]string{"shop/a"}, names(d)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
