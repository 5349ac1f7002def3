package listen

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/sock/socktest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func wrap(t *testing.T, addr string) (*Listener, net.Addr) {
	t.Helper()
	return wrapAs(t, Inbound, addr)
}

func wrapAs(t *testing.T, d Direction, addr string) (*Listener, net.Addr) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Skipf("no loopback of that family: %v", err)
	}
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	wrapped, err := New(d, int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { wrapped.Close() })
	return wrapped, l.Addr()
}

// TestCongestionControl: what the pod's own application says is not paced; what comes from
// elsewhere goes as the pod's kernel says.
func TestCongestionControl(t *testing.T) {
	control := func(d Direction) (string, string) {
		l, to := wrapAs(t, d, "127.0.0.1:0")
		client, err := net.Dial("tcp", to.String())
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		c, err := l.Accept(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return socktest.CongestionControl(t, c)
	}
	if got, _ := control(Outbound); got != "reno" {
		t.Errorf("outbound: %s", got)
	}
	if got, want := control(Inbound); got != want {
		t.Errorf("inbound: %s, not %s", got, want)
	}
}

// TestAcceptDirect: without a redirect the original destination is the listener.
func TestAcceptDirect(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, to := wrap(t, addr)
		client, err := net.Dial("tcp", to.String())
		if err != nil {
			t.Fatal(err)
		}
		c, err := l.Accept(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if !c.Direct || c.Original.String() != to.String() || c.Peer.String() != client.LocalAddr().String() || c.Direction != Inbound {
			t.Errorf("%s: %+v", addr, c)
		}
		var idle int
		raw, err := c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		_ = raw.Control(func(fd uintptr) { idle, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPIDLE) })
		if err != nil || idle != 30 {
			t.Errorf("keepalive after %d s, %v", idle, err)
		}
		client.Close()
		c.Close()
	}
}

// TestWhatCameAsTheListenerClosesIsServed: that its spare descriptor is gone by then says
// nothing of how many there are.
func TestWhatCameAsTheListenerClosesIsServed(t *testing.T) {
	l, to := wrap(t, "127.0.0.1:0")
	client, err := net.Dial("tcp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	l.spare.end() // as Close begins
	c, err := l.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if c.Shed {
		t.Error("it is shed")
	}
}

// TestAcceptExhausted: without descriptors it waits, and goes on when there are.
func TestAcceptExhausted(t *testing.T) {
	l, to := wrap(t, "127.0.0.1:0")
	client, err := net.Dial("tcp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	var was, usage unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	usage = unix.Rlimit{Cur: 3, Max: was.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &usage); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	before := cpuTime(t)
	_, err = l.Accept(ctx)
	spent := cpuTime(t) - before
	time.AfterFunc(50*time.Millisecond, func() { _ = unix.Setrlimit(unix.RLIMIT_NOFILE, &was) })
	if !errors.Is(err, context.DeadlineExceeded) || spent > 50*time.Millisecond {
		t.Errorf("%v after %s of CPU", err, spent)
	}
	c, err := l.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// TestWhatHasWaitedForADescriptorIsShed: one after the other, and what comes when
// there are some again is not.
func TestWhatHasWaitedForADescriptorIsShed(t *testing.T) {
	l, to := wrap(t, "127.0.0.1:0")
	var clients []net.Conn
	for range 4 {
		client, err := net.Dial("tcp", to.String())
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		clients = append(clients, client)
	}
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	free, err := unix.Dup(0)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(free)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(free), Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	l.short = time.Now().Add(-patience)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var shed []Conn
	for range 3 {
		c, err := l.Accept(ctx)
		if err != nil {
			break
		}
		shed = append(shed, c)
		c.Close()
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if len(shed) != 3 {
		t.Fatalf("%d of 3 accepted", len(shed))
	}
	for i, c := range shed {
		if !c.Shed || c.Peer.String() != clients[i].LocalAddr().String() || c.Original.String() != to.String() {
			t.Errorf("%+v", c)
		}
	}
	c, err := l.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if c.Shed {
		t.Error("there are descriptors, and a connection is shed")
	}
	if !l.short.IsZero() {
		t.Error("there are descriptors, and the listener has not noticed")
	}
}

func cpuTime(t *testing.T) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func TestParseDirection(t *testing.T) {
	for _, d := range []Direction{Outbound, Inbound} {
		if got, err := ParseDirection(d.String()); err != nil || got != d {
			t.Errorf("%s: %v, %v", d, got, err)
		}
	}
	if _, err := ParseDirection("admin"); err == nil {
		t.Error("admin parsed")
	}
}
