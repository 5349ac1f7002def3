package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/route"
)

// The tests of this file put the rules in as an agent does: by weir-cni.

var plugin struct {
	once sync.Once
	path string
	err  error
}

// pluginBinary builds weir-cni once, beside weir-proxy.
func pluginBinary(t testing.TB) string {
	t.Helper()
	beside := filepath.Dir(proxyBinary(t))
	plugin.once.Do(func() {
		plugin.path = filepath.Join(beside, "weir-cni")
		cmd := exec.Command("go", "build", "-o", plugin.path, "../plugin")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			plugin.err = fmt.Errorf("%w: %s", err, out)
		}
	})
	if plugin.err != nil {
		t.Fatal(plugin.err)
	}
	return plugin.path
}

// newKeepingPod is newTestPod with a proxy and rules that keep callers' addresses.
func newKeepingPod(t testing.TB) *testPod {
	t.Helper()
	p := &testPod{pod: newNamespace(t), world: newNamespace(t), cgroups: newCgroups(t)}
	msg := launchOf(p.cgroups.paths)
	msg.KeepNetRaw = true
	var err error
	if p.proxy, err = launch(t, p.pod, msg, nil); err != nil {
		t.Fatal(err)
	}
	wire(t, p.pod, p.world)
	p.agent = &fakeAgent{own: []netip.Addr{netip.MustParseAddr("10.9.0.2"), netip.MustParseAddr("fd09::2")},
		mesh: []string{"10.96.0.0/16", "fd96::/64"}}
	p.capture(t)
	t.Cleanup(func() {
		for _, c := range p.open {
			c.Close()
		}
	})
	p.agent.connect(t, p.proxy.control)
	return p
}

// capture has weir-cni put its rules in.
func (p *testPod) capture(t testing.TB) {
	t.Helper()
	dir := filepath.Dir(p.cgroups.unified(t))
	var st syscall.Stat_t
	if err := syscall.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	tasks, err := json.Marshal([]map[string]any{{"Netns": p.pod.path(), "Do": "apply", "Spec": map[string]any{
		"OutboundPort": 15001, "InboundPort": 15006, "KeepClient": true,
		"Bypass": map[string]any{"Path": p.cgroups.name, "ID": st.Ino, "Level": 1},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(pluginBinary(t), "repair")
	cmd.Stdin = bytes.NewReader(tasks)
	if out, err := cmd.CombinedOutput(); err != nil || bytes.Contains(out, []byte(`"error"`)) {
		t.Fatalf("weir-cni repair: %v: %s", err, out)
	}
}

// unified is the file of the v2 hierarchy that a process joins the cgroup by.
func (c *cgroups) unified(t testing.TB) string {
	t.Helper()
	for _, path := range c.paths {
		if filepath.Base(path) == "cgroup.procs" {
			return path
		}
	}
	t.Skip("no cgroup v2 hierarchy is mounted")
	return ""
}

func (n *namespace) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.fd) }

// sh runs a script in the namespace.
func (n *namespace) sh(t testing.TB, script string) string {
	t.Helper()
	out, err := exec.Command("nsenter", "--net="+n.path(), "sh", "-ec", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", script, err, out)
	}
	return string(out)
}

// greet tells the client the address it comes from, then does as it says: 'c'
// closes first, 'e' echoes until the end.
func greet(conn *net.TCPConn) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	fmt.Fprintln(conn, unmapped(conn.RemoteAddr()))
	how := make([]byte, 1)
	if _, err := io.ReadFull(conn, how); err != nil || how[0] == 'c' {
		return
	}
	_, _ = io.Copy(conn, conn)
}

func unmapped(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// patience is how long a connection may take that is not expected to fail.
const patience = 5 * time.Second

// seen dials addr from a source, whose port may be 0, and returns the connection
// and the address that the application sees. The thread is in the caller's
// namespace.
func seen(from netip.AddrPort, addr string, timeout time.Duration) (*net.TCPConn, netip.AddrPort, error) {
	dialer := net.Dialer{Timeout: timeout, LocalAddr: net.TCPAddrFromAddrPort(from), Control: reuse}
	conn, err := dialer.Dial("tcp", addr)
	if err != nil {
		return nil, netip.AddrPort{}, err
	}
	tcp := conn.(*net.TCPConn)
	_ = tcp.SetDeadline(time.Now().Add(timeout))
	text, err := bufio.NewReaderSize(tcp, 64).ReadString('\n')
	if err != nil {
		tcp.Close()
		return nil, netip.AddrPort{}, fmt.Errorf("no greeting: %w", err)
	}
	peer, err := netip.ParseAddrPort(strings.TrimSpace(text))
	return tcp, peer, err
}

// reuse lets a port be bound again while an earlier connection of it lingers.
func reuse(_, _ string, raw syscall.RawConn) error {
	var failed error
	err := raw.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	})
	return errors.Join(err, failed)
}

