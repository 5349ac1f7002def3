package relay

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/journal"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/mtls"
	"github.com/weirmesh/weir/proxy/mtls/mtlstest"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/route"
	"github.com/weirmesh/weir/proxy/upstream"
)

// onOneProcessor has a test see one poller.
func onOneProcessor(t *testing.T) {
	t.Helper()
	before := runtime.GOMAXPROCS(1)
	t.Cleanup(func() { runtime.GOMAXPROCS(before) })
}

// carried are the connections with streams that come in.
func (b *bench) carried() []*session {
	b.Server.mu.Lock()
	defer b.Server.mu.Unlock()
	var out []*session
	for c := range b.carriers {
		if s, ok := c.(*session); ok {
			out = append(out, s)
		}
	}
	return out
}

// first has a client's first request answered: those that follow are the poller's.
func first(t *testing.T, client net.Conn, r *bufio.Reader, asked <-chan struct{}, answers chan<- string) {
	t.Helper()
	_, _ = io.WriteString(client, hello)
	<-asked
	answers <- "first"
	if resp, body := answered(t, r, "GET"); resp.StatusCode != 200 || body != "first" {
		t.Fatalf("%v %q", resp, body)
	}
}

func TestClientsShareAConnectionToAnotherProxy(t *testing.T) {
	onOneProcessor(t)
	app := serving(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprint(w, r.URL.Path, len(body), strings.Repeat("x", len(body)))
	})
	near, far := inMesh(t, route.HTTP, route.Permissive, app)
	const clients, requests = 30, 6
	var calling sync.WaitGroup
	for i := range clients {
		client := near.conn(t, listen.Outbound, vip)
		near.clients = append(near.clients, client)
		calling.Go(func() {
			r := bufio.NewReader(client)
			for j := range requests {
				size := []int{0, 10, 3000, 40_000, 200_000, 1}[j]
				go func() {
					fmt.Fprintf(client, "POST /%d/%d/ HTTP/1.1\r\nHost: back\r\nContent-Length: %d\r\n\r\n%s", i, j, size, strings.Repeat("y", size))
				}()
				want := fmt.Sprintf("/%d/%d/%d", i, j, size) + strings.Repeat("x", size)
				if resp, body := answered(t, r, "POST"); resp.StatusCode != 200 || body != want {
					t.Errorf("%v, %d bytes of %d", resp.Status, len(body), len(want))
				}
			}
		})
	}
	calling.Wait()
	sent, received := over(t, near, far)
	if n := far.accepted.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
	for side, records := range map[string][]*journal.Record{"caller": sent, "callee": received} {
		shaken := 0
		for _, r := range records {
			if r.Reason != "" || r.Status != 200 || r.PeerIdentity == "" {
				t.Errorf("the %s's record %v", side, r)
			}
			if r.TLSNanos > 0 {
				shaken++
			}
		}
		if len(records) != clients*requests || shaken != 1 {
			t.Errorf("the %s has %d records, %d of them with a handshake", side, len(records), shaken)
		}
	}
}

