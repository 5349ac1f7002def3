package interop

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Ports of called.
const (
	lastingHTTPPort = 10300 + iota
	lastingHTTP2Port
	lastingTCPPort
)

var (
	toLastingHTTP  = declare("lasting-http", lastingHTTPPort, "http")
	toLastingHTTP2 = declare("lasting-http2", lastingHTTP2Port, "kubernetes.io/h2c")
	toLastingTCP   = declare("lasting-tcp", lastingTCPPort, "tcp")
)

// TestAPeerThatVanishesIsNoticedWithinAMinute: the kernel asks for it, on both ends of
// both proxies, whatever the connection carries.
func TestAPeerThatVanishesIsNoticedWithinAMinute(t *testing.T) {
	throughBoth(t)
	t.Parallel()
	for name, c := range map[string]struct {
		to   netip.AddrPort
		port uint16
		call func(t *testing.T, to netip.AddrPort, port uint16) net.Conn
	}{
		"HTTP/1": {toLastingHTTP, lastingHTTPPort, lastingHTTP(1)},
		"HTTP/2": {toLastingHTTP2, lastingHTTP2Port, lastingHTTP(2)},
		"TCP":    {toLastingTCP, lastingTCPPort, lastingTCP},
	} {
		t.Run(name, func(t *testing.T) {
			client := c.call(t, c.to, c.port).LocalAddr().(*net.TCPAddr).AddrPort()
			near, far := proxyOf(t, caller), proxyOf(t, called)
			keptAlive(t, near, "what the caller's proxy accepted", client)
			between := keptAlive(t, near, "what the caller's proxy dialled", on(c.port))
			keptAlive(t, far, "what the application's proxy accepted", between)
			keptAlive(t, far, "what the application's proxy dialled", on(c.port))
		})
	}
}

// keptAlive wants a process to have one socket with that peer, whose options notice
// within a minute that the peer is gone, and returns its own address.
func keptAlive(t *testing.T, pid int, what string, peer netip.AddrPort) netip.AddrPort {
	t.Helper()
	fd := socketTo(t, pid, what, peer)
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
	local, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return ofSockaddr(local)
}

// socketTo is a copy of another process's one socket with that peer.
func socketTo(t *testing.T, pid int, what string, peer netip.AddrPort) int {
	t.Helper()
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(process)
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	found := -1
	for _, entry := range fds {
		n, err := strconv.Atoi(entry.Name())
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.PidfdGetfd(process, n, 0)
		if errors.Is(err, unix.EBADF) {
			continue // closed meanwhile
		}
		if err != nil {
			t.Fatal(err)
		}
		to, err := unix.Getpeername(fd)
		if err != nil || ofSockaddr(to) != peer {
			unix.Close(fd) // what is no socket among them
			continue
		}
		if found >= 0 {
			t.Fatalf("%s: two sockets have the peer %s", what, peer)
		}
		found = fd
	}
	if found < 0 {
		t.Fatalf("%s: no socket has the peer %s", what, peer)
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
func lastingHTTP(version int) func(*testing.T, netip.AddrPort, uint16) net.Conn {
	return func(t *testing.T, to netip.AddrPort, port uint16) net.Conn {
		t.Helper()
		var protocols http.Protocols
		protocols.SetHTTP1(version == 1)
		protocols.SetUnencryptedHTTP2(version == 2)
		server := &http.Server{Protocols: &protocols, Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})}
		l := listen(t, port)
		go func() { _ = server.Serve(l) }()
		t.Cleanup(func() { server.Close() })

		var conn net.Conn
		transport := &http.Transport{Protocols: &protocols, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var err error
			conn, err = dial(ctx, to.String())
			return conn, err
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
		return conn
	}
}

// lastingTCP has a line echoed by a connection that stays.
func lastingTCP(t *testing.T, to netip.AddrPort, port uint16) net.Conn {
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
	return conn
}
