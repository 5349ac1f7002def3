package relay

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/http2"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/route"
	"github.com/weirmesh/weir/proxy/upstream"
)

// thinking is an application that answers when it is told to.
func thinking(t *testing.T) (netip.AddrPort, <-chan struct{}, chan<- string) {
	t.Helper()
	asked, answers := make(chan struct{}), make(chan string)
	app := serving(t, func(w http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		select {
		case text := <-answers:
			fmt.Fprint(w, text)
		case <-r.Context().Done():
		}
	})
	return app, asked, answers
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
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
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
	if len(records) != 2 || records[1].Reason != "client_gone" {
		t.Errorf("records %v", records)
	}
}

// TestAHeadsTimeBeginsWithItsFirstByte, whatever the connection has carried before.
func TestAHeadsTimeBeginsWithItsFirstByte(t *testing.T) {
	b := newBench(t, behind(serving(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path) })))
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
	b := newBench(t, behind(serving(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path, large) })))
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
	config := behind(serving(t, func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/never" {
			<-r.Context().Done()
		}
	}))
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

// TestAnAnswerInPiecesIsPassedOnPieceByPiece, by the poller unless it is large.
func TestAnAnswerInPiecesIsPassedOnPieceByPiece(t *testing.T) {
	large := strings.Repeat("0123456789abcdef", 64<<10/16*8)
	for _, c := range []struct {
		name          string
		first, second string
		body          string
		where         step // between the two
	}{
		{"with a length", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello", "world", "helloworld", atPassing},
		{"in chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n5\r\nwo", "rld\r\n0\r\n\r\n", "helloworld", atPassing},
		{"its head alone", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "world", "world", atPassing},
		{"large", fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(large)+5, large), "world", large + "world", away},
	} {
		t.Run(c.name, func(t *testing.T) {
			goOn := make(chan struct{})
			app := scripted(t, func(conn *net.TCPConn, r *bufio.Reader) {
				for {
					if _, err := http.ReadRequest(r); err != nil {
						return
					}
					_, _ = io.WriteString(conn, c.first)
					<-goOn
					_, _ = io.WriteString(conn, c.second)
				}
			})
			b := newBench(t, behind(app))
			client := b.conn(t, listen.Outbound, vip)
			r := bufio.NewReader(client)
			for i := range 3 {
				_, _ = io.WriteString(client, hello)
				resp, err := http.ReadResponse(r, nil)
				if err != nil {
					t.Fatal(err)
				}
				first := make([]byte, len(c.body)-5) // it does not wait for the second
				if _, err := io.ReadFull(resp.Body, first); err != nil {
					t.Fatal(err)
				}
				if i > 0 { // the first has to connect
					b.only(t).comes(t, c.where)
				}
				goOn <- struct{}{}
				rest, err := io.ReadAll(resp.Body)
				if got := string(first) + string(rest); got != c.body || err != nil {
					t.Errorf("%d bytes that are not what was sent, %v", len(got), err)
				}
			}
			client.Close()
			for _, record := range b.ended(t) {
				if record.Reason != "" || record.ResponseBodyBytes < uint64(len(c.body)) {
					t.Errorf("%v", record)
				}
			}
		})
	}
}

// TestAnAnswerThatBreaksLaterIsNotWhole: the client sees a reset, not an end.
func TestAnAnswerThatBreaksLaterIsNotWhole(t *testing.T) {
	goOn := make(chan struct{})
	app := scripted(t, func(conn *net.TCPConn, r *bufio.Reader) {
		for i := 0; ; i++ {
			if _, err := http.ReadRequest(r); err != nil {
				return
			}
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
			rest := "0\r\n\r\n"
			if i > 0 {
				<-goOn
				rest = "no chunk\r\n"
			}
			_, _ = io.WriteString(conn, rest)
		}
	})
	b := newBench(t, behind(app))
	client := b.conn(t, listen.Outbound, vip)
	r := bufio.NewReader(client)
	_, _ = say(t, client, r, hello, "GET")
	_, _ = io.WriteString(client, hello)
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	b.only(t).comes(t, atPassing)
	goOn <- struct{}{}
	if body, err := io.ReadAll(resp.Body); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%q, %v, want a reset", body, err)
	}
	if records := b.ended(t); len(records) != 2 || records[1].Reason != "bad_response" {
		t.Errorf("records %v", records)
	}
}

