package netns

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// TestListenerComesAndGoes dials an application whose listener comes and goes. A
// connection that arrives while nobody listens is not turned aside; if somebody
// listens an instant later, it would reach the application past its proxy. No
// such one may.
func TestListenerComesAndGoes(t *testing.T) {
	for name, b := range backends(t) {
		for _, f := range families {
			t.Run(name+"/"+f.name, func(t *testing.T) {
				w := newWorld(t, b, 1<<30)
				w.apply(t, nil)
				race(t, w, f, 1500*time.Millisecond)
			})
		}
	}
}

func race(t *testing.T, w *world, f family, length time.Duration) {
	t.Helper()
	stop := make(chan struct{})
	time.AfterFunc(length, func() { close(stop) })
	over := func() bool {
		select {
		case <-stop:
			return true
		default:
			return false
		}
	}
	var wg sync.WaitGroup
	var past, through, refused, reset, ears atomic.Int64

	// The application: it sees the proxy's connections come from the pod itself.
	wg.Go(func() {
		w.pod.Do(func() {
			for !over() {
				l, err := net.Listen("tcp", at(f.pod, 8087))
				if err != nil {
					t.Error(err)
					return
				}
				ears.Add(1)
				_ = l.(*net.TCPListener).SetDeadline(time.Now().Add(200 * time.Microsecond))
				for {
					c, err := l.Accept()
					if err != nil {
						break
					}
					if c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr() == f.peer {
						past.Add(1)
					} else {
						through.Add(1)
					}
					_ = c.(*net.TCPConn).SetLinger(0)
					c.Close()
				}
				l.Close()
			}
		})
	})
	for range 3 {
		wg.Go(func() {
			w.peer.Do(func() {
				for !over() {
					c, err := net.DialTimeout("tcp", at(f.pod, 8087), time.Second)
					switch {
					case err == nil:
						// Wait for the other end: who runs ahead of the proxy fills
						// its queue, and is not answered.
						_ = c.SetDeadline(time.Now().Add(time.Second))
						_, _ = c.Read(make([]byte, 1))
						_ = c.(*net.TCPConn).SetLinger(0)
						c.Close()
					case errors.Is(err, syscall.ECONNREFUSED):
						refused.Add(1)
					// The proxy took it, found nobody, and said so while the dialler
					// still looked at how its connect had ended.
					case errors.Is(err, syscall.ECONNRESET):
						reset.Add(1)
					default:
						t.Error(err)
					}
				}
			})
		})
	}
	wg.Wait()
	t.Logf("%d listeners; %d connections through the proxy, %d refused, %d reset, %d past it",
		ears.Load(), through.Load(), refused.Load(), reset.Load(), past.Load())
	if past.Load() > 0 {
		t.Errorf("%d connections reached the application past its proxy", past.Load())
	}
	if through.Load() == 0 || refused.Load() == 0 {
		t.Error("there was no race to lose")
	}
}