// callers are the world's addresses: .1 is where a node's masquerade calls from.
var callers = map[string][]netip.Addr{
	"10.9.0.2:8080":  {netip.MustParseAddr("10.9.0.1"), netip.MustParseAddr("10.9.0.11"), netip.MustParseAddr("10.9.0.12")},
	"[fd09::2]:8080": {netip.MustParseAddr("fd09::1"), netip.MustParseAddr("fd09::11"), netip.MustParseAddr("fd09::12")},
}

// asCaller wants the application on addr to see each caller as it is.
func (p *testPod) asCaller(addr string) error {
	var failed []error
	for _, caller := range callers[addr] {
		var conn *net.TCPConn
		var peer netip.AddrPort
		var err error
		p.world.do(func() { conn, peer, err = seen(netip.AddrPortFrom(caller, 0), addr, patience) })
		if err != nil {
			failed = append(failed, fmt.Errorf("from %s: %w", caller, err))
			continue
		}
		conn.Close()
		if peer.Addr() != caller {
			failed = append(failed, fmt.Errorf("from %s: the application sees %s", caller, peer))
		}
	}
	return errors.Join(failed...)
}

func TestClientAddress(t *testing.T) {
	p := newKeepingPod(t)
	p.pod.listen(t, ":8080", greet)
	for addr := range callers {
		if err := p.asCaller(addr); err != nil {
			t.Errorf("%s: %v", addr, err)
		}
	}
	r := p.agent.record(t, 0)
	if r.Direction != proxypb.Direction_INBOUND || r.Reason != "" {
		t.Errorf("record %v", r)
	}
	client, local := r.ClientAddress, r.UpstreamLocalAddress
	if client.Addr() != local.Addr() {
		t.Errorf("the record has client %s, and the proxy's own end at %s", client, local)
	}
	for name, want := range map[string]string{
		"CapInh": "0000000000002000", "CapPrm": "0000000000002000", "CapEff": "0000000000002000",
		"CapBnd": "0000000000002000", "CapAmb": "0000000000002000", "NoNewPrivs": "1", "Seccomp": "2",
		"Uid": "1700000 1700000 1700000 1700000", "Groups": "",
	} {
		if got := p.proxy.status(t)[name]; got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
}

// TestClientAddressInside: what does not come from outside is as it was.
func TestClientAddressInside(t *testing.T) {
	p := newKeepingPod(t)
	p.agent.mu.Lock()
	p.agent.destinations = map[netip.AddrPort]route.Destination{service4: endpoints("10.9.0.2:8080")}
	p.agent.mu.Unlock()
	p.pod.listen(t, ":8080", greet)
	p.world.listen(t, ":8081", greet)
	for _, c := range []struct{ what, from, to, want string }{
		{"its Service", "0.0.0.0:0", service4.String(), "10.9.0.2"},
		{"its own address", "0.0.0.0:0", "10.9.0.2:8080", "10.9.0.2"},
		{"localhost", "0.0.0.0:0", "127.0.0.1:8080", "127.0.0.1"},
		{"localhost, IPv6", "[::]:0", "[::1]:8080", "::1"},
		{"the world", "0.0.0.0:0", "10.9.0.1:8081", "10.9.0.2"},
		{"the world, IPv6", "[::]:0", "[fd09::1]:8081", "fd09::2"},
	} {
		p.pod.do(func() {
			conn, peer, err := seen(netip.MustParseAddrPort(c.from), c.to, patience)
			if err != nil {
				t.Errorf("the pod to %s: %v", c.what, err)
				return
			}
			conn.Close()
			if peer.Addr().String() != c.want {
				t.Errorf("the pod to %s: seen as %s, want %s", c.what, peer, c.want)
			}
		})
	}
	if _, err := p.world.tryDial("10.9.0.2:8082"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("closed port: %v", err)
	}
	if _, err := p.world.tryDial("10.9.0.2:15006"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("the proxy's port: %v", err)
	}
	for i := range 4 { // the Service's is handed over, and has two
		if r := p.agent.record(t, i); r.Reason != "" {
			t.Errorf("record %v", r)
		}
	}
}

// TestClientAddressStream: both ends see of each other what they do without a
// proxy: data, its end, a reset.
func TestClientAddressStream(t *testing.T) {
	p := newKeepingPod(t)
	for _, addr := range []string{"10.9.0.2:9000", "[fd09::2]:9000"} {
		accepted := make(chan *net.TCPConn, 2)
		p.pod.listen(t, addr, func(c *net.TCPConn) { accepted <- c })
		client := p.world.dial(t, addr)
		server := <-accepted
		defer server.Close()
		if err := client.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if _, err := server.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("%s: the application reads %v, want EOF", addr, err)
		}
		// The other direction goes on.
		big := strings.Repeat("x", 1<<20)
		go func() {
			_, _ = io.WriteString(server, big)
			_ = server.CloseWrite()
		}()
		if got, err := io.ReadAll(client); err != nil || len(got) != len(big) {
			t.Errorf("%s: %d bytes after the half-close, %v", addr, len(got), err)
		}

		for _, byClient := range []bool{true, false} {
			breaks, sees := p.world.dial(t, addr), <-accepted
			if !byClient {
				breaks, sees = sees, breaks
			}
			_ = breaks.SetLinger(0)
			breaks.Close()
			_ = sees.SetDeadline(time.Now().Add(5 * time.Second))
			if _, err := sees.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("%s: reset by client %v: the other end reads %v", addr, byClient, err)
			}
			sees.Close()
		}
	}
}

