package relay

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/route"
)

// memory is what the heap holds, in bytes.
func memory() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestOverloadIsRefusedFast: of five times what the application may be asked, in each
// of many rounds what it may be asked is served, the rest is refused before anything
// of that is done, and nothing piles up.
func TestOverloadIsRefusedFast(t *testing.T) {
	const capacity, rounds = 8, 20
	for _, version := range []int{1, 2} {
		t.Run(fmt.Sprint("HTTP/", version), func(t *testing.T) {
			var now, most atomic.Int32
			var goOn atomic.Pointer[chan struct{}]
			app := serving2(t, func(http.ResponseWriter, *http.Request) {
				if n := now.Add(1); n > most.Load() {
					most.Store(n)
				}
				<-*goOn.Load()
				now.Add(-1)
			})
			config := behind(app)
			config.destination.Policy = &route.Policy{Name: "shop/back", Limits: route.Limits{Requests: capacity}}
			b := newBench(t, config)
			var before int64
			for round := range rounds {
				gate := make(chan struct{})
				goOn.Store(&gate)
				answers := make(chan string, 5*capacity)
				for range 5 * capacity {
					go func() { answers <- b.try(t, version) }()
				}
				for range 4 * capacity { // while nothing is served
					if got := <-answers; !strings.HasPrefix(got, "503weir; error=connection_limit_reached; details=\"circuit_open") {
						t.Fatalf("round %d: %q", round, got)
					}
				}
				close(gate)
				for range capacity {
					if got := <-answers; got != "200" {
						t.Fatalf("round %d: %q", round, got)
					}
				}
				b.mu.Lock()
				for _, c := range b.clients {
					c.Close()
				}
				b.clients = nil
				b.mu.Unlock()
				b.handlers.Wait()
				if b.records = nil; round == 2 {
					before = memory()
				}
			}
			// The test itself keeps its clients' connections.
			if grown := (memory() - before) / (rounds * 5 * capacity); grown > 4<<10 {
				t.Errorf("%d bytes are left of each request", grown)
			}
			if most.Load() > capacity {
				t.Errorf("the application was asked %d times at once", most.Load())
			}
			b.ended(t)
		})
	}
}

// TestSlowClientsCostTheOthersNothing: those who send a head byte by byte, and those
// who do not read a large answer, hold little, and others are served meanwhile.
func TestSlowClientsCostTheOthersNothing(t *testing.T) {
	const slow = 100
	block := make([]byte, 64<<10)
	app := serving2(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/large" {
			for err := error(nil); err == nil; {
				_, err = w.Write(block)
			}
		}
	})
	b := newBench(t, behind(app))
	if got := b.try(t, 1); got != "200" {
		t.Fatal(got)
	}
	before, goroutines := memory(), runtime.NumGoroutine()
	for range slow {
		head := b.conn(t, listen.Outbound, vip)
		_, _ = io.WriteString(head, "GET / HTTP/1.1\r\nX: ")
		reader := b.conn(t, listen.Outbound, vip)
		_ = reader.SetReadBuffer(4 << 10)
		_, _ = io.WriteString(reader, "GET /large HTTP/1.1\r\nHost: back\r\n\r\n")
		b.clients = append(b.clients, head, reader)
	}
	slowOnes := b.clients
	for i := range slow {
		_, _ = io.WriteString(slowOnes[2*i], "x") // one byte more of each head
		if got := b.try(t, 1+i%2); got != "200" {
			t.Fatalf("while others are slow: %q", got)
		}
	}
	// Both ends of each connection, the application and the test are in this process.
	if grown := (memory() - before) / (2 * slow); grown > 64<<10 {
		t.Errorf("%d bytes for each slow client", grown)
	}
	if n := runtime.NumGoroutine() - goroutines; n > 2*slow*5 {
		t.Errorf("%d goroutines for %d slow clients", n, 2*slow)
	}
	for _, c := range slowOnes {
		_ = c.(*net.TCPConn).SetLinger(0)
	}
	b.ended(t)
}

// TestAHeadHasItsTime from its first byte on, however much of it is there when it
// becomes clear that it is one, and however it trickles in.
func TestAHeadHasItsTime(t *testing.T) {
	app := serving2(t, func(http.ResponseWriter, *http.Request) {})
	for _, begun := range []string{"G", "GET / HTTP/1.1\r\n", "GET / HTTP/1.1\r\nHost: back\r\n\r\nGET / HTT"} {
		t.Run(fmt.Sprintf("%.16q", begun), func(t *testing.T) {
			b := newBench(t, behind(app))
			b.Head = 200 * time.Millisecond
			client := b.conn(t, listen.Outbound, vip)
			_, _ = io.WriteString(client, begun)
			r := bufio.NewReader(client)
			if strings.Contains(begun, "\r\n\r\n") {
				if resp, _ := answered(t, r, "GET"); resp.StatusCode != 200 {
					t.Errorf("%v", resp)
				}
			}
			stop := make(chan struct{})
			go func() {
				for {
					select {
					case <-stop:
						return
					case <-time.After(20 * time.Millisecond):
						_, _ = io.WriteString(client, "E")
					}
				}
			}()
			began := time.Now()
			resp, err := http.ReadResponse(r, nil)
			close(stop)
			if err == nil && resp.StatusCode/100 != 4 || time.Since(began) > soon {
				t.Errorf("%v, %v after %s", resp, err, time.Since(began))
			}
			client.Close()
			b.ended(t)
		})
	}
}

// TestWithoutDescriptorsRequestsAreShed, and served again when there are some.
func TestWithoutDescriptorsRequestsAreShed(t *testing.T) {
	app := serving2(t, func(http.ResponseWriter, *http.Request) {})
	b := newBench(t, behind(app))
	client := b.conn(t, listen.Outbound, vip)
	r := bufio.NewReader(client)
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	resp, _ := say(t, client, r, hello, "GET")
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != 503 || !strings.Contains(resp.Header.Get("Proxy-Status"), "connection_limit_reached") {
		t.Errorf("%v", resp)
	}
	if resp, _ := say(t, client, r, hello, "GET"); resp.StatusCode != 200 {
		t.Errorf("%v", resp)
	}
	client.Close()
	if records := b.ended(t); len(records) != 2 || records[0].Reason != "overload" || records[1].Reason != "" {
		t.Errorf("records %v", records)
	}
}
