package relay

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/journal"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/route"
	"github.com/weirmesh/weir/proxy/telemetry"
)

// BenchmarkHTTP1 is a request of HTTP/1.1 after the other, on one connection of the
// client's, with what is counted and recorded of it. Client and application allocate
// nothing: what is counted is the proxy's.
func BenchmarkHTTP1(b *testing.B) {
	for name, policy := range map[string]*route.Policy{"default": nil, "limits": {Limits: route.Limits{Requests: 10, Retries: 10}}} {
		b.Run(name, func(b *testing.B) {
			answer := append([]byte("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 1024\r\n\r\n"), bytes.Repeat([]byte{'x'}, 1024)...)
			app := scripted(b, func(c *net.TCPConn, r *bufio.Reader) {
				_ = c.SetDeadline(time.Time{})
				for {
					for line := []byte{0}; line[0] != '\r'; { // an empty line ends a head
						var err error
						if line, err = r.ReadSlice('\n'); err != nil {
							return
						}
					}
					if _, err := c.Write(answer); err != nil {
						return
					}
				}
			})
			config := behind(app)
			config.destination.Policy = policy
			bench := newBench(b, config)
			meter := telemetry.NewMeter(nil)
			records, err := journal.Create()
			if err != nil {
				b.Fatal(err)
			}
			defer records.Close()
			bench.Begun = meter.Begin
			bench.Log = func(r *telemetry.Record) {
				meter.End(r)
				row := r.Row()
				records.Put(&row)
			}
			client := bench.conn(b, listen.Outbound, vip)
			_ = client.SetDeadline(time.Time{})
			request, got := []byte("GET /hello HTTP/1.1\r\nHost: back\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n"), make([]byte, len(answer))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := client.Write(request); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(client, got); err != nil {
					b.Fatal(err)
				}
			}
			client.Close()
			bench.ended(b)
		})
	}
}

// BenchmarkPair is two proxies, of a client and of an application, with TLS between them
// and without: a request after the other, and much that is passed on as it is.
func BenchmarkPair(b *testing.B) {
	for _, secure := range []bool{false, true} {
		name := map[bool]string{false: "plain", true: "TLS"}[secure]
		pair := func(b *testing.B, protocol route.Protocol, app netip.AddrPort) (*bench, *far) {
			near, far := inMesh(b, protocol, route.Permissive, app)
			if !secure {
				near.Config.(*fakeConfig).destination.Endpoints[0].Identity = ""
			}
			quiet := func(*telemetry.Record) {}
			near.Log, far.Log = quiet, quiet
			return near, far
		}
		for _, size := range []int{1 << 10, 100 << 10, 10 << 20} {
			b.Run(fmt.Sprint("HTTP1/", size, "/", name), func(b *testing.B) { benchmarkAnswer(b, size, pair) })
		}
		b.Run("TCP/"+name, func(b *testing.B) {
			const block = 1 << 20
			near, far := pair(b, route.Opaque, scripted(b, func(c *net.TCPConn, _ *bufio.Reader) {
				_ = c.SetDeadline(time.Time{})
				for data := make([]byte, block); ; {
					if _, err := c.Write(data); err != nil {
						return
					}
				}
			}))
			client := near.conn(b, listen.Outbound, vip)
			_ = client.SetDeadline(time.Time{})
			got := make([]byte, block)
			b.SetBytes(block)
			for b.Loop() {
				if _, err := io.ReadFull(client, got); err != nil {
					b.Fatal(err)
				}
			}
			_ = client.SetLinger(0)
			client.Close()
			over(b, near, far)
		})
	}
}

// benchmarkAnswer is a request after the other, with answers of that many bytes.
func benchmarkAnswer(b *testing.B, size int, pair func(*testing.B, route.Protocol, netip.AddrPort) (*bench, *far)) {
	answer := append(fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size), bytes.Repeat([]byte{'x'}, size)...)
	near, far := pair(b, route.HTTP, scripted(b, func(c *net.TCPConn, r *bufio.Reader) {
		_ = c.SetDeadline(time.Time{})
		for {
			for line := []byte{0}; line[0] != '\r'; {
				var err error
				if line, err = r.ReadSlice('\n'); err != nil {
					return
				}
			}
			_, _ = c.Write(answer)
		}
	}))
	client := near.conn(b, listen.Outbound, vip)
	_ = client.SetDeadline(time.Time{})
	request, got := []byte(hello), make([]byte, len(answer))
	b.ReportAllocs()
	b.SetBytes(int64(size))
	for b.Loop() {
		if _, err := client.Write(request); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(client, got); err != nil {
			b.Fatal(err)
		}
	}
	client.Close()
	over(b, near, far)
}
