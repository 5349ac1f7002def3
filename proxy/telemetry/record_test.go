package telemetry

import (
	"net/netip"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/journal"
	"github.com/weirmesh/weir/proxy/listen"
)

// full is the record of an ordinary request.
func full() *Record {
	return &Record{
		Start: time.Now(), Direction: listen.Outbound,
		Client: netip.MustParseAddrPort("10.244.0.5:40000"), Server: netip.MustParseAddrPort("10.96.0.1:80"),
		Service: "shop/back", Upstream: netip.MustParseAddrPort("10.244.0.7:8080"), UpstreamLocal: netip.MustParseAddrPort("10.244.0.5:40001"),
		Pod: "shop/back-7d4b9c6f5d-abcde", Workload: "shop/back", Sent: 300, Received: 2000,
		Total: 2 * time.Millisecond, Route: 10 * time.Microsecond,
		Protocol: "HTTP/1.1", Method: "GET", Path: "/a/path/of/some/length", RouteName: "HTTPRoute/shop/back", Status: 200, Attempts: 1,
		FirstByte: time.Millisecond, Overhead: 50 * time.Microsecond, Trace: [16]byte{1}, Span: [8]byte{2}, ResponseBody: 1800,
	}
}

// BenchmarkRecord is what telemetry costs of a request.
func BenchmarkRecord(b *testing.B) {
	records, err := journal.Create()
	if err != nil {
		b.Fatal(err)
	}
	defer records.Close()
	meter, r := NewMeter(nil), full()
	b.ReportAllocs()
	for b.Loop() {
		meter.Begin(r)
		meter.End(r)
		row := r.Row()
		records.Put(&row)
	}
}
