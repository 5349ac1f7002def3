package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// through gives both ends, the client's first, of a connection from the pod to the world, or, inbound,
// from the world to the pod.
func through(t *testing.T, inbound bool) (*net.TCPConn, *net.TCPConn, *testPod) {
	t.Helper()
	return newTestPod(t, captured).through(t, inbound)
}

func (p *testPod) through(t *testing.T, inbound bool) (*net.TCPConn, *net.TCPConn, *testPod) {
	t.Helper()
	p.agent.connect(t, p.proxy.control)
	from, to, addr := p.pod, p.world, "10.9.0.1:9000"
	if inbound {
		from, to, addr = p.world, p.pod, "10.9.0.2:9000"
	}
	accepted := make(chan *net.TCPConn, 1)
	to.listen(t, addr, func(c *net.TCPConn) { accepted <- c })
	client := from.dial(t, addr)
	var server *net.TCPConn
	select {
	case server = <-accepted:
	case <-time.After(5 * time.Second):
		t.Fatal("not connected")
	}
	t.Cleanup(func() { server.Close() })
	_ = server.SetDeadline(time.Now().Add(30 * time.Second))
	return client, server, p
}

func bothWays(t *testing.T, test func(t *testing.T, inbound bool)) {
	t.Run("outbound", func(t *testing.T) { test(t, false) })
	t.Run("inbound", func(t *testing.T) { test(t, true) })
}

func TestHalfClose(t *testing.T) { bothWays(t, testHalfClose) }

func testHalfClose(t *testing.T, inbound bool) {
	client, server, p := through(t, inbound)
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if n, err := server.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Fatalf("the server sees %d, %v instead of the end", n, err)
	}
	time.Sleep(1500 * time.Millisecond) // idle
	if _, err := io.WriteString(server, "still here\n"); err != nil {
		t.Fatal(err)
	}
	if got := line(t, client); got != "still here" {
		t.Errorf("got %q", got)
	}
	server.Close()
	if n, err := client.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("the client sees %d, %v instead of the end", n, err)
	}
	if r := p.agent.record(t, 0); r.Reason != "" || r.ReceivedBytes != 11 {
		t.Errorf("record %v", r)
	}
}

func TestReset(t *testing.T) { bothWays(t, testReset) }

func testReset(t *testing.T, inbound bool) {
	for _, c := range []struct {
		name       string
		serverEnds bool
		halfClosed bool
		reason     string
	}{
		{"upstream", true, false, "upstream_closed"},
		{"client", false, false, "client_gone"},
		{"upstream after its end", true, true, "upstream_closed"},
		{"client after its end", false, true, "client_gone"},
	} {
		t.Run(c.name, func(t *testing.T) {
			client, server, p := through(t, inbound)
			breaks, sees := client, server
			if c.serverEnds {
				breaks, sees = server, client
			}
			if c.halfClosed {
				_ = breaks.CloseWrite()
				if n, err := sees.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
					t.Fatalf("%d, %v instead of the end", n, err)
				}
			}
			_ = breaks.SetLinger(0)
			breaks.Close()
			if c.halfClosed {
				// A reader would see nothing but the end it has seen.
				time.Sleep(100 * time.Millisecond)
				raw, _ := sees.SyscallConn()
				_ = raw.Control(func(fd uintptr) {
					errno, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
					if err != nil || errno == 0 {
						t.Errorf("the other end has no error, %v", err)
					}
				})
			} else if _, err := sees.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("the other end sees %v, want a reset", err)
			}
			if r := p.agent.record(t, 0); r.Reason != c.reason {
				t.Errorf("record %v, want %s", r, c.reason)
			}
		})
	}
}

func TestBulk(t *testing.T) { bothWays(t, testBulk) }

func testBulk(t *testing.T, inbound bool) {
	client, server, p := through(t, inbound)
	bulk(t, client, server, p, 100<<20)
}

