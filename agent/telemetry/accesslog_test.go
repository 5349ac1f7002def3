package telemetry

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/agent/journal"
	"github.com/weirmesh/weir/agent/proxypb"
)

func line(t *testing.T, r journal.Record) map[string]any {
	t.Helper()
	text, ended := strings.CutSuffix(string(appendLine(nil, "shop/front", &r)), "\n")
	if !ended || strings.Contains(text, "\n") {
		t.Fatalf("not one line: %q", text)
	}
	var got map[string]any
	if err := json.Unmarshal([]byte(text), &got); err != nil {
		t.Fatal(err)
	}
	return got
}

func TestAConnectionIsOneLineInTheNamesOfTheDocument(t *testing.T) {
	got := line(t, journal.Record{
		StartUnixNanos: 1_500_000_000, Direction: proxypb.Direction_OUTBOUND,
		ClientAddress: netip.MustParseAddrPort("10.0.0.5:40000"), ServerAddress: netip.MustParseAddrPort("[fe80::1%e\"]:80"), Service: "shop/back",
		UpstreamAddress: netip.MustParseAddrPort("[2001:db8::1]:8080"), UpstreamLocalAddress: netip.MustParseAddrPort("10.0.0.5:40001"), UpstreamPod: "shop/back-1",
		SentBytes: 3, ReceivedBytes: 4, TotalNanos: 2_000_000, RouteNanos: 1000, ConnectNanos: 5000,
		PeerIdentity: "spiffe://cluster.local/ns/shop/sa/back", TLSNanos: 3000,
	})
	want := map[string]any{
		"timestamp": "1970-01-01T00:00:01.5Z", "weir.direction": "outbound", "weir.pod": "shop/front",
		"client.address": "10.0.0.5:40000", "server.address": "[fe80::1%e\"]:80", "weir.destination.service": "shop/back",
		"weir.upstream.address": "[2001:db8::1]:8080", "weir.upstream.local_address": "10.0.0.5:40001", "weir.upstream.pod": "shop/back-1",
		"weir.sent.bytes": 3.0, "weir.received.bytes": 4.0,
		"weir.time.total": 0.002, "weir.time.route": 0.000001, "weir.time.connect": 0.000005,
		"weir.peer.identity": "spiffe://cluster.local/ns/shop/sa/back", "weir.time.tls": 0.000003,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestARequestIsOneLineInTheNamesOfTheDocument(t *testing.T) {
	got := line(t, journal.Record{
		Direction: proxypb.Direction_INBOUND, Protocol: "HTTP/1.1", Method: "POST", Path: "/cart", Status: 503, Route: "HTTPRoute/shop/back",
		Attempts: 2, FirstByteNanos: 3_000_000, GRPCStatus: "14", RequestBodyBytes: 10, ResponseBodyBytes: 20,
		TraceID: [16]byte([]byte("\x0a0123456789abcde")), SpanID: [8]byte([]byte("\xff1234567")),
	})
	want := map[string]any{
		"http.request.method": "POST", "url.path": "/cart", "http.response.status_code": 503.0, "network.protocol.version": "1.1",
		"weir.route": "HTTPRoute/shop/back", "weir.attempts": 2.0, "weir.time.first_byte": 0.003, "rpc.response.status_code": "14",
		"http.request.body.size": 10.0, "http.response.body.size": 20.0,
		"trace_id": "0a303132333435363738396162636465", "span_id": "ff31323334353637",
	}
	for key, value := range want {
		if got[key] != value {
			t.Errorf("%s: %v, want %v", key, got[key], value)
		}
	}
}

func TestAFailureSaysItsReasonAndLostRecordsAreCounted(t *testing.T) {
	got := line(t, journal.Record{
		Direction: proxypb.Direction_INBOUND, Reason: "connect_refused", Error: "dial 10.0.0.5:80: refused\nsecond line", DroppedBefore: 7,
		Policy: "no policy allowed it", Audited: "shop/a,shop/b",
	})
	for key, want := range map[string]any{
		"weir.direction": "inbound", "error.type": "connect_refused", "weir.reason": "connect_refused",
		"weir.reason.detail": "dial 10.0.0.5:80: refused\nsecond line", "weir.lost_before": 7.0,
		"weir.policy": "no policy allowed it", "weir.policy.audited": "shop/a,shop/b",
	} {
		if got[key] != want {
			t.Errorf("%s: %v, want %v", key, got[key], want)
		}
	}
}

// FuzzALineIsReadAsItWasWritten: for encoding/json a line is the Record of its row.
func FuzzALineIsReadAsItWasWritten(f *testing.F) {
	f.Add("shop/back", "/a b\"\\\x01é\xff<&>", "HTTP/1.1", "14", int64(1_700_000_000_123_456_789), int64(1_000_000_001), uint64(1)<<60, uint32(200), []byte("0123456789abcdef01234567"))
	f.Add("", "", "", "", int64(0), int64(-1), uint64(0), uint32(0), []byte{})
	f.Fuzz(func(t *testing.T, service, path, protocol, grpc string, start, nanos int64, bytes uint64, status uint32, ids []byte) {
		ids = append(ids, make([]byte, 24)...)
		start %= 1 << 60 // years of four digits
		row := journal.Record{
			StartUnixNanos: start, Service: service, Path: path, Protocol: protocol, GRPCStatus: grpc, Error: path, Reason: service, Policy: path, Audited: service,
			TotalNanos: nanos, FirstByteNanos: nanos, SentBytes: bytes, ResponseBodyBytes: bytes, Status: status, DroppedBefore: bytes,
			TraceID: [16]byte(ids), SpanID: [8]byte(ids[16:]),
		}
		decoder := json.NewDecoder(strings.NewReader(string(appendLine(nil, "shop/front", &row))))
		decoder.DisallowUnknownFields()
		var got Record
		if err := decoder.Decode(&got); err != nil {
			t.Fatal(err)
		}
		seconds := func(nanos int64) float64 {
			s, err := strconv.ParseFloat(fmt.Sprintf("%de-9", nanos), 64)
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		// JSON is UTF-8.
		for _, text := range []*string{&row.Service, &row.Path, &row.Protocol, &row.GRPCStatus, &row.Error, &row.Reason, &row.Policy, &row.Audited} {
			*text = string([]rune(*text))
		}
		want := Record{
			Timestamp: time.Unix(0, start).UTC(), Direction: "outbound", Pod: "shop/front", Service: row.Service, ErrorType: row.Reason,
			Reason: row.Reason, Detail: row.Error, Policy: row.Policy, Audited: row.Audited, Sent: bytes, TimeTotal: seconds(nanos), Lost: bytes,
		}
		if row.Protocol != "" {
			want.HTTP = &HTTP{
				Path: row.Path, Status: status, GRPCStatus: row.GRPCStatus, Version: strings.TrimPrefix(row.Protocol, "HTTP/"),
				ResponseBody: bytes, TimeFirstByte: seconds(nanos),
			}
			if row.TraceID != [16]byte{} {
				want.Trace, want.Span = hex.EncodeToString(row.TraceID[:]), hex.EncodeToString(row.SpanID[:])
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	})
}

// BenchmarkLine is what a record costs the agent that has read it.
func BenchmarkLine(b *testing.B) {
	record := journal.Record{
		StartUnixNanos: 1_700_000_000_123_456_789, Direction: proxypb.Direction_OUTBOUND,
		ClientAddress: netip.MustParseAddrPort("10.244.0.5:40000"), ServerAddress: netip.MustParseAddrPort("10.96.0.1:80"), Service: "shop/back",
		UpstreamAddress: netip.MustParseAddrPort("10.244.0.7:8080"), UpstreamLocalAddress: netip.MustParseAddrPort("10.244.0.5:40001"), UpstreamPod: "shop/back-7d4b9c6f5d-abcde",
		SentBytes: 300, ReceivedBytes: 2000, TotalNanos: 2_345_678, RouteNanos: 12_345, FirstByteNanos: 1_987_654,
		Protocol: "HTTP/1.1", Method: "GET", Path: "/a/path/of/some/length", Route: "HTTPRoute/shop/back", Status: 200, Attempts: 1,
		TraceID: [16]byte{1}, SpanID: [8]byte{2}, ResponseBodyBytes: 1800,
	}
	var out []byte
	b.ReportAllocs()
	for b.Loop() {
		out = appendLine(out[:0], "shop/front", &record)
	}
}
