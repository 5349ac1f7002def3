package relay

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/route"
	"github.com/weirmesh/weir/proxy/telemetry"
)

// BenchmarkHTTP1 is requests one after the other on one connection, with what is
// counted and recorded of them. The client and the server share the time; what they
// allocate is nothing.
func BenchmarkHTTP1(b *testing.B) {
	answer := fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 1024\r\n\r\n%s", strings.Repeat("x", 1024))
	endpoint := answering(b, answer)
	service := netip.MustParseAddrPort("10.96.0.1:80")
	meter, records := telemetry.NewMeter(func() []route.Destination { return nil }), telemetry.NewRing()
	server := &Server{
		Config: &fakeConfig{service: service, destination: route.Destination{
			Service: "shop/back", Protocol: route.HTTP, Endpoints: []route.Endpoint{{Addr: endpoint, Pod: "shop/back-1", Workload: "shop/back"}},
		}},
		Begun: meter.Begin,
		Log: func(r *telemetry.Record) {
			meter.End(r)
			records.Put(r)
		},
	}
	client, accepted := loopback(b)
	defer server.pool.Close()
	defer client.Close()
	_ = client.SetDeadline(time.Time{})
	server.handlers.Add(1)
	go server.handle(context.Background(), listen.Conn{
		TCPConn: accepted, Direction: listen.Outbound, Original: service, Accepted: time.Now(),
		Peer: client.LocalAddr().(*net.TCPAddr).AddrPort(),
	})
	request := []byte("GET /some/path?with=query HTTP/1.1\r\nHost: back.shop\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n")
	buf := make([]byte, 16<<10)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := client.Write(request); err != nil {
			b.Fatal(err)
		}
		for got := 0; got < len(answer); {
			n, err := client.Read(buf)
			if err != nil {
				b.Fatal(err)
			}
			got += n
		}
	}
}

// answering is a server whose every read is a request.
func answering(b *testing.B, answer []byte) netip.AddrPort {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				buf := make([]byte, 16<<10)
				for {
					if _, err := c.Read(buf); err != nil {
						return
					}
					if _, err := c.Write(answer); err != nil {
						return
					}
				}
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort()
}
