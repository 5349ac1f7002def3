// Package capture says which traffic of a pod is turned aside to its proxy.
//
// A Spec is what to capture; Rules(Spec) is how, as a value that prints itself;
// the backends in nft and iptables put Rules into a network namespace. Nothing
// here touches the kernel, and nothing here decides whether a pod is captured:
// that is the agent's.
package capture

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// DefaultOutboundPort and DefaultInboundPort are where a pod's proxy listens.
const (
	DefaultOutboundPort uint16 = 15001
	DefaultInboundPort  uint16 = 15006
)

// Spec says what of one pod's TCP traffic is turned aside, and to which ports.
// Both address families are always meant.
type Spec struct {
	// OutboundPort and InboundPort are the proxy's listeners in the pod.
	OutboundPort, InboundPort uint16
	// Bypass tells the proxy's own connections from the application's.
	Bypass Bypass

	// Excluded ports are never captured; where an include list is not empty,
	// only its ports are. Inbound: the application's port; outbound: the port
	// that is dialled.
	ExcludeInboundPorts, IncludeInboundPorts   []PortRange
	ExcludeOutboundPorts, IncludeOutboundPorts []PortRange
	// The same for the addresses that are dialled.
	ExcludeOutboundCIDRs, IncludeOutboundCIDRs []netip.Prefix
}

// Bypass is the cgroup v2 below which all proxies of the node live. Sockets
// created in it are not captured. The rule keeps ID, not Path: a cgroup that was
// removed and made again no longer matches.
type Bypass struct {
	Path  string // relative to the root of the v2 hierarchy, "weir"
	ID    uint64 // inode number of the cgroup's directory
	Level int    // depth below the root; 1 is directly below
}

// PortRange is First to Last, both included.
type PortRange struct {
	First, Last uint16
}

// String renders "80" or "8000-8010".
func (r PortRange) String() string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// ParsePorts reads a comma-separated list of ports and ranges, "80,8000-8010".
// Blanks around items are allowed; an empty list is an error.
func ParsePorts(s string) ([]PortRange, error) {
	var out []PortRange
	for item := range strings.SplitSeq(s, ",") {
		item = strings.TrimSpace(item)
		first, last, ranged := strings.Cut(item, "-")
		if !ranged {
			last = first
		}
		lo, err := parsePort(first)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", item, err)
		}
		hi, err := parsePort(last)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", item, err)
		}
		if lo > hi {
			return nil, fmt.Errorf("%q: the range ends before it starts", item)
		}
		out = append(out, PortRange{lo, hi})
	}
	return out, nil
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("not a port between 1 and 65535")
	}
	return uint16(n), nil
}

// Validate reports the first thing that makes a Spec meaningless.
func (s Spec) Validate() error {
	switch {
	case s.OutboundPort == 0 || s.InboundPort == 0:
		return fmt.Errorf("capture: the proxy's ports must not be 0")
	case s.OutboundPort == s.InboundPort:
		return fmt.Errorf("capture: the proxy's outbound and inbound port are both %d", s.OutboundPort)
	case s.Bypass.Path == "" || s.Bypass.ID == 0 || s.Bypass.Level < 1:
		return fmt.Errorf("capture: no bypass cgroup: the proxy's own connections would loop")
	}
	return nil
}
