package poll

import (
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// told is a handler that reads all there is and passes it on.
type told struct {
	fd    int
	heard chan string
}

func (h *told) Ready(ended bool) {
	buf := make([]byte, 64)
	for {
		n, err := unix.Read(h.fd, buf)
		if n <= 0 {
			if n == 0 && err == nil && ended {
				h.heard <- "end"
			}
			return
		}
		h.heard <- string(buf[:n])
	}
}

// running is a Poller that runs until the test ends, or before that until what it returns is called.
// While it is hot it waits for so long at a time.
func running(t *testing.T, most time.Duration) (*Poller, func()) {
	t.Helper()
	p, err := New(nil)
	if err != nil {
		t.Fatal(err)
	}
	p.waits.most = most
	var done sync.WaitGroup
	done.Go(p.Run)
	end := func() {
		p.Close()
		done.Wait()
	}
	t.Cleanup(end)
	return p, end
}

// pair is a socket, and its other end, which the test writes to; neither blocks.
// They are closed after what is made later.
func pair(t *testing.T) (int, int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.Close(fds[0])
		unix.Close(fds[1])
	})
	return fds[0], fds[1]
}

func hears(t *testing.T, h *told, want string) {
	t.Helper()
	select {
	case got := <-h.heard:
		if got != want {
			t.Errorf("heard %q, want %q", got, want)
		}
	case <-time.After(10 * time.Second):
		t.Fatalf("heard nothing, want %q", want)
	}
}

func TestWhatComesIsTold(t *testing.T) {
	fd, far := pair(t)
	p, _ := running(t, patience)
	h := &told{fd, make(chan string, 8)}
	_, _ = unix.Write(far, []byte("before"))
	if err := p.Add(fd, h); err != nil {
		t.Fatal(err)
	}
	hears(t, h, "before")
	for range 1000 {
		_, _ = unix.Write(far, []byte("more"))
		hears(t, h, "more")
	}
	_ = unix.Shutdown(far, unix.SHUT_WR)
	hears(t, h, "end")
}

func TestNobodyIsToldOfASocketThatIsRemoved(t *testing.T) {
	fd, far := pair(t)
	p, _ := running(t, patience)
	h := &told{fd, make(chan string, 8)}
	if err := p.Add(fd, h); err != nil {
		t.Fatal(err)
	}
	p.Remove(fd)
	_, _ = unix.Write(far, []byte("gone"))
	again := &told{fd, make(chan string, 8)}
	if err := p.Add(fd, again); err != nil { // with the same descriptor
		t.Fatal(err)
	}
	hears(t, again, "gone")
	if len(h.heard) > 0 {
		t.Errorf("the one that was removed heard %q", <-h.heard)
	}
}

type handler func(bool)

func (h handler) Ready(ended bool) { h(ended) }

func TestAClosedPollerRefuses(t *testing.T) {
	p, err := New(nil)
	if err != nil {
		t.Fatal(err)
	}
	p.Close()
	p.Run()
	fd, _ := pair(t)
	if err := p.Add(fd, handler(func(bool) {})); err == nil {
		t.Error("added to a closed poller")
	}
	p.Remove(fd)
}
