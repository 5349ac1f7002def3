package netns

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/plugin/capture/iptables"
	"github.com/weirmesh/weir/plugin/capture/nft"
	"github.com/weirmesh/weir/plugin/capture/nstest"
)

// backend puts rules into the calling thread's namespace.
type backend interface {
	Apply(capture.Ruleset) (bool, error)
	Delete() error
	Read() (capture.State, error)
}

// works remembers which backends work on this machine: asking takes a second.
var works = make(map[string]error)

// backends are those that work on this machine, by name.
func backends(t testing.TB) map[string]backend {
	t.Helper()
	lock := filepath.Join(t.TempDir(), "lock")
	out := map[string]backend{
		"nftables":        nft.Backend{},
		"iptables-nft":    iptables.Backend{Variant: "-nft", LockFile: lock},
		"iptables-legacy": iptables.Backend{Variant: "-legacy", LockFile: lock},
	}
	for name, b := range out {
		err, known := works[name]
		if !known {
			cg := nstest.NewCgroup(t)
			nstest.New(t).Do(func() { _, err = b.Apply(capture.Rules(spec(cg.Bypass))) })
			works[name] = err
		}
		if err != nil {
			t.Logf("not tested here: %s: %v", name, err)
			delete(out, name)
		}
	}
	if len(out) == 0 {
		t.Skip("no backend works here")
	}
	return out
}

func spec(b capture.Bypass) capture.Spec {
	return capture.Spec{OutboundPort: capture.DefaultOutboundPort, InboundPort: capture.DefaultInboundPort, Bypass: b}
}

// family is an address family: where the pod, and its peer on the other side of
// a wire, are.
type family struct {
	name           string
	pod, peer, own netip.Addr
	other          netip.Addr // another address of the peer
	vip, ownVIP    netip.Addr // addresses of nobody, which the proxy has lead to the peer and to the pod
	nobody         netip.Addr // an address of nobody
}

var families = []family{
	{"IPv4", netip.MustParseAddr("10.77.0.2"), netip.MustParseAddr("10.77.0.1"), netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("192.0.2.1"),
		netip.MustParseAddr("10.96.0.77"), netip.MustParseAddr("10.96.0.78"), netip.MustParseAddr("10.96.0.79")},
	{"IPv6", netip.MustParseAddr("fd77::2"), netip.MustParseAddr("fd77::1"), netip.MustParseAddr("::1"), netip.MustParseAddr("2001:db8::1"),
		netip.MustParseAddr("fd96::77"), netip.MustParseAddr("fd96::78"), netip.MustParseAddr("fd96::79")},
}

// stacks are the families that a pod may have.
var stacks = map[string][]family{"IPv4 only": families[:1], "IPv6 only": families[1:], "dual stack": families}

// world is a pod with its proxy and its rules, and a peer.
type world struct {
	pod, peer *nstest.NS
	cgroup    *nstest.Cgroup
	proxy     *proxy
	backend   backend
}

// newWorld makes a world of both families whose rules are not there yet.
func newWorld(t testing.TB, b backend, limit int) *world {
	t.Helper()
	return newWorldOf(t, b, limit, families)
}

func newWorldOf(t testing.TB, b backend, limit int, families []family) *world {
	t.Helper()
	// Clean-ups run in reverse: the proxy ends before its cgroup goes.
	w := &world{cgroup: nstest.NewCgroup(t), pod: nstest.New(t), peer: nstest.New(t), backend: b}
	w.pod.Run(t, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", w.peer.Path())
	for _, end := range []struct {
		ns *nstest.NS
		at func(family) netip.Addr
	}{{w.pod, func(f family) netip.Addr { return f.pod }}, {w.peer, func(f family) netip.Addr { return f.peer }}} {
		end.ns.Run(t, "sh", "-ec", "ip link set lo up; sysctl -qw net.ipv6.conf.eth0.accept_dad=0; ip link set eth0 up")
		if families[len(families)-1].pod.Is4() {
			end.ns.Run(t, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1") // lo has none either
		}
		for _, f := range families {
			bits := 24
			if f.pod.Is6() {
				bits = 64
			}
			end.ns.Run(t, "ip", "addr", "add", fmt.Sprintf("%s/%d", end.at(f), bits), "dev", "eth0", "nodad")
		}
	}
	for _, f := range families {
		w.pod.Run(t, "ip", "route", "add", "default", "via", f.peer.String())
		w.peer.Run(t, "ip", "addr", "add", f.other.String(), "dev", "lo", "nodad")
	}
	for _, f := range families {
		await(t, w.pod, at(f.peer, 1))
		await(t, w.peer, at(f.pod, 1))
	}
	w.proxy = startProxy(t, w.pod, w.cgroup, limit)
	return w
}

// await waits until a closed port is refused: IPv6 listens for its neighbours only
// when the kernel has got round to noticing that the link is up.
func await(t testing.TB, from *nstest.NS, addr string) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; {
		_, err := dial(from, addr)
		if errors.Is(err, syscall.ECONNREFUSED) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the wire does not come up: %v", err)
		}
	}
}

