package main

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/agent/journal"
	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/route"
)

var (
	service4 = netip.MustParseAddrPort("10.96.0.1:80")
	service6 = netip.MustParseAddrPort("[fd96::1]:80")
)

// sayName answers with where the connection arrived, and then echoes.
func sayName(conn *net.TCPConn) {
	defer conn.Close()
	if _, err := io.WriteString(conn, conn.LocalAddr().String()+"\n"); err != nil {
		return
	}
	_, _ = io.Copy(conn, conn)
}

func echo(conn *net.TCPConn) {
	defer conn.Close()
	_, _ = io.Copy(conn, conn)
}

// line reads up to the next line break.
func line(t testing.TB, conn net.Conn) string {
	t.Helper()
	var out []byte
	b := make([]byte, 1)
	for {
		if _, err := conn.Read(b); err != nil {
			t.Fatalf("after %q: %v", out, err)
		}
		if b[0] == '\n' {
			return string(out)
		}
		out = append(out, b[0])
	}
}

func endpoints(addrs ...string) route.Destination {
	d := route.Destination{Service: "shop/back"}
	for _, a := range addrs {
		d.Endpoints = append(d.Endpoints, route.Endpoint{Addr: netip.MustParseAddrPort(a), Pod: "shop/back-" + a})
	}
	return d
}

func TestOutboundBalanced(t *testing.T) {
	p := newTestPod(t, captured)
	p.agent.destinations = map[netip.AddrPort]route.Destination{
		service4: endpoints("10.9.0.11:8080", "10.9.0.12:8080"),
		service6: endpoints("[fd09::11]:8080", "[fd09::12]:8080"),
	}
	p.agent.connect(t, p.proxy.control)
	for _, e := range []string{"10.9.0.11:8080", "10.9.0.12:8080", "[fd09::11]:8080", "[fd09::12]:8080"} {
		p.world.listen(t, e, sayName)
	}
	for _, service := range []netip.AddrPort{service4, service6} {
		reached := map[string]int{}
		for range 20 { // all stay open, so the least loaded is always the other one
			conn := p.pod.dial(t, service.String())
			reached[line(t, conn)]++
		}
		for _, e := range p.agent.destinations[service].Endpoints {
			if n := reached[e.Addr.String()]; n != 10 {
				t.Errorf("%s: endpoint %s got %d of 20 connections, want 10", service, e.Addr, n)
			}
		}
	}

	conn := p.pod.dial(t, service4.String())
	name := line(t, conn)
	_, _ = io.WriteString(conn, "hello")
	_ = conn.CloseWrite()
	if got, err := io.ReadAll(conn); err != nil || string(got) != "hello" {
		t.Errorf("echo %q, %v", got, err)
	}
	r := p.agent.record(t, 0)
	if r.Direction != proxypb.Direction_OUTBOUND || r.ServerAddress != service4 ||
		r.Service != "shop/back" || r.UpstreamAddress.String() != name || r.UpstreamPod != "shop/back-"+name ||
		r.ClientAddress.String() != conn.LocalAddr().String() || !strings.HasPrefix(r.UpstreamLocalAddress.String(), "10.9.0.2:") ||
		r.SentBytes != 5 || r.ReceivedBytes != uint64(len(name)+1+5) || r.Reason != "" ||
		r.TotalNanos <= r.RouteNanos || r.ConnectNanos <= 0 || r.RouteNanos <= 0 {
		t.Errorf("record %v", r)
	}
}

// TestAKilledProxysLastRecordIsRead: it need not be asked for it.
func TestAKilledProxysLastRecordIsRead(t *testing.T) {
	p := newTestPod(t, captured)
	records := journalOf(t, p.proxy.control)
	defer records.Close()
	stop := p.agent.connect(t, p.proxy.control)
	p.world.listen(t, "10.9.0.1:9000", sayName)
	conn := p.pod.dial(t, "10.9.0.1:9000")
	line(t, conn)
	stop() // no agent reads
	conn.Close()
	for deadline := time.Now().Add(10 * time.Second); records.Waiting() == 0 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	p.proxy.kill()
	read := 0
	if _, err := records.Read(make([]byte, journal.MinBuffer), func(r *journal.Record) {
		read++
		if r.ServerAddress.String() != "10.9.0.1:9000" {
			t.Errorf("record %v", r)
		}
	}); err != nil || read != 1 {
		t.Errorf("%d records, %v", read, err)
	}
}

func TestOutboundPassesThrough(t *testing.T) {
	p := newTestPod(t, captured)
	p.agent.connect(t, p.proxy.control)
	for _, addr := range []string{"10.9.0.1:9000", "[fd09::1]:9000"} {
		p.world.listen(t, addr, sayName)
		if got := line(t, p.pod.dial(t, addr)); got != addr {
			t.Errorf("reached %s instead of %s", got, addr)
		}
	}
}

