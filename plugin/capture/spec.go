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
	"slices"
	"strconv"
	"strings"
)

// DefaultOutboundPort and DefaultInboundPort are where a pod's proxy listens.
const (
	DefaultOutboundPort uint16 = 15001
	DefaultInboundPort  uint16 = 15006
)

// Spec says what of one pod's TCP traffic is turned aside, and to which ports.
// Both address families are always meant. What is excluded by any list is left
// alone.
type Spec struct {
	// OutboundPort and InboundPort are the proxy's listeners in the pod.
	OutboundPort, InboundPort uint16
	// Bypass tells the proxy's own connections from the application's.
	Bypass Bypass
	// KeepClient lets the proxy connect to the application from the caller's own
	// address, for which the namespace needs routes and sysctls beside the rules.
	// The nftables backend alone can do it.
	KeepClient bool

	// Excluded ports are never captured; where an include list is not empty,
	// only its ports are. Inbound: the application's port; outbound: the port
	// that is dialled.
	ExcludeInboundPorts, IncludeInboundPorts   []PortRange
	ExcludeOutboundPorts, IncludeOutboundPorts []PortRange
	// The same for the addresses that are dialled.
	ExcludeOutboundCIDRs, IncludeOutboundCIDRs []netip.Prefix
	// Sockets of these users and groups (of the process that made the socket, as
	// the pod's user namespace numbers them) are not captured.
	ExcludeOutboundUIDs, ExcludeOutboundGIDs []IDRange
	// What enters or leaves by these interfaces is not captured. They need not be
	// there yet.
	ExcludeInterfaces []string
	// RefuseQUIC answers outbound UDP to port 443 with an ICMP error, so that
	// clients fall back to TCP, where that would be captured as far as users,
	// groups, interfaces and addresses go; the lists of ports are TCP's.
	RefuseQUIC bool
}

// Bypass is the cgroup v2 below which all proxies of the node live. Sockets
// created in it are not captured. The rule keeps ID, not Path: a cgroup that was
// removed and made again no longer matches.
type Bypass struct {
	Path  string // relative to the root of the v2 hierarchy, "weir"
	ID    uint64 // inode number of the cgroup's directory
	Level int    // depth below the root; 1 is directly below
}

// Range is First to Last, both included.
type Range[N uint16 | uint32] struct {
	First, Last N
}

type (
	// PortRange are ports; none is 0.
	PortRange = Range[uint16]
	// IDRange are numbers of users or of groups, at most MaxID.
	IDRange = Range[uint32]
)

// MaxID is the highest number of a user or group: the next stands for none.
const MaxID uint32 = 1<<32 - 2

// String renders "80" or "8000-8010".
func (r Range[N]) String() string {
	if r.First == r.Last {
		return strconv.FormatUint(uint64(r.First), 10)
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// ParsePorts reads a comma-separated list of ports and ranges, "80,8000-8010".
// Blanks around items are allowed; an empty list is an error.
func ParsePorts(s string) ([]PortRange, error) { return parseRanges(s, parsePort) }

// ParseIDs reads a comma-separated list of users or groups, by number, and
// ranges of them, "0,1000-1999". Blanks around items are allowed; an empty list
// is an error.
func ParseIDs(s string) ([]IDRange, error) { return parseRanges(s, parseID) }

// MaxItems is how many items a list may have: what a pod asks for must not be
// work for its node.
const MaxItems = 256

// Items splits a comma-separated list. Blanks around items are allowed.
func Items(s string) ([]string, error) {
	out := strings.SplitN(s, ",", MaxItems+1)
	if len(out) > MaxItems {
		return nil, fmt.Errorf("more than %d items", MaxItems)
	}
	for i := range out {
		out[i] = strings.TrimSpace(out[i])
	}
	return out, nil
}

func parseRanges[N uint16 | uint32](s string, parse func(string) (N, error)) ([]Range[N], error) {
	items, err := Items(s)
	if err != nil {
		return nil, err
	}
	var out []Range[N]
	for _, item := range items {
		first, last, ranged := strings.Cut(item, "-")
		if !ranged {
			last = first
		}
		lo, err := parse(first)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", item, err)
		}
		hi, err := parse(last)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", item, err)
		}
		if lo > hi {
			return nil, fmt.Errorf("%q: the range ends before it starts", item)
		}
		out = append(out, Range[N]{lo, hi})
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

func parseID(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || uint32(n) > MaxID {
		return 0, fmt.Errorf("not a number between 0 and %d", MaxID)
	}
	return uint32(n), nil
}

// ParseInterfaces reads a comma-separated list of interfaces, "net1,eth1". Blanks
// around items are allowed; an empty list is an error.
func ParseInterfaces(s string) ([]string, error) {
	items, err := Items(s)
	if err != nil {
		return nil, err
	}
	for _, item := range items {
		if err := checkInterface(item); err != nil {
			return nil, fmt.Errorf("%q: %w", item, err)
		}
	}
	return items, nil
}

// maxInterface is the longest name that Linux gives an interface (IFNAMSIZ less
// the byte that ends it).
const maxInterface = 15

// checkInterface refuses names that Linux does not give (dev_valid_name), and
// those that cannot be written down plainly.
func checkInterface(name string) error {
	if name == "" || name == "." || name == ".." || len(name) > maxInterface {
		return fmt.Errorf("not an interface's name: those have 1 to %d characters", maxInterface)
	}
	for _, c := range []byte(name) {
		if c <= ' ' || c >= 0x7f || strings.IndexByte(`/:,"*\`, c) >= 0 {
			return fmt.Errorf("not an interface's name: %q is in it", c)
		}
	}
	return nil
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
	for _, name := range s.ExcludeInterfaces {
		if err := checkInterface(name); err != nil {
			return fmt.Errorf("capture: %q: %w", name, err)
		}
	}
	for _, r := range slices.Concat(s.ExcludeOutboundUIDs, s.ExcludeOutboundGIDs) {
		if r.First > r.Last || r.Last > MaxID {
			return fmt.Errorf("capture: %s: not users or groups", r)
		}
	}
	return nil
}
