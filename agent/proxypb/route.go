// Package proxypb is what the agent and a proxy say to each other: the launch
// packet, the control API, and the nouns of proxy/route on the wire.
package proxypb

import (
	"fmt"
	"net/netip"

	"github.com/weirmesh/weir/proxy/route"
)

// ProxyResource is the name of the resource every proxy holds, its ProxyConfig.
const ProxyResource = "proxy"

// destinationPrefix starts the names of Destination resources.
const destinationPrefix = "dst/"

// DestinationName names the resource of an original destination.
func DestinationName(addr netip.AddrPort) string { return destinationPrefix + addr.String() }

// ParseDestinationName is the inverse of DestinationName.
func ParseDestinationName(name string) (netip.AddrPort, error) {
	if len(name) <= len(destinationPrefix) || name[:len(destinationPrefix)] != destinationPrefix {
		return netip.AddrPort{}, fmt.Errorf("%q is not the name of a destination", name)
	}
	addr, err := netip.ParseAddrPort(name[len(destinationPrefix):])
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("destination %q: %w", name, err)
	}
	return addr, nil
}

// FromDestination renders a route.Destination for the wire.
func FromDestination(d route.Destination) *Destination {
	out := &Destination{Service: d.Service}
	for _, e := range d.Endpoints {
		out.Endpoints = append(out.Endpoints, &Endpoint{Address: e.Addr.String(), Pod: e.Pod})
	}
	return out
}

// ToDestination reads a route.Destination from the wire.
func (x *Destination) ToDestination() (route.Destination, error) {
	out := route.Destination{Service: x.GetService()}
	for _, e := range x.GetEndpoints() {
		addr, err := netip.ParseAddrPort(e.GetAddress())
		if err != nil {
			return route.Destination{}, fmt.Errorf("endpoint %q: %w", e.GetAddress(), err)
		}
		out.Endpoints = append(out.Endpoints, route.Endpoint{Addr: addr, Pod: e.GetPod()})
	}
	return out, nil
}
