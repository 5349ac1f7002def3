package http2_test

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"testing"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// BenchmarkRelay reports the CPU time that a proxy takes per request of 1 KB, by
// itself: the load and the backend are another process.
func BenchmarkRelay(b *testing.B) {
	for _, load := range []struct{ conns, streams int }{{4, 32}, {16, 1}} {
		for _, proxy := range []struct {
			name  string
			start func(testing.TB, string) string
		}{
			{"weir", func(b testing.TB, backend string) string { return newRelay(b, backend, nil).addr }},
			{"ReverseProxy", reverseProxy},
		} {
			b.Run(fmt.Sprintf("%dx%d/%s", load.conns, load.streams, proxy.name), func(b *testing.B) {
				backend := startHelper(b, "backend")
				addr := proxy.start(b, backend)
				b.ReportAllocs()
				drive(b, addr, load.conns, load.streams)
			})
		}
	}
}

// drive has another process make b.N requests.
func drive(b *testing.B, addr string, conns, streams int) {
	b.Helper()
	for _, warm := range []bool{true, false} {
		n := b.N
		if warm {
			n = 2 * conns * streams
		}
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "HTTP2_HELPER=load", "ADDR="+addr,
			fmt.Sprintf("CONNS=%d", conns), fmt.Sprintf("STREAMS=%d", streams), fmt.Sprintf("N=%d", n))
		before := cpu()
		b.ResetTimer()
		b.StartTimer()
		if out, err := cmd.CombinedOutput(); err != nil {
			b.Fatalf("load: %v\n%s", err, out)
		}
		b.StopTimer()
		b.ReportMetric((cpu()-before)*1e6/float64(n), "cpu-µs/op")
	}
}

// cpu is this process's CPU time in seconds.
func cpu() float64 {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}

func reverseProxy(b testing.TB, backend string) string {
	target := &url.URL{Scheme: "http", Host: backend}
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.Transport = httpClient(b).Transport
	return serveHTTP(b, proxy.ServeHTTP)
}

// startHelper runs this test's binary as another program, and returns where it
// listens.
func startHelper(b testing.TB, name string) string {
	b.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "HTTP2_HELPER="+name)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		stdin.Close() // it ends with its input
		_ = cmd.Wait()
	})
	var addr string
	if _, err := fmt.Fscanln(stdout, &addr); err != nil {
		b.Fatal(err)
	}
	return addr
}

// helper is what the other processes do.
func helper(name string) int {
	switch name {
	case "backend":
		if err := backend(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	case "load":
		number := func(name string) int {
			n, _ := strconv.Atoi(os.Getenv(name))
			return n
		}
		if err := load(os.Getenv("ADDR"), number("CONNS"), number("STREAMS"), number("N")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	return 0
}

func backend() error {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	body := bytes.Repeat([]byte("x"), 1024)
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{Protocols: &protocols, HTTP2: &http.HTTP2Config{MaxConcurrentStreams: 1000},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("content-length", strconv.Itoa(len(body)))
			_, _ = w.Write(body)
		})}
	go func() { _ = server.Serve(ln) }()
	fmt.Println(ln.Addr())
	_, _ = os.Stdin.Read(make([]byte, 1))
	return server.Close()
}

// load makes n requests over conns connections with so many streams each at a time.
func load(addr string, conns, streams, n int) error {
	var done sync.WaitGroup
	failures := make(chan error, conns)
	for i := range conns {
		share := n / conns
		if i < n%conns {
			share++
		}
		done.Go(func() { failures <- loadConn(addr, streams, share) })
	}
	done.Wait()
	for range conns {
		if err := <-failures; err != nil {
			return err
		}
	}
	return nil
}

// loadConn speaks HTTP/2 by hand: net/http's client would take most of the machine.
func loadConn(addr string, streams, n int) error {
	if n == 0 {
		return nil
	}
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer nc.Close()
	var out bytes.Buffer
	framer := xhttp2.NewFramer(&out, nc)
	framer.SetReuseFrames()
	out.WriteString(xhttp2.ClientPreface)
	_ = framer.WriteSettings()
	_ = framer.WriteWindowUpdate(0, 1<<30)
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	next := uint32(1)
	request := func() {
		block.Reset()
		for _, f := range [][2]string{
			{":method", "GET"}, {":scheme", "http"}, {":authority", "shop.example"}, {":path", "/api/items"},
			{"user-agent", "load/1"}, {"accept", "*/*"}, {"x-request-id", strconv.Itoa(int(next))},
		} {
			_ = enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]})
		}
		_ = framer.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: next, BlockFragment: block.Bytes(), EndStream: true, EndHeaders: true})
		next += 2
	}
	sent := min(streams, n)
	for range sent {
		request()
	}
	in := make([]byte, 0, 64<<10)
	framer = xhttp2.NewFramer(&out, &gatherer{nc: nc, out: &out, buf: in})
	framer.SetReuseFrames()
	for got := 0; got < n; {
		f, err := framer.ReadFrame()
		if err != nil {
			return err
		}
		switch f := f.(type) {
		case *xhttp2.SettingsFrame:
			if !f.IsAck() {
				_ = framer.WriteSettingsAck()
			}
		case *xhttp2.DataFrame:
			if f.StreamEnded() {
				got++
				if sent < n {
					request()
					sent++
				}
			}
		case *xhttp2.RSTStreamFrame, *xhttp2.GoAwayFrame:
			return fmt.Errorf("unexpected %v", f)
		}
	}
	return nil
}

// gatherer writes what was gathered when there is nothing left to read.
type gatherer struct {
	nc  net.Conn
	out *bytes.Buffer
	buf []byte
	r   int
}

func (g *gatherer) Read(p []byte) (int, error) {
	if g.r == len(g.buf) {
		if g.out.Len() > 0 {
			if _, err := g.out.WriteTo(g.nc); err != nil {
				return 0, err
			}
		}
		n, err := g.nc.Read(g.buf[:cap(g.buf)])
		if err != nil {
			return 0, err
		}
		g.buf, g.r = g.buf[:n], 0
	}
	n := copy(p, g.buf[g.r:])
	g.r += n
	return n, nil
}