// TestClientAddressMany: callers that use the same ports, again and again, at the
// same time, in both families.
func TestClientAddressMany(t *testing.T) {
	p := newKeepingPod(t)
	p.pod.listen(t, ":8080", greet)
	// The proxy's ports are of the callers' ones, and not many.
	p.pod.sh(t, "sysctl -qw net.ipv4.ip_local_port_range='20000 20999'")
	total := 10_000
	if testing.Short() {
		total = 1_000
	}
	const workers, ports = 12, 16
	var group sync.WaitGroup
	failures := make(chan error, total)
	for w := range workers {
		group.Add(1)
		go func() {
			defer group.Done()
			runtime.LockOSThread() // and never unlocked: the thread is in the world
			if err := unix.Setns(p.world.fd, unix.CLONE_NEWNET); err != nil {
				failures <- err
				return
			}
			for i := range total / workers {
				addr := []string{"10.9.0.2:8080", "[fd09::2]:8080"}[i%2]
				// Two workers share a caller, and halve the ports between them; all
				// callers use the same ports.
				caller := callers[addr][w%3]
				port := uint16(20_000 + w/3*ports + i/2%ports)
				if err := once(netip.AddrPortFrom(caller, port), addr, i); err != nil {
					failures <- fmt.Errorf("%s:%d to %s: %w", caller, port, addr, err)
				}
			}
		}()
	}
	began := time.Now()
	group.Wait()
	close(failures)
	failed := 0
	for err := range failures {
		if failed++; failed <= 10 {
			t.Error(err)
		}
	}
	t.Logf("%d of %d connections failed, in %s", failed, total/workers*workers, time.Since(began))
}