// TestARequestInTwoPacketsIsThePollers, if the second comes soon after the first.
func TestARequestInTwoPacketsIsThePollers(t *testing.T) {
	app, asked, answers := thinking(t)
	b := newBench(t, behind(app))
	client := b.conn(t, listen.Outbound, vip)
	r := bufio.NewReader(client)
	const request = "POST / HTTP/1.1\r\nHost: back\r\nContent-Length: 5\r\n\r\nhello"
	served := func(at int) step {
		_, _ = io.WriteString(client, request[:at])
		_, _ = io.WriteString(client, request[at:])
		<-asked
		h := b.only(t)
		h.quick.mu.Lock()
		by := h.quick.at
		h.quick.mu.Unlock()
		answers <- "thanks"
		if resp, body := answered(t, r, "POST"); resp.StatusCode != 200 || body != "thanks" {
			t.Errorf("%v %q", resp, body)
		}
		h.comes(t, atHead)
		return by
	}
	served(len(request)) // the first has to connect
	for _, at := range []int{10, len(request) - 5, len(request) - 1} {
		// A busy machine may well take longer over it, but not each time.
		tries := 0
		for ; tries < 50 && served(at) != atAnswer; tries++ {
		}
		if tries == 50 {
			t.Errorf("cut at %d it is never the poller's", at)
		}
	}
	client.Close()
	b.ended(t)
}

// TestAConnectionThatSaidMoreThanItsAnswerIsNotUsedAgain, whatever that is and whenever:
// the poller knows, and does not look again.
func TestAConnectionThatSaidMoreThanItsAnswerIsNotUsedAgain(t *testing.T) {
	const answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
	for _, c := range []struct {
		what string
		say  func(t *testing.T, c *net.TCPConn)
	}{
		{"its end with it, in one piece", func(t *testing.T, c *net.TCPConn) {
			corked(t, c)
			_, _ = io.WriteString(c, answer)
			_ = c.CloseWrite()
		}},
		{"its end after it", func(_ *testing.T, c *net.TCPConn) {
			_, _ = io.WriteString(c, answer)
			time.Sleep(5 * time.Millisecond)
			_ = c.CloseWrite()
		}},
		{"something with it", func(_ *testing.T, c *net.TCPConn) { _, _ = io.WriteString(c, answer+answer) }},
		{"something after it", func(_ *testing.T, c *net.TCPConn) {
			_, _ = io.WriteString(c, answer)
			time.Sleep(5 * time.Millisecond)
			_, _ = io.WriteString(c, answer)
		}},
		{"something behind what there is room for", func(_ *testing.T, c *net.TCPConn) {
			head := "HTTP/1.1 200 OK\r\nContent-Length: 16000\r\nX-Fill: "
			body := "\r\n\r\n" + strings.Repeat("x", 16000)
			fill := strings.Repeat("y", bufferSize-len(head)-len(body))
			_, _ = io.WriteString(c, head+fill+body+answer)
		}},
	} {
		t.Run(c.what, func(t *testing.T) {
			requests := make(chan int, 10)
			app := scripted(t, func(conn *net.TCPConn, r *bufio.Reader) {
				n := 0
				defer func() { requests <- n }()
				for ; ; n++ {
					if _, err := http.ReadRequest(r); err != nil {
						return
					}
					if n == 2 {
						c.say(t, conn)
					} else {
						_, _ = io.WriteString(conn, answer)
					}
				}
			})
			b := newBench(t, behind(app))
			client := b.conn(t, listen.Outbound, vip)
			r := bufio.NewReader(client)
			for range 4 {
				if resp, _ := say(t, client, r, hello, "GET"); resp.StatusCode != 200 {
					t.Fatal(resp.StatusCode)
				}
				time.Sleep(4 * upstream.Fresh)
			}
			client.Close()
			b.ended(t)
			first, second := <-requests, 0
			select {
			case second = <-requests:
			case <-time.After(time.Second): // there was one connection
			}
			if min(first, second) != 1 || max(first, second) != 3 {
				t.Errorf("connections carried %d and %d requests, want 3 and 1", first, second)
			}
		})
	}
}

// corked has what is written go when the connection ends, in one piece with that.
func corked(t *testing.T, c *net.TCPConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Error(err)
		return
	}
	_ = raw.Control(func(fd uintptr) {
		if err := unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_CORK, 1); err != nil {
			t.Error(err)
		}
	})
}

// TestConnectionsFollowTheProcessors: what a poller watched that is not chosen any more, it
// does not keep awake for.
func TestConnectionsFollowTheProcessors(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	app := serving(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") })
	b := newBench(t, behind(app))
	ask := func(client *net.TCPConn, r *bufio.Reader) {
		t.Helper()
		if resp, _ := say(t, client, r, hello, "GET"); resp.StatusCode != 200 {
			t.Fatal(resp.StatusCode)
		}
	}
	first := b.pollers.get(2)
	b.pollers.get(2) // the next is another one
	client := b.conn(t, listen.Inbound, app)
	r := bufio.NewReader(client)
	watching := func() *http2.Poller {
		h := b.only(t)
		h.quick.mu.Lock()
		defer h.quick.mu.Unlock()
		if h.quick.at != atHead {
			return nil // its goroutine does
		}
		return h.held.poller
	}
	ask(client, r)
	ask(client, r)
	b.only(t).comes(t, atHead)
	if watching() == first {
		t.Fatal("the test is wrong about which poller is chosen")
	}
	runtime.GOMAXPROCS(1)
	for deadline := time.Now().Add(4 * lookEvery); watching() != first; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("a poller watches that is not chosen any more")
		}
		ask(client, r)
	}
	client.Close()
	b.ended(t)
}
