package mtls_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/mtls"
	"github.com/weirmesh/weir/proxy/mtls/mtlstest"
)

// joined are the two ends of a connection.
func joined(t testing.TB) (*mtls.Conn, *mtls.Conn) {
	t.Helper()
	ca := mtlstest.NewCA(t)
	client, server := meet(t, ca.Identity(front, nil), ca.Identity(back, nil), back)
	if client.err != nil || server.err != nil {
		t.Fatal(client.err, server.err)
	}
	for _, c := range []*mtls.Conn{client.conn, server.conn} {
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	}
	return client.conn, server.conn
}

// TestBytesArriveAsTheyWere: both ways at once, in pieces of all sizes, and each
// direction ends by itself.
func TestBytesArriveAsTheyWere(t *testing.T) {
	client, server := joined(t)
	all := make([]byte, 8<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(all)
	type heard struct {
		sum [32]byte
		n   int
		err error
	}
	talk := func(c *mtls.Conn, seed uint64, got chan<- heard) {
		go func() {
			sizes := rand.New(rand.NewPCG(seed, 0))
			for rest := all; len(rest) > 0; {
				n := min(1+sizes.IntN(1<<sizes.IntN(20)), len(rest))
				if _, err := c.Write(rest[:n]); err != nil {
					t.Error(err)
				}
				rest = rest[n:]
			}
			if err := c.CloseWrite(); err != nil {
				t.Error(err)
			}
		}()
		b, err := io.ReadAll(c)
		got <- heard{sha256.Sum256(b), len(b), err}
	}
	got := make(chan heard, 2)
	go talk(client, 1, got)
	go talk(server, 2, got)
	want := heard{sha256.Sum256(all), len(all), nil}
	for range 2 {
		if h := <-got; h != want {
			t.Errorf("%d bytes of %d, %v", h.n, want.n, h.err)
		}
	}
}

// TestAllThatIsThereIsReadAtOnce: in however many records, and nothing has to come for it.
func TestAllThatIsThereIsReadAtOnce(t *testing.T) {
	client, server := joined(t)
	for _, pieces := range [][]string{{"one"}, {"one", "two", "three"}, {string(make([]byte, 16<<10)), "and more"}} {
		want, there := "", 0
		for _, p := range pieces {
			if n, err := client.WriteNow([]byte(p)); n != len(p) || err != nil || client.Unsent() {
				t.Fatalf("%d of %d bytes are written, %v", n, len(p), err)
			}
			want += p
			there += len(p) + 22 // a header, the record's kind, and a tag (RFC 8446, section 5.2)
		}
		await(t, server, there)
		got := make([]byte, 64<<10)
		n, err := server.ReadNow(got)
		if err != nil || string(got[:n]) != want {
			t.Errorf("of %d bytes in %d records %d are read, %v", len(want), len(pieces), n, err)
		}
	}
}

// await returns once so many bytes are there to be read of the socket.
func await(t *testing.T, c *mtls.Conn, want int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		n := 0
		if failed := raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) }); failed != nil || err != nil {
			t.Fatal(failed, err)
		}
		if n >= want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d bytes are there", n, want)
		}
	}
}

// TestAnEndThatWasNotAnnouncedIsNone: somebody on the way may have made it.
func TestAnEndThatWasNotAnnouncedIsNone(t *testing.T) {
	client, server := joined(t)
	if _, err := client.Write([]byte("some of it")); err != nil {
		t.Fatal(err)
	}
	client.Close()
	got, err := io.ReadAll(server)
	if string(got) != "some of it" || !errors.Is(err, mtls.ErrTruncated) {
		t.Errorf("%q, %v", got, err)
	}
}

// TestLookingTakesNothing: what Peek finds is read afterwards.
func TestLookingTakesNothing(t *testing.T) {
	client, server := joined(t)
	var look [16]byte
	if n, err := server.Peek(look[:]); n != 0 || !errors.Is(err, unix.EAGAIN) {
		t.Fatal(n, err)
	}
	want := bytes.Repeat([]byte("0123456789abcdef"), 10<<10)
	go func() {
		_, _ = client.Write(want)
		_ = client.CloseWrite()
	}()
	got := make([]byte, 0, len(want))
	for {
		raw, err := server.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if err := raw.Read(func(uintptr) bool {
			n, err := server.Peek(look[:])
			if seen := want[len(got):]; err == nil && !bytes.HasPrefix(seen, look[:n]) {
				t.Errorf("after %d bytes it saw %q", len(got), look[:n])
			}
			return !errors.Is(err, unix.EAGAIN)
		}); err != nil {
			t.Fatal(err)
		}
		n, err := server.ReadNow(got[len(got):min(len(got)+777, cap(got))])
		if got = got[:len(got)+n]; err != nil {
			t.Fatal(err)
		}
		if len(got) == len(want) {
			break
		}
	}
	if !bytes.Equal(got, want) {
		t.Error("other bytes")
	}
	if n, err := server.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("%d, %v", n, err)
	}
	if n, err := server.Peek(look[:]); n != 0 || err != nil {
		t.Errorf("an end is seen as %d bytes, %v", n, err)
	}
}

// TestAPeerThatDoesNotReadIsWaitedFor, and what waits is bounded.
func TestAPeerThatDoesNotReadIsWaitedFor(t *testing.T) {
	client, server := joined(t)
	block := make([]byte, 1<<20)
	sent, idle := 0, 0
	for idle < 3 {
		n, err := client.WriteNow(block)
		if sent += n; err == nil {
			idle = 0
			continue
		}
		if !errors.Is(err, unix.EAGAIN) {
			t.Fatal(err)
		}
		idle++
	}
	if !client.Unsent() {
		t.Error("all is sent")
	}
	got := make(chan int64, 1)
	go func() {
		n, _ := io.Copy(io.Discard, struct{ io.Reader }{server})
		got <- n
	}()
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if n := <-got; n != int64(sent) || client.Unsent() {
		t.Errorf("%d bytes came of %d", n, sent)
	}
}

// TestAnIdleConnectionIsSmall, after it has carried much.
func TestAnIdleConnectionIsSmall(t *testing.T) {
	const pairs, limit = 50, 25 << 10
	heap := func() int64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc + m.StackInuse)
	}
	ca := mtlstest.NewCA(t)
	one, other := ca.Identity(front, nil), ca.Identity(back, nil)
	keep := make([]*mtls.Conn, 0, 2*pairs)
	block, got := make([]byte, 1<<20), make([]byte, 1<<20)
	before := heap()
	for range pairs {
		client, server := meet(t, one, other, back)
		if client.err != nil || server.err != nil {
			t.Fatal(client.err, server.err)
		}
		go func() { _, _ = client.conn.Write(block) }()
		if _, err := io.ReadFull(server.conn, got); err != nil {
			t.Fatal(err)
		}
		keep = append(keep, client.conn, server.conn)
	}
	each := (heap() - before) / (2 * pairs)
	t.Logf("%d bytes for each idle connection", each)
	if each > limit {
		t.Errorf("%d bytes for each idle connection, want at most %d", each, limit)
	}
	runtime.KeepAlive(keep)
}