// once makes one connection, which the application ends, or a reset.
func once(from netip.AddrPort, addr string, i int) error {
	conn, peer, err := seen(from, addr, patience)
	if err != nil {
		return err
	}
	defer conn.Close()
	if peer.Addr() != from.Addr() {
		return fmt.Errorf("the application sees %s", peer)
	}
	if i/2%3 == 0 {
		_, err := io.WriteString(conn, "exy")
		echo := make([]byte, 2)
		if err == nil {
			_, err = io.ReadFull(conn, echo)
		}
		_ = conn.SetLinger(0)
		return err
	}
	// Else the port is not free at once: whoever closes first keeps it.
	if _, err := io.WriteString(conn, "c"); err != nil {
		return err
	}
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		return fmt.Errorf("the application's end reads %w", err)
	}
	return nil
}

// gone is a script that deletes the first rule of a chain with these words.
func gone(chain, words string) string {
	return fmt.Sprintf(`nft delete rule inet weir %s handle $(nft -a list chain inet weir %s | sed -n 's/.*%s.*handle //p' | head -1)`, chain, chain, words)
}

// clientCheck is something that holds in a pod that keeps callers' addresses.
type clientCheck func(p *testPod, addr string) error

const (
	v4 = "10.9.0.2:8080"
	v6 = "[fd09::2]:8080"
)

// within is how long a check waits for what takes a millisecond.
const within = 1500 * time.Millisecond

// asItself: the application sees who calls.
func asItself(p *testPod, addr string) error {
	var conn *net.TCPConn
	var peer netip.AddrPort
	var err error
	caller := callers[addr][1]
	p.world.do(func() { conn, peer, err = seen(netip.AddrPortFrom(caller, 0), addr, within) })
	if err != nil {
		return err
	}
	conn.Close()
	if peer.Addr() != caller {
		return fmt.Errorf("%s is seen as %s", caller, peer)
	}
	return nil
}

// samePorts has the proxy dial from the very ports that its callers have, while
// they have them.
func samePorts(p *testPod, addr string) error {
	caller := callers[addr][2]
	var failed []error
	for port := uint16(30_000); port < 30_008; port++ {
		p.world.do(func() {
			conn, peer, err := seen(netip.AddrPortFrom(caller, port), addr, within)
			if err != nil {
				failed = append(failed, err)
				return
			}
			defer p.later(conn)
			if peer.Addr() != caller || peer.Port() < 30_000 || peer.Port() >= 30_008 {
				failed = append(failed, fmt.Errorf("%s:%d is seen as %s", caller, port, peer))
			}
		})
		if len(failed) > 0 {
			break // the others wait as long
		}
	}
	return errors.Join(failed...)
}

// untracked: conntrack knows the connection that came in, and not the one to the
// application.
func untracked(p *testPod, addr string) error {
	var conn *net.TCPConn
	var err error
	p.world.do(func() { conn, _, err = seen(netip.AddrPortFrom(callers[addr][0], 0), addr, within) })
	if err != nil {
		return err
	}
	defer conn.Close()
	family := netlink.InetFamily(unix.AF_INET)
	if addr == v6 {
		family = unix.AF_INET6
	}
	var flows []*netlink.ConntrackFlow
	p.pod.do(func() { flows, err = netlink.ConntrackTableList(netlink.ConntrackTable, family) })
	known := 0
	for _, f := range flows {
		if f.Forward.SrcIP.Equal(callers[addr][0].AsSlice()) {
			known++
		}
	}
	if err != nil {
		return err
	}
	if known != 1 {
		return fmt.Errorf("conntrack knows %d connections from %s", known, callers[addr][0])
	}
	return nil
}

