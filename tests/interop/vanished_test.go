package interop

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/tests/pod"
)

// Ports of called.
const (
	lastingHTTPPort = 10300 + iota
	lastingHTTP2Port
	lastingTCPPort
	vanishingPort
)

var (
	toLastingHTTP  = declare("lasting-http", lastingHTTPPort, "http")
	toLastingHTTP2 = declare("lasting-http2", lastingHTTP2Port, "kubernetes.io/h2c")
	toLastingTCP   = declare("lasting-tcp", lastingTCPPort, "tcp")
	toVanishing    = declare("vanishing", vanishingPort, "http")
)

// TestAPeerThatVanishesIsNoticedWithinAMinute: the kernel asks for it, on both ends of
// both proxies, whatever the connection carries.
func TestAPeerThatVanishesIsNoticedWithinAMinute(t *testing.T) {
	throughBoth(t)
	t.Parallel()
	for name, c := range map[string]struct {
		to   netip.AddrPort
		port uint16
		call func(t *testing.T, to netip.AddrPort, port uint16)
	}{
		"HTTP/1": {toLastingHTTP, lastingHTTPPort, lastingHTTP(1)},
		"HTTP/2": {toLastingHTTP2, lastingHTTP2Port, lastingHTTP(2)},
		"TCP":    {toLastingTCP, lastingTCPPort, lastingTCP},
	} {
		t.Run(name, func(t *testing.T) {
			c.call(t, c.to, c.port)
			near, far := proxyOf(t, caller), proxyOf(t, called)
			keptAlive(t, near, "what the caller's proxy accepted", acceptedFor(c.to))
			keptAlive(t, near, "what the caller's proxy dialled", dialled(on(c.port)))
			keptAlive(t, far, "what the application's proxy accepted", acceptedFor(on(c.port)))
			keptAlive(t, far, "what the application's proxy dialled", dialled(on(c.port)))
		})
	}
}

// keptAlive wants a process to have one socket of that kind, whose options notice within
// a minute that the peer is gone.
func keptAlive(t *testing.T, pid int, what string, is func(fd int) bool) {
	t.Helper()
	fd := socketOf(t, pid, what, is)
	defer unix.Close(fd)
	option := func(level, name int) int {
		value, err := unix.GetsockoptInt(fd, level, name)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		return value
	}
	on, idle := option(unix.SOL_SOCKET, unix.SO_KEEPALIVE), option(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE)
	interval, count := option(unix.IPPROTO_TCP, unix.TCP_KEEPINTVL), option(unix.IPPROTO_TCP, unix.TCP_KEEPCNT)
	noticed := idle + interval*count
	// Where this is set it counts, and not how many probes there were (tcp(7)).
	if limit := option(unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT); limit > 0 {
		for noticed = idle + interval; noticed*1000 < limit; {
			noticed += interval
		}
	}
	if on != 1 || noticed >= 60 {
		t.Errorf("%s: SO_KEEPALIVE %d, noticed after %d s: idle for %d, then asked %d times every %d", what, on, noticed, idle, count, interval)
	}
}

// dialled tells sockets that lead somewhere.
func dialled(to netip.AddrPort) func(fd int) bool {
	return func(fd int) bool {
		peer, err := unix.Getpeername(fd)
		return err == nil && ofSockaddr(peer) == to
	}
}

// acceptedFor tells sockets of connections that went somewhere and were turned aside.
// By their peers they cannot be told: conntrack gives some another port.
func acceptedFor(original netip.AddrPort) func(fd int) bool {
	return func(fd int) bool {
		local, err := unix.Getsockname(fd)
		if err != nil {
			return false
		}
		port := ofSockaddr(local).Port()
		if port != capture.DefaultOutboundPort && port != capture.DefaultInboundPort {
			return false
		}
		went, err := pod.OriginalDestination(fd, false)
		return err == nil && went == original
	}
}

// socketOf is a copy of another process's one socket of a kind.
func socketOf(t *testing.T, pid int, what string, is func(fd int) bool) int {
	t.Helper()
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(process)
	found := -1
	for _, n := range descriptors(t, pid) {
		fd, err := unix.PidfdGetfd(process, n, 0)
		if errors.Is(err, unix.EBADF) {
			continue // closed meanwhile
		}
		if err != nil {
			t.Fatal(err)
		}
		if !is(fd) {
			unix.Close(fd)
			continue
		}
		if found >= 0 {
			t.Fatalf("%s: there are two", what)
		}
		found = fd
	}
	if found < 0 {
		t.Fatalf("%s: there is none", what)
	}
	return found
}

func ofSockaddr(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// lastingHTTP has a request answered in a version of HTTP, by a connection that stays.
func lastingHTTP(version int) func(*testing.T, netip.AddrPort, uint16) {
	return func(t *testing.T, to netip.AddrPort, port uint16) {
		t.Helper()
		var protocols http.Protocols
		protocols.SetHTTP1(version == 1)
		protocols.SetUnencryptedHTTP2(version == 2)
		server := &http.Server{Protocols: &protocols, Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})}
		l := listen(t, port)
		go func() { _ = server.Serve(l) }()
		t.Cleanup(func() { server.Close() })

		transport := &http.Transport{Protocols: &protocols, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dial(ctx, to.String())
		}}
		t.Cleanup(transport.CloseIdleConnections)
		client := &http.Client{Transport: transport, Timeout: patience}
		response, err := client.Get("http://" + to.String() + "/")
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != http.StatusOK || response.ProtoMajor != version {
			t.Fatalf("answered %s in %s", response.Status, response.Proto)
		}
	}
}

// lastingTCP has a line echoed by a connection that stays.
func lastingTCP(t *testing.T, to netip.AddrPort, port uint16) {
	t.Helper()
	l := listen(t, port)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = io.Copy(conn, conn)
	}()
	conn, err := dial(t.Context(), to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, "hello\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
}

// TestAProxyThatVanishesIsMissed: nothing says so, as when a node loses its power. What
// waits for it is answered, though no request has a time limit, and what comes later does
// not wait for the same connection.
func TestAProxyThatVanishesIsMissed(t *testing.T) {
	onNode(t)
	t.Parallel()
	app := holdRequests(t, vanishingPort)
	waiting, client := ask(t, caller, toVanishing), ask(t, caller, toVanishing)
	client.expect(t, "/", 200, "")
	waiting.send(t, "/hold")
	app.await(t, 1)

	nft(t, called, fmt.Sprintf("table inet vanished { chain in { type filter hook prerouting priority raw; tcp dport %d drop; }; }", vanishingPort))
	restore := once(t, func() { nft(t, called, "delete table inet vanished") })
	client.send(t, "/")
	for name, c := range map[string]*asking{"who waited for an answer": waiting, "who asked then": client} {
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		response, err := http.ReadResponse(c.r, nil)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		response.Body.Close()
		if response.StatusCode < 500 {
			t.Errorf("%s: %s", name, response.Status)
		}
	}
	ask(t, caller, toVanishing).expect(t, "/", 503, "weir; error=connection_timeout; details=\"connect_timeout: ")
	restore()
	ask(t, caller, toVanishing).expect(t, "/", 200, "")
}