func TestOutboundFailures(t *testing.T) {
	p := newTestPod(t, captured)
	none := netip.MustParseAddrPort("10.96.0.2:80")
	other := netip.MustParseAddrPort("10.96.0.3:80")
	p.agent.destinations = map[netip.AddrPort]route.Destination{
		service4: endpoints("10.9.0.11:8080", "10.9.0.12:8080"), // nobody listens
		none:     {Service: "shop/empty"},
		other:    endpoints("10.9.0.11:8080", "10.9.0.12:8081"), // one does
	}
	p.agent.connect(t, p.proxy.control)
	p.world.listen(t, "10.9.0.12:8081", sayName)
	for i, c := range []struct{ addr, reason, upstream string }{
		{service4.String(), "connect_refused", "10.9.0.1"},
		{none.String(), "no_endpoints", ""},
		{"10.9.0.1:9000", "connect_refused", "10.9.0.1:9000"}, // passed through, refused there
	} {
		p.pod.expectReset(t, c.addr)
		r := p.agent.record(t, i)
		if r.Reason != c.reason || !strings.HasPrefix(r.UpstreamAddress.String(), c.upstream) || r.Error == "" {
			t.Errorf("%s: record %v", c.addr, r)
		}
	}
	for range 10 { // whichever is tried first
		if got := line(t, p.pod.dial(t, other.String())); got != "10.9.0.12:8081" {
			t.Errorf("reached %s", got)
		}
	}
}

func TestInbound(t *testing.T) {
	p := newTestPod(t, captured)
	p.agent.connect(t, p.proxy.control)
	for i, addr := range []string{"10.9.0.2:8080", "[fd09::2]:8080"} {
		p.pod.listen(t, addr, sayName)
		conn := p.world.dial(t, addr)
		if got := line(t, conn); got != addr {
			t.Errorf("reached %s instead of %s", got, addr)
		}
		_ = conn.Close()
		r := p.agent.record(t, i)
		if r.Direction != proxypb.Direction_INBOUND || r.ServerAddress.String() != addr ||
			r.UpstreamAddress.String() != addr || r.ClientAddress.String() != conn.LocalAddr().String() || r.Reason != "" {
			t.Errorf("record %v", r)
		}
	}
	if _, err := p.world.tryDial("10.9.0.2:8081"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("closed port: %v", err)
	}
}

// TestWhoMayCall: what the first config says holds for the first connection, and what
// another says ends what goes on and is not allowed any more.
func TestWhoMayCall(t *testing.T) {
	p := newTestPod(t, captured)
	allow := func(port uint16) {
		p.agent.authorization = proxypb.FromAuthorization("cluster.local", []authz.Policy{
			{Name: "shop/allow", Action: authz.Allow, Rules: []authz.Rule{{Ports: []uint16{port}}}},
		})
	}
	for _, addr := range []string{"10.9.0.2:8080", "10.9.0.2:8081"} {
		p.pod.listen(t, addr, sayName)
	}
	allow(8080)
	stop := p.agent.connect(t, p.proxy.control)
	conn := p.world.dial(t, "10.9.0.2:8080")
	if got := line(t, conn); got != "10.9.0.2:8080" {
		t.Errorf("reached %s", got)
	}
	p.world.expectReset(t, "10.9.0.2:8081")
	if r := p.agent.record(t, 0); r.Reason != "policy_denied" || r.Policy != authz.NoPolicy {
		t.Errorf("record %v", r)
	}

	stop()
	allow(8081)
	began := time.Now()
	p.agent.connect(t, p.proxy.control)
	if _, err := io.Copy(io.Discard, conn); !errors.Is(err, unix.ECONNRESET) || time.Since(began) > 5*time.Second {
		t.Errorf("%v after %s", err, time.Since(began))
	}
	if r := p.agent.record(t, 1); r.Reason != "policy_denied" || r.Policy != authz.NoPolicy {
		t.Errorf("record %v", r)
	}
	if got := line(t, p.world.dial(t, "10.9.0.2:8081")); got != "10.9.0.2:8081" {
		t.Errorf("reached %s", got)
	}
}

func TestSelfCall(t *testing.T) {
	p := newTestPod(t, captured)
	p.agent.destinations = map[netip.AddrPort]route.Destination{service4: endpoints("10.9.0.2:8080")}
	p.agent.connect(t, p.proxy.control)
	p.pod.listen(t, "10.9.0.2:8080", sayName)
	conn := p.pod.dial(t, service4.String())
	if got := line(t, conn); got != "10.9.0.2:8080" {
		t.Errorf("reached %s", got)
	}
	conn.Close()
	out, in := p.agent.record(t, 0), p.agent.record(t, 1)
	if out.Direction != proxypb.Direction_OUTBOUND || out.ServerAddress != service4 ||
		in.Direction != proxypb.Direction_INBOUND || in.ServerAddress.String() != "10.9.0.2:8080" {
		t.Errorf("records %v and %v", out, in)
	}
}

