package launch

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/plugin/capture"
)

// probeAddr6 is the scratch namespace's own address, for a route needs one to
// call from: of the documentation's range (RFC 3849).
var probeAddr6 = netip.MustParseAddr("2001:db8::1")

// Destination says where a connection of a pod to dialled, a ClusterIP, appears to
// go when it meets the rules: elsewhere if a program in the kernel chooses the
// endpoint while the application connects (Cilium in place of kube-proxy, Calico's
// eBPF data plane). It is tried out, from a cgroup below that of the node's pods,
// in a network namespace that is no pod's.
func (m *Manager) Destination(ctx context.Context, dialled netip.AddrPort) (netip.AddrPort, error) {
	var met netip.AddrPort
	err := m.inScratch(ctx, false, func(_ string, spec capture.Spec) error {
		if err := probeRoutes(dialled.Addr()); err != nil {
			return fmt.Errorf("scratch network namespace: %w", err)
		}
		var err error
		met, err = m.destination(ctx, dialled, spec)
		return err
	})
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("dial ClusterIP %s as a pod would: %w", dialled, err)
	}
	return met, nil
}

// destination dials on this very thread's namespaces, which have the rules.
func (m *Manager) destination(ctx context.Context, dialled netip.AddrPort, spec capture.Spec) (netip.AddrPort, error) {
	network, anybody := "tcp6", netip.IPv6Unspecified()
	if dialled.Addr().Is4() {
		network, anybody = "tcp4", netip.IPv4Unspecified()
	}
	l, err := net.Listen(network, netip.AddrPortFrom(anybody, spec.OutboundPort).String())
	if err != nil {
		return netip.AddrPort{}, err
	}
	defer l.Close()
	if err := m.dialAsPod(ctx, dialled.String(), anybody.String()); err != nil {
		return netip.AddrPort{}, err
	}
	if err := l.(*net.TCPListener).SetDeadline(time.Now().Add(probeTimeout)); err != nil {
		return netip.AddrPort{}, err
	}
	conn, err := l.Accept()
	if err != nil {
		return netip.AddrPort{}, err
	}
	defer conn.Close()
	return originalDestination(conn.(*net.TCPConn), dialled.Addr().Is4())
}

// dialAsPod runs DialCommand in a process that was started in a cgroup below that
// of the node's pods.
func (m *Manager) dialAsPod(ctx context.Context, args ...string) error {
	parent := m.opts.PodsCgroup
	if parent == "" {
		parent = findPods(m.cgroups.v2)
	}
	path := filepath.Join(m.cgroups.v2, parent, fmt.Sprintf("weir-test-%d", os.Getpid()))
	if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("cgroup of the node's pods (--pods-cgroup): %w", err)
	}
	defer os.Remove(path)
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return runDial(ctx, dir, args...)
}

// podsDepth is how far below the root kubelet's cgroup is looked for: a node that
// is itself a container has it further down.
const podsDepth = 3

// findPods finds the cgroup that kubelet puts pods below, by the names that its two
// drivers give it, relative to the v2 root. Where there is none (on a hybrid node
// kubelet's are in v1) it is the root: what is attached there counts for all.
func findPods(root string) string {
	found := "."
	_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil // gone meanwhile, or a file
		}
		relative, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if name := d.Name(); name == "kubepods" || name == "kubepods.slice" || strings.HasSuffix(name, "-kubepods.slice") {
			found = relative
			return fs.SkipAll
		}
		if relative != "." && strings.Count(relative, "/")+1 == podsDepth {
			return fs.SkipDir
		}
		return nil
	})
	return found
}

// probeRoutes lets the thread's namespace have a route to wherever a connection to
// an address of that family may be sent.
func probeRoutes(addr netip.Addr) error {
	link, err := netlink.LinkByName("weir0")
	if err != nil {
		return err
	}
	anywhere := &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
	if addr.Is6() {
		anywhere = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
		// Without looking for another holder, which takes a second or two.
		own := &netlink.Addr{IPNet: &net.IPNet{IP: probeAddr6.AsSlice(), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD}
		if err := netlink.AddrAdd(link, own); err != nil {
			return err
		}
	}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: anywhere, Scope: netlink.SCOPE_LINK})
}

// ip6tOriginalDst is IP6T_SO_ORIGINAL_DST of linux/netfilter_ipv6/ip6_tables.h.
const ip6tOriginalDst = 80

// originalDestination asks conntrack where a redirected connection was going. The
// structs are those that x/sys can fetch and that are long enough.
func originalDestination(conn *net.TCPConn, is4 bool) (netip.AddrPort, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	var out netip.AddrPort
	var failed error
	err = raw.Control(func(fd uintptr) {
		if is4 {
			var m *unix.IPv6Mreq // of a sockaddr_in
			if m, failed = unix.GetsockoptIPv6Mreq(int(fd), unix.IPPROTO_IP, unix.SO_ORIGINAL_DST); failed == nil {
				b := m.Multiaddr[:]
				out = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binary.BigEndian.Uint16(b[2:]))
			}
			return
		}
		var m *unix.IPv6MTUInfo // begins with a sockaddr_in6
		if m, failed = unix.GetsockoptIPv6MTUInfo(int(fd), unix.IPPROTO_IPV6, ip6tOriginalDst); failed == nil {
			port := binary.NativeEndian.AppendUint16(nil, m.Addr.Port)
			out = netip.AddrPortFrom(netip.AddrFrom16(m.Addr.Addr), binary.BigEndian.Uint16(port))
		}
	})
	return out, errors.Join(err, failed)
}