// TestAProxyThatTakesNoStreamsIsSpokenToAsBefore: an earlier one, or one that is not to look
// into what goes to the port.
func TestAProxyThatTakesNoStreamsIsSpokenToAsBefore(t *testing.T) {
	app := serving(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") })
	ca := mtlstest.NewCA(t)
	far := newFarOf(t, ca.Identity(backID, nil), &fakeConfig{opaque: app.Port()}, app)
	near := newNear(t, ca.Identity(frontID, nil), route.HTTP, far.addr)
	const clients = 5
	for range clients {
		client := near.conn(t, listen.Outbound, vip)
		near.clients = append(near.clients, client)
	}
	for range 2 {
		var calling sync.WaitGroup
		for _, client := range near.clients {
			calling.Go(func() {
				if resp, body := say(t, client, bufio.NewReader(client), hello, "GET"); resp.StatusCode != 200 || body != "ok" {
					t.Errorf("%v %q", resp, body)
				}
			})
		}
		calling.Wait()
	}
	over(t, near, far)
	if n := far.accepted.Load(); n == 0 || n > clients {
		t.Errorf("%d connections for %d clients", n, clients)
	}
}

// TestAProxyThatIsToEndTakesNoNewStreams: what goes on with it is served to its end.
func TestAProxyThatIsToEndTakesNoNewStreams(t *testing.T) {
	onOneProcessor(t)
	app, asked, answers := thinking(t)
	near, far := inMesh(t, route.HTTP, route.Permissive, app)
	ask := func() (net.Conn, *bufio.Reader) {
		client := near.conn(t, listen.Outbound, vip)
		near.clients = append(near.clients, client)
		_, _ = io.WriteString(client, hello)
		<-asked
		return client, bufio.NewReader(client)
	}
	_, before := ask()
	old := far.carried()
	if len(old) != 1 {
		t.Fatalf("%d connections with streams", len(old))
	}
	far.drain()
	waitUntil(t, "the caller is told", func() bool {
		near.sessions.mu.Lock()
		defer near.sessions.mu.Unlock()
		for one := range near.sessions.all {
			if stream, err := one.Open(); err == nil {
				stream.Close()
				return false
			}
		}
		return true
	})
	_, after := ask()
	if n := far.accepted.Load(); n != 2 {
		t.Errorf("%d connections", n)
	}
	answers <- "served"
	answers <- "served" // whose is whose, nobody knows
	for _, r := range []*bufio.Reader{after, before} {
		if resp, body := answered(t, r, "GET"); resp.StatusCode != 200 || body != "served" {
			t.Errorf("%v %q", resp, body)
		}
	}
	select {
	case <-old[0].Done():
	case <-time.After(patience):
		t.Error("the connection does not end with what it carried")
	}
	over(t, near, far)
}

// TestAConnectionThatBreaksIsFollowed: what was under way fails, what comes is served.
func TestAConnectionThatBreaksIsFollowed(t *testing.T) {
	app, asked, answers := thinking(t)
	near, far := inMesh(t, route.HTTP, route.Permissive, app)
	client := near.conn(t, listen.Outbound, vip)
	near.clients = append(near.clients, client)
	r := bufio.NewReader(client)
	first(t, client, r, asked, answers)
	_, _ = io.WriteString(client, "POST / HTTP/1.1\r\nHost: back\r\nContent-Length: 0\r\n\r\n")
	<-asked
	for _, one := range far.carried() {
		one.abort(reason.Shutdown, nil)
	}
	if resp, _ := answered(t, r, "POST"); resp.StatusCode != 502 && resp.StatusCode != 503 || !strings.Contains(resp.Header.Get("Proxy-Status"), "connection_terminated") {
		t.Errorf("%v %v", resp.Status, resp.Header)
	}
	_, _ = io.WriteString(client, hello)
	<-asked
	answers <- "served"
	if resp, body := answered(t, r, "GET"); resp.StatusCode != 200 || body != "served" {
		t.Errorf("%v %q", resp, body)
	}
	over(t, near, far)
}

// TestAClientThatBreaksOffBreaksNoOther: each stream ends by itself.
func TestAClientThatBreaksOffBreaksNoOther(t *testing.T) {
	onOneProcessor(t)
	app, asked, answers := thinking(t)
	near, far := inMesh(t, route.HTTP, route.Permissive, app)
	client, gone := near.conn(t, listen.Outbound, vip), near.conn(t, listen.Outbound, vip)
	near.clients = append(near.clients, client)
	r := bufio.NewReader(client)
	first(t, gone, bufio.NewReader(gone), asked, answers)
	_, _ = io.WriteString(gone, hello)
	<-asked
	_, _ = io.WriteString(client, hello)
	<-asked
	_ = gone.SetLinger(0)
	gone.Close()
	waitUntil(t, "the callee's side of it has ended", func() bool { return far.carried()[0].Streams() == 1 })
	answers <- "served"
	if resp, body := answered(t, r, "GET"); resp.StatusCode != 200 || body != "served" {
		t.Errorf("%v %q", resp, body)
	}
	if n := far.accepted.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
	over(t, near, far)
}

// TestWhoWaitsForAConnectionHearsWhyThereIsNone, and nobody for longer than that takes.
func TestWhoWaitsForAConnectionHearsWhyThereIsNone(t *testing.T) {
	onOneProcessor(t)
	ca := mtlstest.NewCA(t)
	var dialled atomic.Int32
	let := make(chan struct{})
	// It shows another identity than the endpoint has to, once all wait.
	endpoint := accepting(t, func(c *net.TCPConn) {
		dialled.Add(1)
		<-let
		if s, err := (&mtls.Handshaker{}).Server(context.Background(), c, ca.Identity(frontID, nil), nil); err == nil {
			_, _ = io.Copy(io.Discard, s)
		}
	})
	near := newNear(t, ca.Identity(frontID, nil), route.HTTP, endpoint)
	const clients = 10
	var calling sync.WaitGroup
	for range clients {
		client := near.conn(t, listen.Outbound, vip)
		near.clients = append(near.clients, client)
		calling.Go(func() {
			resp, _ := say(t, client, bufio.NewReader(client), hello, "GET")
			if status := resp.Header.Get("Proxy-Status"); resp.StatusCode != 503 || !strings.Contains(status, "peer_identity") {
				t.Errorf("%v %s", resp.Status, status)
			}
		})
	}
	waitUntil(t, "one dials", func() bool { return dialled.Load() > 0 })
	time.Sleep(50 * time.Millisecond) // for the others, to wait
	close(let)
	calling.Wait()
	if n := dialled.Load(); n >= clients {
		t.Errorf("%d connections for %d requests", n, clients)
	}
	near.ended(t)
}

// TestWhoGivesUpDialsForNobodyElse: his request's time was his own.
func TestWhoGivesUpDialsForNobodyElse(t *testing.T) {
	onOneProcessor(t)
	app := serving(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") })
	ca := mtlstest.NewCA(t)
	far := newFar(t, ca.Identity(backID, nil), route.Permissive, app)
	var came atomic.Int32
	let := make(chan struct{})
	tap := scripted(t, func(c *net.TCPConn, _ *bufio.Reader) {
		if came.Add(1) == 1 {
			<-let // the first one is kept waiting
			return
		}
		onward, err := net.Dial("tcp", far.addr.String())
		if err != nil {
			return
		}
		defer onward.Close()
		go func() {
			_, _ = io.Copy(onward, c)
			_ = onward.(*net.TCPConn).CloseWrite()
		}()
		_, _ = io.Copy(c, onward)
	})
	defer close(let)
	near := newNear(t, ca.Identity(frontID, nil), route.HTTP, tap)
	e := near.Config.(*fakeConfig).destination.Endpoints[0]
	h := &http1Conn{Server: &near.Server}
	h.quick.poller = near.pollers.choose()
	impatient, stop := context.WithCancel(t.Context())
	failed := make(chan error, 1)
	go func() {
		_, err := h.reachStream(impatient, e)
		failed <- err
	}()
	waitUntil(t, "it dials", func() bool { return came.Load() == 1 })
	reached := make(chan error, 1)
	go func() {
		up, err := h.reachStream(t.Context(), e)
		if err == nil {
			up.Close()
		}
		reached <- err
	}()
	time.Sleep(20 * time.Millisecond) // for the second, to wait
	stop()
	if err := <-failed; err == nil {
		t.Error("who gave up has a connection")
	}
	if err := <-reached; err != nil {
		t.Error(err)
	}
	near.sessions.close()
	far.ended(t)
}

func TestAConnectionWithoutStreamsEnds(t *testing.T) {
	app := serving(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") })
	near, far := inMesh(t, route.HTTP, route.Permissive, app)
	near.sessions.look = 20 * time.Millisecond
	if got := near.try(t, 1); got != "200" {
		t.Fatal(got)
	}
	waitUntil(t, "it ends", func() bool {
		near.pool.CloseAll(func(upstream.Key) bool { return true }) // the request's is given back about now
		return len(far.carried()) == 0
	})
	if got := near.try(t, 1); got != "200" {
		t.Error(got)
	}
	if n := far.accepted.Load(); n != 2 {
		t.Errorf("%d connections", n)
	}
	over(t, near, far)
}

// TestConnectionsWithStreamsFollowTheProcessors, as others do.
func TestConnectionsWithStreamsFollowTheProcessors(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	app := serving(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") })
	near, far := inMesh(t, route.HTTP, route.Permissive, app)
	for _, b := range []*bench{near, far.bench} {
		b.pollers.get(2)
		b.pollers.get(2)
	}
	client := near.conn(t, listen.Outbound, vip)
	near.clients = append(near.clients, client)
	r := bufio.NewReader(client)
	ask := func() {
		t.Helper()
		if resp, _ := say(t, client, r, hello, "GET"); resp.StatusCode != 200 {
			t.Fatal(resp.StatusCode)
		}
	}
	ask()
	byFirst := func(b *bench, one *session) int {
		b.pollers.mu.Lock()
		first := b.pollers.all[0]
		b.pollers.mu.Unlock()
		one.mu.Lock()
		defer one.mu.Unlock()
		if one.poller == first {
			return 1
		}
		return 0
	}
	followed := func() int {
		near.sessions.mu.Lock()
		defer near.sessions.mu.Unlock()
		n := 0
		for one := range near.sessions.all {
			n += byFirst(near, one)
		}
		for _, one := range far.carried() {
			n += byFirst(far.bench, one)
		}
		return n
	}
	if followed() != 0 {
		t.Fatal("the test is wrong about which poller is chosen")
	}
	runtime.GOMAXPROCS(1)
	for deadline := time.Now().Add(4 * lookEvery); followed() != 2; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("a poller reads that is not chosen any more")
		}
		ask()
	}
	ask()
	over(t, near, far)
}