// refusedAtOnce: where nobody listens any more the caller is told so, as the
// kernel tells the proxy. The rules that let only listening ports pass are
// bypassed for the test.
func refusedAtOnce(p *testPod, addr string) error {
	closed := netip.AddrPortFrom(netip.MustParseAddrPort(addr).Addr(), 8079).String()
	var conn *net.TCPConn
	var err error
	p.world.do(func() { conn, _, err = seen(netip.AddrPortFrom(callers[addr][1], 0), closed, within) })
	if err == nil {
		conn.Close()
		return errors.New("a closed port answers")
	}
	if !errors.Is(err, unix.ECONNRESET) {
		return err
	}
	return nil
}

// TestEachPartKeepsTheClientAddress takes one part away and wants a check to see
// that: what nothing needs has no place in a pod.
func TestEachPartKeepsTheClientAddress(t *testing.T) {
	both := []string{v4, v6}
	for name, c := range map[string]struct {
		script string
		check  clientCheck
		breaks []string
	}{
		"all there, as itself":     {"true", asItself, nil},
		"all there, same ports":    {"true", samePorts, nil},
		"all there, refused":       {"true", refusedAtOnce, nil},
		"all there, untracked":     {"true", untracked, nil},
		"no mark":                  {gone("raw", "mark set"), asItself, both},
		"tracked":                  {gone("raw", "notrack"), samePorts, both},
		"no tcp_fwmark_accept":     {"sysctl -qw net.ipv4.tcp_fwmark_accept=0", asItself, both},
		"no fwmark_reflect":        {"sysctl -qw net.ipv4.fwmark_reflect=0", refusedAtOnce, []string{v4}},
		"no fwmark_reflect, IPv6":  {"sysctl -qw net.ipv6.fwmark_reflect=0", refusedAtOnce, []string{v6}},
		"no routing rule":          {"ip -4 rule del pref 100", asItself, []string{v4}},
		"no routing rule for IPv6": {"ip -6 rule del pref 100", asItself, []string{v6}},
		"no route":                 {"ip -4 route flush table 711", asItself, []string{v4}},
		"no route for IPv6":        {"ip -6 route flush table 711", asItself, []string{v6}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newKeepingPod(t)
			p.pod.listen(t, ":8080", greet)
			p.pod.sh(t, "sysctl -qw net.ipv4.ip_local_port_range='30000 30007'; "+
				"nft add rule inet weir in tcp dport 8079 redirect to :15006; "+c.script)
			for _, addr := range both {
				err := c.check(p, addr)
				if broken := slices.Contains(c.breaks, addr); broken != (err != nil) {
					t.Errorf("%s: broken %v, want %v: %v", addr, err != nil, broken, err)
				}
				t.Logf("%s: %v", addr, err)
			}
		})
	}
}

// TestClientAddressLoop: a connection from a caller's address that comes back to
// the proxy is known as its own. It takes a namespace whose rules are half gone.
func TestClientAddressLoop(t *testing.T) {
	p := newKeepingPod(t)
	p.pod.listen(t, ":8080", greet)
	p.pod.sh(t, strings.Join([]string{gone("out", "oif"), gone("out", "cgroupv2"), gone("raw", "notrack")}, "; "))
	var err error
	p.world.do(func() { _, _, err = seen(netip.AddrPortFrom(callers[v4][1], 0), v4, within) })
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%v, want a reset", err)
	}
	p.agent.record(t, 1)
	time.Sleep(200 * time.Millisecond) // a storm would go on
	p.agent.mu.Lock()
	defer p.agent.mu.Unlock()
	reasons := map[string]int{}
	for _, r := range p.agent.records {
		reasons[r.Reason]++
	}
	if len(p.agent.records) > 4 || reasons["loop"] == 0 {
		t.Errorf("records by reason: %v", reasons)
	}
}

// later closes a connection when the pod is gone.
func (p *testPod) later(c io.Closer) { p.open = append(p.open, c) }
