package decide

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// Destination says what a connection to addr stands for, given the Service that
// has addr's IP as one of its ClusterIPs, and that Service's slices. It is the
// zero Destination unless addr is a TCP port of the Service at a ClusterIP.
//
// Endpoints are chosen as kube-proxy does: those of addr's family which are
// ready; if there are none, those which terminate but still serve. They are in
// order of address, each once, whatever the order of the slices.
func Destination(svc model.Service, endpointSlices []model.EndpointSlice, addr netip.AddrPort) route.Destination {
	ip := addr.Addr().Unmap() // a dual-stack socket sees IPv4 as ::ffff:a.b.c.d
	if !slices.Contains(svc.ClusterIPs, ip) {
		return route.Destination{}
	}
	i := slices.IndexFunc(svc.Ports, func(p model.ServicePort) bool {
		return p.Protocol == model.TCP && p.Port == addr.Port()
	})
	if i < 0 {
		return route.Destination{}
	}
	var ready, draining []route.Endpoint
	for _, slice := range endpointSlices {
		port, ok := targetPort(slice, svc.Ports[i].Name)
		if !ok || slice.Namespace != svc.Namespace || slice.Service != svc.Name {
			continue
		}
		for _, e := range slice.Endpoints {
			if e.Address.Is4() != ip.Is4() {
				continue
			}
			endpoint := route.Endpoint{Addr: netip.AddrPortFrom(e.Address, port), Pod: e.Pod}
			switch {
			case e.Ready:
				ready = append(ready, endpoint)
			case e.Draining:
				draining = append(draining, endpoint)
			}
		}
	}
	if len(ready) == 0 {
		ready = draining
	}
	return route.Destination{Service: svc.ID(), Endpoints: sorted(ready)}
}

// targetPort is where the endpoints of a slice serve the Service's TCP port of
// that name. Named target ports differ from slice to slice.
func targetPort(slice model.EndpointSlice, name string) (uint16, bool) {
	for _, p := range slice.Ports {
		if p.Protocol == model.TCP && p.Name == name {
			return p.Port, true
		}
	}
	return 0, false
}

// sorted orders endpoints by address and keeps one of each: while endpoints move
// between slices, both list them.
func sorted(endpoints []route.Endpoint) []route.Endpoint {
	slices.SortFunc(endpoints, func(a, b route.Endpoint) int {
		return cmp.Or(a.Addr.Compare(b.Addr), strings.Compare(a.Pod, b.Pod))
	})
	return slices.CompactFunc(endpoints, func(a, b route.Endpoint) bool { return a.Addr == b.Addr })
}
