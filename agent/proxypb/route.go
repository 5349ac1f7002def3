// Package proxypb is what the agent and a proxy say to each other: the launch
// packet, the control API, and the nouns of proxy/route (fromroute.go, toroute.go) and
// proxy/authz (authz.go) on the wire.
package proxypb

import (
	"fmt"
	"net/netip"
)

// ProxyResource is the name of the resource every proxy holds, its ProxyConfig.
const ProxyResource = "proxy"

// IdentityResource is the name of the resource with what is said of identities.
const IdentityResource = "identity"

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