// TestLoop: without the bypass rule every connection of the proxy comes back to it.
func TestLoop(t *testing.T) {
	p := newTestPod(t, unbypassed)
	p.agent.destinations = map[netip.AddrPort]route.Destination{service4: endpoints("10.9.0.11:8080", "10.9.0.12:8080")}
	p.agent.connect(t, p.proxy.control)
	p.world.listen(t, "10.9.0.11:8080", sayName)
	p.world.listen(t, "10.9.0.12:8080", sayName)
	for _, addr := range []string{service4.String(), "10.9.0.11:8080"} {
		p.agent.mu.Lock()
		before := len(p.agent.records)
		p.agent.mu.Unlock()
		p.pod.expectReset(t, addr)
		p.agent.record(t, before+1)
		time.Sleep(200 * time.Millisecond) // a storm would go on
		p.agent.mu.Lock()
		records := p.agent.records[before:]
		if len(records) > 20 {
			t.Errorf("%s: %d accepted connections for one of the client", addr, len(records))
		}
		for _, r := range records {
			if r.Reason != "loop" {
				t.Errorf("%s: record %v", addr, r)
			}
		}
		p.agent.mu.Unlock()
	}
}

// TestDirectDial: the rules' guard is not loaded here, the proxy has its own.
func TestDirectDial(t *testing.T) {
	p := newTestPod(t, captured)
	p.agent.connect(t, p.proxy.control)
	for i, addr := range []string{"10.9.0.2:15001", "10.9.0.2:15006", "[fd09::2]:15001"} {
		p.world.expectReset(t, addr)
		if r := p.agent.record(t, i); r.Reason != "not_redirected" {
			t.Errorf("%s: record %v", addr, r)
		}
	}
}

// TestDrain: SIGTERM ends the proxy once its connections have ended, not before.
func TestDrain(t *testing.T) {
	p := newTestPod(t, captured)
	p.agent.connect(t, p.proxy.control)
	p.pod.listen(t, "10.9.0.2:8080", echo)
	conn := p.world.dial(t, "10.9.0.2:8080")
	roundTrip(t, conn, "before")
	if err := p.proxy.cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	roundTrip(t, conn, "after")

	// One that comes now is the next proxy's.
	next := p.world.dial(t, "10.9.0.2:8080")
	second := start(t, p.pod, p.cgroups, p.proxy.listeners)
	again := &fakeAgent{own: p.agent.own, mesh: p.agent.mesh}
	again.connect(t, second.control)
	roundTrip(t, next, "next")

	conn.Close()
	ended := make(chan error, 1)
	go func() { ended <- p.proxy.cmd.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("it ended with %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Error("it does not end")
	}
	// Its last words.
	p.agent.record(t, 0)
	p.agent.await(t, "the connection to be counted", func() bool {
		opened, closed := uint64(0), uint64(0)
		for _, x := range p.agent.counted {
			opened, closed = opened+x.GetOpened(), closed+x.GetClosed()
		}
		return opened == 1 && closed == 1
	})
}

// TestFailuresAndEjectionsAreTold: an endpoint that refuses again and again is set aside,
// and the agent hears of each time.
func TestFailuresAndEjectionsAreTold(t *testing.T) {
	p := newTestPod(t, captured)
	p.agent.destinations = map[netip.AddrPort]route.Destination{service4: endpoints("10.9.0.11:8080", "10.9.0.12:8080")}
	p.agent.connect(t, p.proxy.control)
	p.world.listen(t, "10.9.0.12:8080", sayName)
	for range 40 { // a random one is tried first, and the other one then
		conn := p.pod.dial(t, service4.String())
		line(t, conn)
		conn.Close()
	}
	if err := p.proxy.cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := p.proxy.cmd.Wait(); err != nil {
		t.Error(err)
	}
	p.agent.await(t, "an ejection", func() bool { return len(p.agent.ejections) > 0 })
	if e := p.agent.ejections[0]; e.GetCount() != 1 || e.GetPeers().GetService() != "shop/back" {
		t.Errorf("%v", e)
	}
	p.agent.mu.Lock()
	defer p.agent.mu.Unlock()
	failed := uint64(0)
	for _, f := range p.agent.failures {
		if failed += f.GetCount(); f.GetReason() != "connect_refused" || f.GetPeers().GetService() != "shop/back" {
			t.Errorf("%v", f)
		}
	}
	if failed != 5 { // in a row, and it is set aside
		t.Errorf("%d attempts failed", failed)
	}
}

func roundTrip(t testing.TB, conn net.Conn, s string) {
	t.Helper()
	if _, err := io.WriteString(conn, s+"\n"); err != nil {
		t.Fatal(err)
	}
	if got := line(t, conn); got != s {
		t.Errorf("echo of %q is %q", s, got)
	}
}
