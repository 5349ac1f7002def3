package relay

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/route"
)

// thinking is an application that answers when it is told to.
func thinking(t *testing.T) (netip.AddrPort, <-chan struct{}, chan<- string) {
	t.Helper()
	asked, answers := make(chan struct{}), make(chan string)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		select {
		case text := <-answers:
			fmt.Fprint(w, text)
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(server.Close)
	return addressOf(server), asked, answers
}

func addressOf(server *httptest.Server) netip.AddrPort {
	return netip.MustParseAddrPort(server.Listener.Addr().String())
}

// only is the one HTTP/1 connection that there is.
func (b *bench) only(t *testing.T) *http1Conn {
	t.Helper()
	b.Server.mu.Lock()
	defer b.Server.mu.Unlock()
	for c := range b.carriers {
		if h, ok := c.(*http1Conn); ok && len(b.carriers) == 1 {
			return h
		}
	}
	t.Fatalf("%d connections", len(b.carriers))
	return nil
}

// comes waits until the connection's request has come so far.
func (h *http1Conn) comes(t *testing.T, want step) {
	t.Helper()
	var at step
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		h.quick.mu.Lock()
		at = h.quick.at
		h.quick.mu.Unlock()
		if at == want {
			return
		}
	}
	t.Fatalf("the connection is at %d, want %d", at, want)
}

func TestAnOrdinaryRequestIsThePollers(t *testing.T) {
	app, asked, answers := thinking(t)
	for _, c := range []struct {
		direction listen.Direction
		original  netip.AddrPort
	}{{listen.Outbound, vip}, {listen.Inbound, app}} {
		t.Run(c.direction.String(), func(t *testing.T) {
			b := newBench(t, behind(app))
			client := b.conn(t, c.direction, c.original)
			r := bufio.NewReader(client)
			for i, want := range []step{away, atAnswer, atAnswer} { // the first has to connect
				_, _ = io.WriteString(client, hello)
				<-asked
				h := b.only(t)
				h.comes(t, want)
				answers <- fmt.Sprint("answer ", i)
				if resp, body := answered(t, r, "GET"); resp.StatusCode != 200 || body != fmt.Sprint("answer ", i) {
					t.Errorf("%v %q", resp, body)
				}
				h.comes(t, atHead)
			}
			client.Close()
			if records := b.ended(t); len(records) != 3 {
				t.Errorf("records %v", records)
			}
		})
	}
}

// TestAClientThatBreaksOffIsMissedAtOnce by the poller, and its endpoint is told.
func TestAClientThatBreaksOffIsMissedAtOnce(t *testing.T) {
	app, asked, answers := thinking(t)
	b := newBench(t, behind(app))
	client := b.conn(t, listen.Outbound, vip)
	r := bufio.NewReader(client)
	_, _ = io.WriteString(client, hello)
	<-asked
	answers <- "first"
	_, _ = answered(t, r, "GET")
	_, _ = io.WriteString(client, hello)
	<-asked
	b.only(t).comes(t, atAnswer)
	began := time.Now()
	_ = client.SetLinger(0)
	client.Close()
	records := b.ended(t)
	if took := time.Since(began); took >= lookEvery {
		t.Errorf("it took %v", took)
	}
	if len(records) != 2 || records[1].GetReason() != "client_gone" {
		t.Errorf("records %v", records)
	}
}

// TestAHeadsTimeBeginsWithItsFirstByte, whatever the connection has carried before.
func TestAHeadsTimeBeginsWithItsFirstByte(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path) }))
	defer server.Close()
	b := newBench(t, behind(addressOf(server)))
	b.Head = 500 * time.Millisecond
	client := b.conn(t, listen.Outbound, vip)
	r := bufio.NewReader(client)
	for range 3 {
		for _, half := range []string{hello[:10], hello[10:]} {
			_, _ = io.WriteString(client, half)
			if half == hello[:10] {
				// The goroutine has it once it does not come any further.
				time.Sleep(50 * time.Millisecond)
			}
		}
		if resp, body := answered(t, r, "GET"); resp.StatusCode != 200 || body != "/hello" {
			t.Fatalf("%v %q", resp, body)
		}
		time.Sleep(b.Head)
	}
	client.Close()
	b.ended(t)
}

// TestAnswersThatAreNotReadAreKept until they are: the poller goes on with others.
func TestAnswersThatAreNotReadAreKept(t *testing.T) {
	const requests = 6000
	large := strings.Repeat("x", 4000)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path, large) }))
	defer server.Close()
	b := newBench(t, behind(addressOf(server)))
	slow := b.conn(t, listen.Outbound, vip)
	go func() {
		for i := range requests {
			if _, err := fmt.Fprintf(slow, "GET /%d HTTP/1.1\r\nHost: back\r\n\r\n", i); err != nil {
				return
			}
		}
	}()
	h := func() *http1Conn {
		for {
			b.Server.mu.Lock()
			n := len(b.carriers)
			b.Server.mu.Unlock()
			if n > 0 {
				return b.only(t)
			}
			time.Sleep(time.Millisecond)
		}
	}()
	// Its answers fill what is between it and the proxy: the goroutine waits for room.
	for stuck := 0; stuck < 20; stuck++ {
		before := h.sentSoFar(b)
		time.Sleep(10 * time.Millisecond)
		if h.sentSoFar(b) != before {
			stuck = 0
		}
	}
	h.comes(t, away)
	other := b.conn(t, listen.Outbound, vip)
	if resp, _ := say(t, other, bufio.NewReader(other), hello, "GET"); resp.StatusCode != 200 {
		t.Errorf("%v", resp)
	}
	r := bufio.NewReader(slow)
	for i := range requests {
		if resp, body := answered(t, r, "GET"); resp.StatusCode != 200 || body != fmt.Sprint("/", i, large) {
			t.Fatalf("answer %d: %v %q", i, resp, body)
		}
	}
}

// sentSoFar is how many requests have been logged.
func (h *http1Conn) sentSoFar(b *bench) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.records)
}

// TestARequestsTimeEndsWithThePollerToo, time and again.
func TestARequestsTimeEndsWithThePollerToo(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/never" {
			<-r.Context().Done()
		}
	}))
	defer server.Close()
	config := behind(addressOf(server))
	config.destination.Policy = &route.Policy{Timeout: 50 * time.Millisecond}
	b := newBench(t, config)
	client := b.conn(t, listen.Outbound, vip)
	r := bufio.NewReader(client)
	for range 3 {
		if resp, _ := say(t, client, r, hello, "GET"); resp.StatusCode != 200 {
			t.Errorf("%v", resp)
		}
		_, _ = io.WriteString(client, "GET /never HTTP/1.1\r\nHost: back\r\n\r\n")
		if resp, _ := answered(t, r, "GET"); resp.StatusCode != 504 {
			t.Errorf("%v", resp)
		}
	}
	client.Close()
	b.ended(t)
}
