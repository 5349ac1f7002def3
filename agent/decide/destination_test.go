package decide

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

var addrPorts = cmpopts.EquateComparable(netip.AddrPort{})

// noPolicies is a Policies.
func noPolicies(string, string) []model.TrafficPolicy { return nil }

func TestWhatADestinationIs(t *testing.T) {
	addr, addrPort := netip.MustParseAddr, netip.MustParseAddrPort
	back := model.Service{
		Namespace: "shop", Name: "back",
		ClusterIPs: []netip.Addr{addr("10.96.0.7"), addr("fd96::7")},
		Ports: []model.ServicePort{
			{Name: "dns", Port: 80, Protocol: model.UDP},
			{Name: "http", Port: 80, Protocol: model.TCP},
			{Name: "admin", Port: 9000, Protocol: model.TCP},
		},
	}
	slice := func(target uint16, endpoints ...model.Endpoint) model.EndpointSlice {
		return model.EndpointSlice{
			Namespace: "shop", Service: "back",
			Ports:     []model.EndpointPort{{Name: "dns", Port: 53, Protocol: model.UDP}, {Name: "http", Port: target, Protocol: model.TCP}},
			Endpoints: endpoints,
		}
	}
	ready := func(ip, pod string) model.Endpoint {
		return model.Endpoint{Address: addr(ip), Ready: true, Pod: "shop/" + pod}
	}
	draining := func(ip, pod string) model.Endpoint {
		return model.Endpoint{Address: addr(ip), Draining: true, Pod: "shop/" + pod}
	}
	unready := func(ip, pod string) model.Endpoint {
		return model.Endpoint{Address: addr(ip), Pod: "shop/" + pod}
	}
	to := func(endpoints ...route.Endpoint) route.Destination {
		return route.Destination{Service: "shop/back", Endpoints: endpoints, Protocol: route.HTTP}
	}
	at := func(ap, pod string) route.Endpoint {
		return route.Endpoint{Addr: addrPort(ap), Pod: "shop/" + pod}
	}
	other := slice(8080, ready("10.0.0.9", "x"))
	other.Service = "other"

	tests := []struct {
		promise string
		slices  []model.EndpointSlice
		dial    string
		want    route.Destination
	}{
		{"a Service's TCP port is its ready endpoints, at the target port",
			[]model.EndpointSlice{slice(8080, ready("10.0.0.2", "b2"), ready("10.0.0.1", "b1"), unready("10.0.0.3", "b3"))}, "10.96.0.7:80",
			to(at("10.0.0.1:8080", "b1"), at("10.0.0.2:8080", "b2"))},
		{"endpoints are of the family that was dialled",
			[]model.EndpointSlice{slice(8080, ready("10.0.0.1", "b1")), slice(8080, ready("fd00::1", "b1"))}, "[fd96::7]:80",
			to(at("[fd00::1]:8080", "b1"))},
		{"IPv4 seen through an IPv6 socket is IPv4",
			[]model.EndpointSlice{slice(8080, ready("10.0.0.1", "b1")), slice(8080, ready("fd00::1", "b1"))}, "[::ffff:10.96.0.7]:80",
			to(at("10.0.0.1:8080", "b1"))},
		{"a named target port may differ from slice to slice",
			[]model.EndpointSlice{slice(8080, ready("10.0.0.1", "b1")), slice(8081, ready("10.0.0.2", "b2"))}, "10.96.0.7:80",
			to(at("10.0.0.1:8080", "b1"), at("10.0.0.2:8081", "b2"))},
		{"an endpoint that moves between slices counts once, and is ready if either says so",
			[]model.EndpointSlice{slice(8080, ready("10.0.0.1", "b1")), slice(8080, unready("10.0.0.1", "b1")), slice(8080, ready("10.0.0.1", "b1"))}, "10.96.0.7:80",
			to(at("10.0.0.1:8080", "b1"))},
		{"draining endpoints get nothing while one is ready",
			[]model.EndpointSlice{slice(8080, ready("10.0.0.1", "b1"), draining("10.0.0.2", "b2"))}, "10.96.0.7:80",
			to(at("10.0.0.1:8080", "b1"))},
		{"draining endpoints are used when none is ready",
			[]model.EndpointSlice{slice(8080, unready("10.0.0.1", "b1"), draining("10.0.0.2", "b2"))}, "10.96.0.7:80",
			to(at("10.0.0.2:8080", "b2"))},
		{"a Service without endpoints is still a Service", nil, "10.96.0.7:80", to()},
		{"a port that no slice serves has no endpoints",
			[]model.EndpointSlice{slice(8080, ready("10.0.0.1", "b1"))}, "10.96.0.7:9000", route.Destination{Service: "shop/back"}},
		{"another Service's slice does not count", []model.EndpointSlice{other}, "10.96.0.7:80", to()},
		{"a port the Service does not have is not the Service", nil, "10.96.0.7:81", route.Destination{}},
		{"another address is not the Service", nil, "10.0.0.1:80", route.Destination{}},
	}
	for _, test := range tests {
		t.Run(test.promise, func(t *testing.T) {
			find := func(string, string) (model.Service, []model.EndpointSlice, bool) { return back, test.slices, true }
			got := Destination(back, nil, find, noPolicies, Client{}, addrPort(test.dial))
			if diff := cmp.Diff(test.want, got, addrPorts, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestWhichEndpointsAreNear(t *testing.T) {
	zones := func(z ...string) *model.Hints { return &model.Hints{Zones: z} }
	both := func(zone, node string) *model.Hints {
		return &model.Hints{Zones: []string{zone}, Nodes: []string{node}}
	}
	tests := []struct {
		promise string
		hints   []*model.Hints // of endpoints 1, 2, …, on nodes n1, n2, …
		unready int            // an endpoint that is not ready; 0: all are
		local   bool
		client  Client
		want    []byte
	}{
		{"without hints all are used", []*model.Hints{nil, nil}, 0, false, Client{Node: "n1", Zone: "a"}, []byte{1, 2}},
		{"those hinted for the client's zone", []*model.Hints{zones("a"), zones("b"), zones("b", "a")}, 0, false, Client{Node: "n1", Zone: "a"}, []byte{1, 3}},
		{"all, if one has no hint", []*model.Hints{zones("a"), nil}, 0, false, Client{Zone: "a"}, []byte{1, 2}},
		{"those, if the one without hints is not ready", []*model.Hints{zones("a"), zones("b"), nil}, 3, false, Client{Zone: "a"}, []byte{1}},
		{"all, if none is for the zone", []*model.Hints{zones("a"), zones("b")}, 0, false, Client{Zone: "c"}, []byte{1, 2}},
		{"all, if the one for the zone is not ready", []*model.Hints{zones("a"), zones("b")}, 1, false, Client{Zone: "a"}, []byte{2}},
		{"all, for a client whose zone is not known", []*model.Hints{zones("a"), zones("b")}, 0, false, Client{}, []byte{1, 2}},
		{"those hinted for the client's node, before its zone", []*model.Hints{both("a", "n1"), both("a", "n2")}, 0, false, Client{Node: "n2", Zone: "a"}, []byte{2}},
		{"those for the zone, if none is for the node", []*model.Hints{both("a", "n1"), both("b", "n2")}, 0, false, Client{Node: "n3", Zone: "b"}, []byte{2}},
		{"those for the zone, if one has no hint of a node", []*model.Hints{zones("a"), both("b", "n2")}, 0, false, Client{Node: "n2", Zone: "a"}, []byte{1}},
		{"internalTrafficPolicy Local: those on the client's node, whatever the hints", []*model.Hints{both("a", "n2"), both("a", "n2")}, 0, true, Client{Node: "n1", Zone: "a"}, []byte{1}},
		{"internalTrafficPolicy Local: none, if none is there", []*model.Hints{nil, nil}, 0, true, Client{Node: "n3"}, nil},
		{"internalTrafficPolicy Local where there is one node: all", []*model.Hints{nil, nil}, 0, true, Client{}, []byte{1, 2}},
	}
	for _, tt := range tests {
		t.Run(tt.promise, func(t *testing.T) {
			svc := model.Service{Namespace: "shop", Name: "back", Local: tt.local, ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.7")}, Ports: []model.ServicePort{{Port: 80, Protocol: model.TCP}}}
			slice := model.EndpointSlice{Namespace: "shop", Service: "back", Ports: []model.EndpointPort{{Port: 8080, Protocol: model.TCP}}}
			for i, h := range tt.hints {
				n := i + 1
				slice.Endpoints = append(slice.Endpoints, model.Endpoint{
					Address: netip.AddrFrom4([4]byte{10, 0, 0, byte(n)}), Ready: n != tt.unready, Node: fmt.Sprint("n", n), Hints: h,
				})
			}
			find := func(string, string) (model.Service, []model.EndpointSlice, bool) {
				return svc, []model.EndpointSlice{slice}, true
			}
			var got []byte
			for _, e := range Destination(svc, nil, find, noPolicies, tt.client, netip.MustParseAddrPort("10.96.0.7:80")).Endpoints {
				got = append(got, e.Addr.Addr().As4()[3])
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}
