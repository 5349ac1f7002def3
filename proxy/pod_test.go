package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// testPod is a pod, with its proxy, and the world around it:
//
//	pod 10.9.0.2, fd09::2 ── veth ── world 10.9.0.1, .11, .12, fd09::1, ::11, ::12
//
// Service addresses (10.96.0.0/16, fd96::/64) lead to the world, where nobody has
// them.
type testPod struct {
	pod, world *namespace
	cgroups    *cgroups
	proxy      *launched
	agent      *fakeAgent
	open       []io.Closer // closed at the end
}

func newTestPod(t testing.TB, rules func(cgroup string) string) *testPod {
	t.Helper()
	p := &testPod{pod: newNamespace(t), world: newNamespace(t), cgroups: newCgroups(t)}
	p.proxy = start(t, p.pod, p.cgroups, nil)
	wire(t, p.pod, p.world)
	p.agent = &fakeAgent{own: []netip.Addr{netip.MustParseAddr("10.9.0.2"), netip.MustParseAddr("fd09::2")},
		mesh: []string{"10.96.0.0/16", "fd96::/64"}}
	p.load(t, rules(p.cgroups.name))
	return p
}

func wire(t testing.TB, pod, world *namespace) {
	t.Helper()
	var err error
	pod.do(func() {
		err = netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(world.fd),
		})
	})
	if err != nil {
		t.Fatalf("veth: %v", err)
	}
	world.do(func() {
		err = address("10.9.0.1/24", "10.9.0.11/24", "10.9.0.12/24", "fd09::1/64", "fd09::11/64", "fd09::12/64")
	})
	if err != nil {
		t.Fatal(err)
	}
	pod.do(func() { err = address("10.9.0.2/24", "fd09::2/64") })
	if err != nil {
		t.Fatal(err)
	}
	pod.do(func() { err = defaultRoutes("10.9.0.1", "fd09::1") })
	if err != nil {
		t.Fatal(err)
	}
}

func address(addrs ...string) error {
	eth0, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(eth0); err != nil {
		return err
	}
	for _, a := range addrs {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			return err
		}
		if addr.IP.To4() == nil {
			addr.Flags = 0x02 // IFA_F_NODAD
		}
		if err := netlink.AddrAdd(eth0, addr); err != nil {
			return fmt.Errorf("%s: %w", a, err)
		}
	}
	return nil
}

func defaultRoutes(gateways ...string) error {
	for _, g := range gateways {
		if err := netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(g)}); err != nil {
			return fmt.Errorf("route by %s: %w", g, err)
		}
	}
	return nil
}

// captured are the rules of a captured pod, as the plugin would load them.
func captured(cgroup string) string {
	return fmt.Sprintf(`table inet weir {
 chain in { type nat hook prerouting priority -110;
   iif "lo" return
   fib daddr type != local return
   tcp flags & (fin|syn|rst|ack) != syn return
   tcp dport { 15001, 15006 } return
   meta l4proto tcp socket transparent <= 1 redirect to :15006
 }
 chain out { type nat hook output priority -110;
   oif "lo" return
   socket cgroupv2 level 1 %q return
   tcp flags & (fin|syn|rst|ack) == syn redirect to :15001
 }
}`, cgroup)
}

// unbypassed are the same without the rule that lets the proxy's own connections
// go, and without the one for lo.
func unbypassed(string) string {
	var out []string
	for line := range strings.Lines(captured("x")) {
		if !strings.Contains(line, "cgroupv2") {
			out = append(out, line)
		}
	}
	return strings.Join(out, "")
}

// load replaces the pod's rules.
func (p *testPod) load(t testing.TB, rules string) {
	t.Helper()
	// nft looks for cgroups in /sys/fs/cgroup, where a hybrid machine has v1.
	script := `mount --bind /sys/fs/cgroup/unified /sys/fs/cgroup 2>/dev/null; nft -f -`
	cmd := exec.Command("unshare", "-m", "sh", "-c", script)
	cmd.Stdin = strings.NewReader("table inet weir\ndelete table inet weir\n" + rules)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	var err error
	p.pod.do(func() { err = cmd.Start() })
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		t.Fatalf("nft: %v: %s", err, out.String())
	}
}

// listen opens a port in a namespace and serves it with handle.
func (n *namespace) listen(t testing.TB, addr string, handle func(*net.TCPConn)) {
	t.Helper()
	var l net.Listener
	var err error
	n.do(func() { l, err = net.Listen("tcp", addr) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go serveConns(l, handle)
}

func serveConns(l net.Listener, handle func(*net.TCPConn)) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go handle(conn.(*net.TCPConn))
	}
}

// dial connects from within a namespace.
func (n *namespace) dial(t testing.TB, addr string) *net.TCPConn {
	t.Helper()
	conn, err := n.tryDial(addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	return conn
}

func (n *namespace) tryDial(addr string) (*net.TCPConn, error) {
	var conn net.Conn
	var err error
	n.do(func() { conn, err = net.DialTimeout("tcp", addr, 3*time.Second) })
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

// expectReset dials addr and wants a reset: after the connection was taken, or,
// when the proxy is faster than connect(2) here returns, by then already.
func (n *namespace) expectReset(t testing.TB, addr string) {
	t.Helper()
	conn, err := n.tryDial(addr)
	if err == nil {
		_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		_, err = conn.Read(make([]byte, 1))
		conn.Close()
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%s: %v, want a reset", addr, err)
	}
}
