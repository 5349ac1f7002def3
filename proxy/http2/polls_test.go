package http2_test

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"

	"github.com/weirmesh/weir/proxy/http2"
)

// TestPolledConnectionsEndInTime: nothing wakes their goroutine but the watch.
func TestPolledConnectionsEndInTime(t *testing.T) {
	const short = 200 * time.Millisecond
	half := []byte{0, 0, 50, byte(xhttp2.FrameHeaders), byte(xhttp2.FlagHeadersEndHeaders), 0, 0, 0, 1, 0x82}
	for name, test := range map[string]struct {
		limits http2.Timeouts
		says   []byte
		want   error
	}{
		"idle":                          {http2.Timeouts{Idle: short}, nil, nil},
		"in the middle of a frame":      {http2.Timeouts{Frame: short}, half, http2.ErrTimeout},
		"without an answer to its PING": {http2.Timeouts{Ping: short}, nil, http2.ErrTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRelay(t, "", func(r *relay) { r.server.Timeouts = test.limits })
			client := dialRaw(t, r.addr)
			next[*xhttp2.SettingsFrame](client)
			_, _ = client.nc.Write(test.says)
			if err := r.end(t); !errors.Is(err, test.want) {
				t.Errorf("it ended with %v, want %v", err, test.want)
			}
		})
	}
}

// TestWhoReadsDoesNotMatter: a poller, another one, or, where there is none any more, the
// connection's goroutine.
func TestWhoReadsDoesNotMatter(t *testing.T) {
	const other = 3 // processors
	before := runtime.GOMAXPROCS(0)
	defer runtime.GOMAXPROCS(before)
	body := bytes.Repeat([]byte("0123456789abcdef"), 256<<10) // more than a poller reads in a row
	backend := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) })
	var chosen, none atomic.Int32
	r := newRelay(t, backend, func(r *relay) {
		pollers := []*http2.Poller{r.poller, newPoller(t)}
		choose := func() *http2.Poller {
			n := chosen.Add(1)
			if none.Load() > 0 {
				return nil
			}
			return pollers[n%2]
		}
		often := http2.Timeouts{Idle: 2 * time.Second} // processors are looked at four times in that
		r.server.Poller, r.server.Timeouts = choose, often
		r.client.Poller, r.client.Timeouts = choose, often
	})
	client := httpClient(t)
	echo := func(who string) {
		t.Helper()
		resp, err := client.Post("http://"+r.addr+"/", "text/plain", bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if got, err := io.ReadAll(resp.Body); !bytes.Equal(got, body) || err != nil {
			t.Errorf("read by %s: %d bytes of %d, %v", who, len(got), len(body), err)
		}
	}
	echo("a poller")
	for _, step := range []struct {
		who        string
		none       int32
		processors int
	}{{"another", 0, other}, {"a goroutine", 1, before}} {
		none.Store(step.none)
		was := chosen.Load()
		runtime.GOMAXPROCS(step.processors)
		eventually(t, "both connections have been given to "+step.who, func() bool { return chosen.Load() >= was+2 })
		echo(step.who)
	}
}
