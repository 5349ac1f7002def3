package cluster

import (
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"
	"strings"
)

// Addresses inside the cluster. They are the same in every cluster: each has
// network namespaces of its own. The one exception is the link to the host,
// see hostLink.
var (
	nodeRanges    = families{netip.MustParsePrefix("192.168.90.0/24"), netip.MustParsePrefix("fd00:90::/64")}
	podRanges     = families{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:10:244::/56")}
	serviceRanges = families{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:10:96::/112")}
)

const apiPort = 6443

// families is one prefix per IP family, IPv4 first; IPv4-only clusters have one.
type families []netip.Prefix

func (f families) String() string {
	var parts []string
	for _, prefix := range f {
		parts = append(parts, prefix.String())
	}
	return strings.Join(parts, ",")
}

// host returns the n-th address of each prefix.
func (f families) host(n byte) []netip.Addr {
	var addrs []netip.Addr
	for _, prefix := range f {
		bytes := prefix.Addr().AsSlice()
		bytes[len(bytes)-1] = n
		addr, _ := netip.AddrFromSlice(bytes)
		addrs = append(addrs, addr)
	}
	return addrs
}

// network is the cluster's addressing plan: which families, and the two ends of
// the link to the host.
type network struct {
	nodes, pods, services families
	link                  netip.Prefix // /30: .1 is the host, .2 the fabric
}

func newNetwork(ipv4Only bool, link netip.Prefix) network {
	n := 2
	if ipv4Only {
		n = 1
	}
	return network{nodes: nodeRanges[:n], pods: podRanges[:n], services: serviceRanges[:n], link: link}
}

func (n network) hostAddr() netip.Addr    { return n.link.Masked().Addr().Next() }
func (n network) linkAddr() netip.Addr    { return n.hostAddr().Next() }
func (n network) fabric() []netip.Addr    { return n.nodes.host(1) }
func (n network) dns() []netip.Addr       { return n.services.host(10) }
func (n network) node(i int) []netip.Addr { return n.nodes.host(byte(10 + i)) }

// podRange is the i-th node's share of the pods' addresses, i from 1: a /24
// and a /64.
func (n network) podRange(i int) families {
	var share families
	for _, prefix := range n.pods {
		bytes := prefix.Addr().AsSlice()
		bits := 24
		if prefix.Addr().Is4() {
			bytes[2] = byte(i)
		} else {
			bits = 64
			bytes[7] = byte(i)
		}
		addr, _ := netip.AddrFromSlice(bytes)
		share = append(share, netip.PrefixFrom(addr, bits))
	}
	return share
}

// hostLink picks the /30 that joins host and fabric: out of 198.18.0.0/15
// (RFC 2544, for tests), by the cluster's name, and not in use on the host.
func hostLink(name string) (netip.Prefix, error) {
	hash := fnv.New32a()
	hash.Write([]byte(name))
	taken, err := net.InterfaceAddrs()
	if err != nil {
		return netip.Prefix{}, err
	}
	for try := range uint32(64) {
		slot := (hash.Sum32() + try) % (1 << 15)
		offset := slot << 2
		addr := netip.AddrFrom4([4]byte{198, 18 + byte(offset>>16), byte(offset >> 8), byte(offset)})
		link := netip.PrefixFrom(addr, 30)
		if !overlaps(link, taken) {
			return link, nil
		}
	}
	return netip.Prefix{}, fmt.Errorf("no free /30 in 198.18.0.0/15 for the link to the cluster")
}

func overlaps(link netip.Prefix, taken []net.Addr) bool {
	for _, addr := range taken {
		prefix, err := netip.ParsePrefix(addr.String())
		if err == nil && prefix.Overlaps(link) {
			return true
		}
	}
	return false
}

// hostInterface is the host's end of the link: 15 bytes at most.
func hostInterface(cluster string) string { return cluster + "-host" }

// nodePort is the fabric's end of a node's veth.
func nodePort(i int) string { return fmt.Sprintf("n%d", i) }

// hostBatch is the input of `ip -batch` in the host's namespace: it makes the
// veths and puts their ends into the machines, given by PID.
func (n network) hostBatch(cluster string, fabric int, nodes []int) string {
	var b strings.Builder
	iface := hostInterface(cluster)
	fmt.Fprintf(&b, "link add %s type veth peer name host netns %d\n", iface, fabric)
	fmt.Fprintf(&b, "addr add %s/%d dev %s\n", n.hostAddr(), n.link.Bits(), iface)
	fmt.Fprintf(&b, "link set %s up\n", iface)
	for i, pid := range nodes {
		b.WriteString(nodeLink(i+1, fabric, pid))
	}
	return b.String()
}

// nodeLink is the line of it for the i-th node. Both ends are born elsewhere: nothing
// shows up here in between. A node keeps its hardware address when it boots again, or
// its neighbours would have to forget the old one first.
func nodeLink(i, fabric, node int) string {
	return fmt.Sprintf("link add eth0 address 02:00:00:00:00:%02x netns %d type veth peer name %s netns %d\n", i, node, nodePort(i), fabric)
}

// fabricBatch is the same for the fabric: the bridge, and routes to what is
// behind the nodes. Services are reached by way of the first node.
func (n network) fabricBatch(nodes int) string {
	var b strings.Builder
	b.WriteString("link set lo up\n")
	fmt.Fprintf(&b, "addr add %s/%d dev host\nlink set host up\n", n.linkAddr(), n.link.Bits())
	b.WriteString("link add br0 type bridge\n")
	n.addresses(&b, "br0", n.fabric())
	b.WriteString("link set br0 up\n")
	for i := 1; i <= nodes; i++ {
		b.WriteString(joinBridge(i))
		n.podRoutes(&b, i)
	}
	for f, services := range n.services {
		fmt.Fprintf(&b, "route add %s via %s\n", services, n.node(1)[f])
	}
	return b.String()
}

func joinBridge(i int) string { return fmt.Sprintf("link set %s master br0 up\n", nodePort(i)) }

// nodeBatch is the same for the i-th of some nodes. Whatever is not in the
// cluster is sent to the fabric, which forwards nothing: a test may give the
// fabric any address, to play the outside world.
func (n network) nodeBatch(i, nodes int) string {
	var b strings.Builder
	b.WriteString("link set lo up\n")
	n.addresses(&b, "eth0", n.node(i))
	b.WriteString("link set eth0 up\n")
	for _, gateway := range n.fabric() {
		fmt.Fprintf(&b, "route add default via %s\n", gateway)
	}
	for other := 1; other <= nodes; other++ {
		if other != i {
			n.podRoutes(&b, other)
		}
	}
	return b.String()
}

func (n network) addresses(b *strings.Builder, iface string, addrs []netip.Addr) {
	for f, addr := range addrs {
		nodad := "" // duplicate address detection would hold IPv6 up for a second
		if addr.Is6() {
			nodad = " nodad"
		}
		fmt.Fprintf(b, "addr add %s/%d dev %s%s\n", addr, n.nodes[f].Bits(), iface, nodad)
	}
}

func (n network) podRoutes(b *strings.Builder, node int) {
	for f, pods := range n.podRange(node) {
		fmt.Fprintf(b, "route add %s via %s\n", pods, n.node(node)[f])
	}
}

// nodeRules is the input of `nft -f` on a node: pods that leave the cluster do
// so by the node's address. The bridge plugin's own masquerade would hide pods
// from the other node's, too.
func (n network) nodeRules() string {
	var b strings.Builder
	b.WriteString("table inet weir-cluster {\n\tchain postrouting {\n\t\ttype nat hook postrouting priority srcnat; policy accept;\n")
	for f, pods := range n.pods {
		family := "ip"
		if pods.Addr().Is6() {
			family = "ip6"
		}
		fmt.Fprintf(&b, "\t\t%s saddr %s %s daddr != { %s, %s, %s } oifname \"eth0\" masquerade\n",
			family, pods, family, pods, n.nodes[f], n.services[f])
	}
	b.WriteString("\t}\n}\n")
	return b.String()
}
