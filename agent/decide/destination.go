package decide

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// Client is who asks what a destination is: the same address may stand for
// different things in different places.
type Client struct {
	Namespace  string // the pod's
	Node, Zone string // where it runs; empty: unknown, and all places are as near
}

// Lookup finds a Service and its slices. It is false for a Service that there is
// not.
type Lookup func(namespace, name string) (model.Service, []model.EndpointSlice, bool)

// Destination says what a connection of the client to addr stands for, given the
// Service that has addr's IP as one of its ClusterIPs, and all routes that name
// that Service as a parent, in any order. It is the zero Destination unless addr
// is a TCP port of the Service at a ClusterIP.
func Destination(svc model.Service, routes []model.Route, find Lookup, policies Policies, client Client, addr netip.AddrPort) route.Destination {
	ip := addr.Addr().Unmap() // a dual-stack socket sees IPv4 as ::ffff:a.b.c.d
	if !slices.Contains(svc.ClusterIPs, ip) {
		return route.Destination{}
	}
	port, ok := tcpPort(svc, addr.Port())
	if !ok {
		return route.Destination{}
	}
	_, endpointSlices, _ := find(svc.Namespace, svc.Name)
	d := route.Destination{
		Service:   svc.ID(),
		Endpoints: endpoints(svc, port, endpointSlices, ip.Is4(), client),
		Protocol:  ProtocolOf(port),
		Policy:    policy(svc, policies),
	}
	if governing := govern(svc, port, routes, client.Namespace); len(governing) > 0 {
		d.Routes = resolver{find: find, policies: policies, client: client, ip4: ip.Is4(), parent: d.Backend(), parentPort: port}.flatten(governing)
		if d.Protocol == route.Opaque && d.Routes.Kind != route.TCPRoute {
			d.Protocol = route.Undeclared // such a route is of no use on bytes that are not looked at
		}
	}
	return d
}

// tcpPort is a Service's TCP port of that number.
func tcpPort(svc model.Service, number uint16) (model.ServicePort, bool) {
	for _, p := range svc.Ports {
		if p.Protocol == model.TCP && p.Port == number {
			return p, true
		}
	}
	return model.ServicePort{}, false
}

// endpoints are those behind a Service's port, chosen as kube-proxy does: those of
// one family which are ready, and meant for the client; if there are none, those
// which terminate but still serve. They are in order of address, each once,
// whatever the order of the slices.
func endpoints(svc model.Service, port model.ServicePort, endpointSlices []model.EndpointSlice, ip4 bool, client Client) []route.Endpoint {
	var ready, draining []candidate
	for _, slice := range endpointSlices {
		target, ok := targetPort(slice, port.Name)
		if !ok || slice.Namespace != svc.Namespace || slice.Service != svc.Name {
			continue
		}
		for _, e := range slice.Endpoints {
			if e.Address.Is4() != ip4 || svc.Local && client.Node != "" && e.Node != client.Node {
				continue
			}
			c := candidate{route.Endpoint{Addr: netip.AddrPortFrom(e.Address, target), Pod: e.Pod}, e.Hints}
			switch {
			case e.Ready:
				ready = append(ready, c)
			case e.Draining:
				draining = append(draining, c)
			}
		}
	}
	if !svc.Local {
		ready = hinted(ready, client)
	}
	if len(ready) == 0 {
		ready = draining
	}
	return sorted(ready)
}

// candidate is an endpoint that may be chosen.
type candidate struct {
	route.Endpoint
	hints *model.Hints
}

// hinted are the ready endpoints that are meant for the client. As with kube-proxy,
// hints count only if every endpoint has some and one of them names the client's
// node or, if none does, its zone.
func hinted(ready []candidate, client Client) []candidate {
	if near := meantFor(ready, client.Node, func(h *model.Hints) []string { return h.Nodes }); near != nil {
		return near
	}
	if near := meantFor(ready, client.Zone, func(h *model.Hints) []string { return h.Zones }); near != nil {
		return near
	}
	return ready
}

// meantFor are the endpoints whose hints name a place; none if one has no such
// hints.
func meantFor(ready []candidate, place string, names func(*model.Hints) []string) []candidate {
	if place == "" {
		return nil
	}
	var near []candidate
	for _, c := range ready {
		if c.hints == nil || len(names(c.hints)) == 0 {
			return nil
		}
		if slices.Contains(names(c.hints), place) {
			near = append(near, c)
		}
	}
	return near
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
func sorted(candidates []candidate) []route.Endpoint {
	if len(candidates) == 0 {
		return nil
	}
	out := make([]route.Endpoint, len(candidates))
	for i, c := range candidates {
		out[i] = c.Endpoint
	}
	slices.SortFunc(out, func(a, b route.Endpoint) int {
		return cmp.Or(a.Addr.Compare(b.Addr), strings.Compare(a.Pod, b.Pod))
	})
	return slices.CompactFunc(out, func(a, b route.Endpoint) bool { return a.Addr == b.Addr })
}
