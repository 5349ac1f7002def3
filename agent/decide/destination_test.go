package decide

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

var addrPorts = cmpopts.EquateComparable(netip.AddrPort{})

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
			got := Destination(back, nil, find, Client{}, addrPort(test.dial))
			if diff := cmp.Diff(test.want, got, addrPorts, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}