// TestLinksOfOtherSizes: packets that are smaller or larger than usual carry the same
// bytes.
func TestLinksOfOtherSizes(t *testing.T) {
	for _, mtu := range []string{"1400", "9000"} {
		t.Run(mtu, func(t *testing.T) {
			bothWays(t, func(t *testing.T, inbound bool) {
				p := newTestPod(t, captured)
				for _, ns := range []*namespace{p.pod, p.world} {
					ns.sh(t, "ip link set eth0 mtu "+mtu)
				}
				client, server, _ := p.through(t, inbound)
				bulk(t, client, server, p, 10<<20)
			})
		})
	}
}

// bulk sends that many bytes each way, at once.
func bulk(t *testing.T, client, server *net.TCPConn, p *testPod, size int64) {
	t.Helper()
	sums := make(chan [32]byte, 4)
	send := func(conn *net.TCPConn, seed uint64) {
		h := sha256.New()
		r := rand.NewChaCha8([32]byte{byte(seed)})
		if _, err := io.CopyN(io.MultiWriter(conn, h), r, size); err != nil {
			t.Errorf("send: %v", err)
		}
		_ = conn.CloseWrite()
		sums <- [32]byte(h.Sum(nil))
	}
	receive := func(conn *net.TCPConn) {
		h := sha256.New()
		if n, err := io.Copy(h, conn); n != size || err != nil {
			t.Errorf("received %d bytes, %v", n, err)
		}
		sums <- [32]byte(h.Sum(nil))
	}
	began := time.Now()
	go send(client, 1)
	go send(server, 2)
	go receive(client)
	go receive(server)
	seen := map[[32]byte]int{}
	for range 4 {
		seen[<-sums]++
	}
	t.Logf("2 × %d MB in %s", size>>20, time.Since(began))
	if len(seen) != 2 {
		t.Error("not the same bytes")
	}
	if r := p.agent.record(t, 0); r.SentBytes != uint64(size) || r.ReceivedBytes != uint64(size) {
		t.Errorf("record %v", r)
	}
}

func TestUrgent(t *testing.T) { bothWays(t, testUrgent) }

func testUrgent(t *testing.T, inbound bool) {
	client, server, _ := through(t, inbound)
	for _, ends := range [][2]*net.TCPConn{{client, server}, {server, client}} {
		from, to := ends[0], ends[1]
		onSocket(t, to, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) })
		before, after := bytes.Repeat([]byte("a"), 1000), bytes.Repeat([]byte("b"), 1<<20)
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			_, _ = from.Write(before)
			onSocket(t, from, func(fd int) error { return unix.Send(fd, []byte("!"), unix.MSG_OOB) })
			_, _ = from.Write(after)
		}()
		got := make([]byte, len(before))
		if _, err := io.ReadFull(to, got); err != nil || !bytes.Equal(got, before) {
			t.Fatalf("before the urgent byte: %v", err)
		}
		// It is still an urgent one here.
		atMark := 0
		for range 200 {
			onSocket(t, to, func(fd int) error {
				var err error
				atMark, err = unix.IoctlGetInt(fd, unix.SIOCATMARK)
				return err
			})
			if atMark != 0 {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
		if atMark == 0 {
			t.Error("the byte is not urgent any more")
		}
		got = make([]byte, 1+len(after))
		if _, err := io.ReadFull(to, got); err != nil || !bytes.Equal(got, append([]byte("!"), after...)) {
			t.Fatalf("from the urgent byte on: %v", err)
		}
		<-sent
	}
}

func onSocket(t *testing.T, conn *net.TCPConn, f func(fd int) error) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failed error
	if err := errors.Join(raw.Control(func(fd uintptr) { failed = f(int(fd)) }), failed); err != nil {
		t.Error(err)
	}
}

// TestUrgentAtTheEnd: an urgent byte and the end arrive together.
func TestUrgentAtTheEnd(t *testing.T) {
	client, server, _ := through(t, false)
	onSocket(t, server, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) })
	onSocket(t, client, func(fd int) error { return unix.Send(fd, []byte("bye!"), unix.MSG_OOB) })
	_ = client.CloseWrite()
	if got, err := io.ReadAll(server); err != nil || string(got) != "bye!" {
		t.Errorf("got %q, %v", got, err)
	}
}
