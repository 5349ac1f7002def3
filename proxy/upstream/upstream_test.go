package upstream

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/sock/socktest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func listen(t *testing.T, addr string) (net.Listener, netip.AddrPort) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Skipf("no loopback of that family: %v", err)
	}
	t.Cleanup(func() { l.Close() })
	return l, l.Addr().(*net.TCPAddr).AddrPort()
}

func TestDial(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, to := listen(t, addr)
		var d Dialer
		c, err := d.Dial(t.Context(), to)
		if err != nil {
			t.Fatal(err)
		}
		accepted, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		peer := accepted.RemoteAddr().(*net.TCPAddr).AddrPort()
		if c.Local != peer || c.Remote != to {
			t.Errorf("ends %s and %s, want %s and %s", c.Local, c.Remote, peer, to)
		}
		if _, err := accepted.Write([]byte("x")); err != nil {
			t.Error(err)
		}
		if n, err := c.Read(make([]byte, 2)); n != 1 || err != nil {
			t.Errorf("read %d, %v", n, err)
		}
		accepted.Close()
		c.Close()
		if len(d.conns) != 0 {
			t.Error("addresses kept")
		}
	}
}

// TestWhatStaysInThePodIsNotPaced: what goes elsewhere is as the kernel has it.
func TestWhatStaysInThePodIsNotPaced(t *testing.T) {
	_, to := listen(t, "127.0.0.1:0")
	var d Dialer
	control := func(c *Conn, err error) (string, string) {
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return socktest.CongestionControl(t, c)
	}
	if got, _ := control(d.DialLocal(t.Context(), netip.Addr{}, to)); got != "reno" {
		t.Errorf("to the application: %s", got)
	}
	if got, want := control(d.Dial(t.Context(), to)); got != want {
		t.Errorf("elsewhere: %s, not %s", got, want)
	}
}

// TestOwn: both addresses count, and the order is the accepting side's.
func TestOwn(t *testing.T) {
	l, to := listen(t, "127.0.0.1:0")
	var d Dialer
	c, err := d.Dial(t.Context(), to)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	other := netip.MustParseAddrPort("10.0.0.1:80")
	for _, pair := range [][2]netip.AddrPort{{c.Remote, c.Local}, {c.Local, other}, {other, c.Remote}} {
		if d.Own(pair[0], pair[1], 0) {
			t.Errorf("%v is taken for our own", pair)
		}
	}
	if c.Looped() || !d.Own(c.Local, c.Remote, 0) || !c.Looped() {
		t.Error("own connection not recognised")
	}
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("it can still be read")
	}
	l.Close()
}

// TestOwnIsRaceFree: whoever accepts a connection finds its addresses noted,
// however fast it is.
func TestOwnIsRaceFree(t *testing.T) {
	l, to := listen(t, "127.0.0.1:0")
	var d Dialer
	var dials sync.WaitGroup
	const n = 2000
	dials.Go(func() {
		for range n {
			c, err := d.Dial(context.Background(), to)
			if err != nil {
				t.Errorf("dial: %v", err)
				return
			}
			_, _ = c.Read(make([]byte, 1)) // until the other end has looked
			c.Close()
		}
	})
	missed := 0
	for range n {
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if !d.Own(c.RemoteAddr().(*net.TCPAddr).AddrPort(), to, 0) {
			missed++
		}
		c.Close()
	}
	dials.Wait()
	if missed > 0 {
		t.Errorf("%d of %d not recognised", missed, n)
	}
}

func TestDialFailures(t *testing.T) {
	l, closed := listen(t, "127.0.0.1:0")
	l.Close()
	full := socktest.FullBacklog(t)
	cancelled, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	for _, c := range []struct {
		name string
		ctx  context.Context
		to   netip.AddrPort
		want reason.Reason
	}{
		{"refused", t.Context(), closed, reason.ConnectRefused},
		{"timeout", t.Context(), full, reason.ConnectTimeout},
		// Link-local and no interface named: the kernel refuses, no packet leaves.
		{"no such place", t.Context(), netip.MustParseAddrPort("[fe80::1]:80"), reason.ConnectFailed},
		{"cancelled", cancelled, full, reason.Shutdown},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := Dialer{Timeout: 200 * time.Millisecond}
			_, err := d.Dial(c.ctx, c.to)
			var e *reason.Error
			if !errors.As(err, &e) || e.Reason != c.want {
				t.Errorf("%v, want %s", err, c.want)
			}
			if len(d.conns) != 0 {
				t.Error("addresses kept")
			}
		})
	}
}

func BenchmarkDial(b *testing.B) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.(*net.TCPConn).SetLinger(0)
			c.Close()
		}
	}()
	to := l.Addr().(*net.TCPAddr).AddrPort()
	b.Run("Dialer", func(b *testing.B) {
		var d Dialer
		b.ReportAllocs()
		for b.Loop() {
			c, err := d.Dial(context.Background(), to)
			if err != nil {
				b.Fatal(err)
			}
			_ = c.SetLinger(0)
			c.Close()
		}
	})
	b.Run("net", func(b *testing.B) {
		b.ReportAllocs()
		var d net.Dialer
		d.SetMultipathTCP(false)
		for b.Loop() {
			c, err := d.Dial("tcp", to.String())
			if err != nil {
				b.Fatal(err)
			}
			_ = c.(*net.TCPConn).SetLinger(0)
			c.Close()
		}
	})
}