// apply puts the rules of a spec in.
func (w *world) apply(t testing.TB, change func(*capture.Spec)) {
	t.Helper()
	s := spec(w.cgroup.Bypass)
	if change != nil {
		change(&s)
	}
	w.change(t, capture.Rules(s))
}

// change puts rules in.
func (w *world) change(t testing.TB, rules capture.Ruleset) {
	t.Helper()
	var err error
	w.pod.Do(func() { _, err = w.backend.Apply(rules) })
	if err != nil {
		t.Fatal(err)
	}
}

func (w *world) counters(t testing.TB) map[string]capture.Counter {
	t.Helper()
	var st capture.State
	var err error
	w.pod.Do(func() { st, err = w.backend.Read() })
	if err != nil {
		t.Fatal(err)
	}
	return st.Counters
}

// server greets each connection with the address that it comes from, then echoes
// what it gets.
type server struct {
	l  net.Listener
	wg sync.WaitGroup
}

// serve starts a server; addr may be without a host.
func serve(ns *nstest.NS, addr string) (*server, error) {
	s := new(server)
	var err error
	ns.Do(func() { s.l, err = net.Listen("tcp", addr) })
	if err != nil {
		return nil, err
	}
	s.wg.Go(s.accept)
	return s, nil
}

func (s *server) accept() {
	for {
		c, err := s.l.Accept()
		if err != nil {
			return
		}
		s.wg.Go(func() { echo(c) })
	}
}

func echo(c net.Conn) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	peer := c.RemoteAddr().(*net.TCPAddr).AddrPort()
	fmt.Fprintln(c, netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port()))
	_, _ = io.Copy(c, c)
}

func (s *server) close() {
	s.l.Close()
	s.wg.Wait()
}

// call is a connection that the server has greeted.
type call struct {
	net.Conn
	lines  *bufio.Reader
	local  netip.AddrPort
	direct bool // the server sees the caller itself
}

func dial(ns *nstest.NS, addr string) (*call, error) {
	var conn net.Conn
	var err error
	ns.Do(func() { conn, err = net.DialTimeout("tcp", addr, time.Second) })
	if err != nil {
		return nil, err
	}
	_ = conn.SetDeadline(time.Now().Add(2 * time.Second))
	c := &call{Conn: conn, lines: bufio.NewReader(conn), local: conn.LocalAddr().(*net.TCPAddr).AddrPort()}
	seen, err := c.lines.ReadString('\n')
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("no greeting: %w", err)
	}
	c.direct = strings.TrimSpace(seen) == c.local.String()
	return c, c.talk()
}

// talk sends a line and waits for its echo.
func (c *call) talk() error {
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := fmt.Fprintln(c, "hello"); err != nil {
		return err
	}
	got, err := c.lines.ReadString('\n')
	if err != nil {
		return err
	}
	if got != "hello\n" {
		return fmt.Errorf("echo is %q", got)
	}
	return nil
}

func readLine(c net.Conn) (string, error) { return bufio.NewReader(c).ReadString('\n') }

func at(a netip.Addr, port uint16) string { return netip.AddrPortFrom(a, port).String() }

// direct dials and wants the server to see the caller, and the proxy nothing.
func (w *world) direct(from *nstest.NS, addr string) error {
	w.proxy.forget()
	c, err := dial(from, addr)
	if err != nil {
		return fmt.Errorf("%s: %w", addr, err)
	}
	defer c.Close()
	if !c.direct {
		return fmt.Errorf("%s: the server does not see the caller", addr)
	}
	return w.proxy.idle()
}

// through dials and wants the connection to come to one of the proxy's ports,
// once, with its original destination.
func (w *world) through(listener uint16, from *nstest.NS, addr string) error {
	w.proxy.forget()
	c, err := dial(from, addr)
	if err != nil {
		return fmt.Errorf("%s: %w", addr, err)
	}
	defer c.Close()
	if c.direct {
		return fmt.Errorf("%s: the server sees the caller itself", addr)
	}
	got, err := w.proxy.took(c.local)
	if err != nil {
		return fmt.Errorf("%s: %w", addr, err)
	}
	want := accepted{listener, netip.MustParseAddrPort(addr), c.local}
	if got != want {
		return fmt.Errorf("%s: the proxy saw %+v, not %+v", addr, got, want)
	}
	return w.proxy.idle()
}

// refused dials and wants a reset, and the proxy nothing.
func (w *world) refused(from *nstest.NS, addr string) error {
	w.proxy.forget()
	c, err := dial(from, addr)
	if err == nil {
		c.Close()
		return fmt.Errorf("%s: answered", addr)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("%s: %w", addr, err)
	}
	return w.proxy.idle()
}

// serving runs f while a server is there.
func serving(ns *nstest.NS, addr string, f func() error) error {
	s, err := serve(ns, addr)
	if err != nil {
		return err
	}
	defer s.close()
	return f()
}
