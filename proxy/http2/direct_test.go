package http2_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/http2"
	"github.com/weirmesh/weir/proxy/sock"
)

// keeper is a connection that keeps what it takes without waiting: as TLS does, whose
// socket has no room.
type keeper struct {
	*net.TCPConn
	mu   sync.Mutex
	kept []byte
}

func (k *keeper) ReadNow(p []byte) (int, error) {
	raw, err := k.SyscallConn()
	if err != nil {
		return 0, err
	}
	var n int
	var failed error
	err = raw.Control(func(fd uintptr) { n, failed = sock.Read(fd, p) })
	if failed != nil {
		return 0, failed
	}
	return n, err
}

func (k *keeper) WriteNow(p []byte) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.kept) > 0 {
		return 0, unix.EAGAIN
	}
	k.kept = append(k.kept, p...)
	return len(p), nil
}

func (k *keeper) Unsent() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.kept) > 0
}

func (k *keeper) Write(p []byte) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, err := k.TCPConn.Write(k.kept); err != nil {
		return 0, err
	}
	k.kept = nil
	return k.TCPConn.Write(p)
}

// TestWhatIsTakenAndNotSentIsSent, though nothing is written after it.
func TestWhatIsTakenAndNotSentIsSent(t *testing.T) {
	backend := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) })
	r := newRelay(t, backend, func(r *relay) {
		r.client = &http2.Client{Poller: r.polled, Dial: func(ctx context.Context) (net.Conn, error) {
			nc, err := new(net.Dialer).DialContext(ctx, "tcp", backend)
			if err != nil {
				return nil, err
			}
			return &keeper{TCPConn: nc.(*net.TCPConn)}, nil
		}}
	})
	// The server says nothing before it is greeted.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.addr+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := httpClient(t).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()

	want := strings.Repeat("0123456789abcdef", 64<<10)
	resp, err = httpClient(t).Post("http://"+r.addr+"/", "text/plain", strings.NewReader(want))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if got, err := io.ReadAll(resp.Body); string(got) != want || err != nil {
		t.Errorf("%d bytes of %d, %v", len(got), len(want), err)
	}
}
