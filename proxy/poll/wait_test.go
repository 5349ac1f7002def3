package poll

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/sock"
)

// long is a wait that makes 100 of them take longer than a test may.
const long = time.Second

// onOne has the process use one processor until the test ends.
func onOne(t *testing.T) {
	t.Helper()
	before := runtime.GOMAXPROCS(1)
	t.Cleanup(func() { runtime.GOMAXPROCS(before) })
}

// busy is a running Poller with a socket for which something comes whenever it is asked.
type busy struct {
	*Poller
	t     *testing.T
	heard *told
	far   int
	end   func()
}

// newBusy makes one that waits for so long at a time while it is hot.
func newBusy(t *testing.T, most time.Duration) *busy {
	t.Helper()
	fd, far := pair(t)
	p, end := running(t, most)
	b := &busy{p, t, &told{fd, make(chan string, 8)}, far, end}
	if err := p.Add(fd, b.heard); err != nil {
		t.Fatal(err)
	}
	return b
}

// work has so many things come, one after the other, as soon as what was before is told.
func (b *busy) work(times int) {
	b.t.Helper()
	for range times {
		_, _ = sock.Write(uintptr(b.far), []byte("work"))
		hears(b.t, b.heard, "work")
	}
}

// wasHot ends it, and reports whether it was hot then.
func (b *busy) wasHot() bool {
	b.end()
	return b.waits.hot
}

func TestAPollerThatHasMuchToDoKeepsTheProcessor(t *testing.T) {
	onOne(t)
	b := newBusy(t, long)
	b.work(100)
	if !b.wasHot() {
		t.Error("it waits as goroutines do")
	}
}

func TestAPollerKeepsNoneOfTwo(t *testing.T) {
	onOne(t)
	b := newBusy(t, long)
	b.work(100)
	runtime.GOMAXPROCS(2)
	b.work(100)
	if b.wasHot() {
		t.Error("it keeps a processor that others could use")
	}
}

func TestAPollerKeepsNoProcessorThatAnotherOneNeeds(t *testing.T) {
	onOne(t)
	b, another := newBusy(t, patience), newBusy(t, patience)
	b.work(100)
	for range 20 {
		another.work(1)
		b.work(20)
	}
	if b.wasHot() || another.wasHot() {
		t.Error("it keeps the processor")
	}
	third := newBusy(t, patience)
	third.work(100)
	if third.wasHot() {
		t.Error("it keeps the processor as soon as another one is silent")
	}
	time.Sleep(2 * calm)
	fourth := newBusy(t, patience)
	fourth.work(100)
	if !fourth.wasHot() {
		t.Error("it waits as goroutines do though there is no other one")
	}
}

func TestAPollerThatHasLittleToDoGivesTheProcessorBack(t *testing.T) {
	onOne(t)
	b := newBusy(t, patience)
	for range 5 {
		b.work(100)
		time.Sleep(20 * patience)
	}
	b.work(1) // as goroutines do, and hears of it
	if b.wasHot() {
		t.Error("it keeps the processor")
	}
}

// TestOthersAreServedWhileAPollerKeepsTheProcessor is of a goroutine that waits for a
// connection, and of one that waits for a listener. The runtime's monitor would have their
// turn come after 10 ms; in the process that this is done in it may interrupt nobody.
func TestOthersAreServedWhileAPollerKeepsTheProcessor(t *testing.T) {
	if os.Getenv("GODEBUG") != "asyncpreemptoff=1" {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		again := exec.CommandContext(ctx, os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
		again.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1")
		out, err := again.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
			t.Errorf("others were not served: %v\n%s", err, out)
		}
		return
	}
	onOne(t)
	b := newBusy(t, long)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	Waited(l.(*net.TCPListener))
	var echoes sync.WaitGroup
	defer echoes.Wait()
	echoes.Go(func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		Waited(c.(*net.TCPConn))
		_, _ = io.Copy(c, c)
	})
	client, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(client)
	b.work(100)
	addr := l.Addr().(*net.TCPAddr)
	if err := unix.Connect(client, &unix.SockaddrInet4{Port: addr.Port, Addr: [4]byte(addr.IP.To4())}); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 4)
	for range 100 {
		if _, err := sock.Write(uintptr(client), []byte("echo")); err != nil {
			t.Fatal(err)
		}
		// The first is heard of after it, and wakes this goroutine: it is there.
		for n := 0; n < len(answer); {
			b.work(1)
			m, err := sock.Read(uintptr(client), answer[n:])
			if err != nil && !errors.Is(err, unix.EAGAIN) {
				t.Fatal(err)
			}
			n += m
		}
		b.work(20)
	}
	if !b.wasHot() {
		t.Error("it did not keep the processor")
	}
}

// TestAPollerThatKeepsTheProcessorKeepsNoCollectionWaiting until it has waited.
func TestAPollerThatKeepsTheProcessorKeepsNoCollectionWaiting(t *testing.T) {
	onOne(t)
	b := newBusy(t, time.Hour)
	for range 5 {
		b.work(50)
		runtime.GC()
	}
}
