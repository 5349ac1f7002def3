package telemetry

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/proxypb"
)

var instance = launch.NewInstance(launch.Attachment{PodNamespace: "shop", PodName: "front"}, "")

func line(t *testing.T, r *proxypb.AccessLog) map[string]any {
	t.Helper()
	var out bytes.Buffer
	NewAccessLog(&out).Write(instance, []*proxypb.AccessLog{r})
	text, ended := strings.CutSuffix(out.String(), "\n")
	if !ended || strings.Contains(text, "\n") {
		t.Fatalf("not one line: %q", out.String())
	}
	var got map[string]any
	if err := json.Unmarshal([]byte(text), &got); err != nil {
		t.Fatal(err)
	}
	return got
}

func TestAConnectionIsOneLineInTheNamesOfTheDocument(t *testing.T) {
	got := line(t, &proxypb.AccessLog{
		StartUnixNanos: 1_500_000_000, Direction: proxypb.AccessLog_OUTBOUND,
		ClientAddress: "10.0.0.5:40000", ServerAddress: "10.96.0.1:80", Service: "shop/back",
		UpstreamAddress: "10.0.0.7:8080", UpstreamLocalAddress: "10.0.0.5:40001", UpstreamPod: "shop/back-1",
		SentBytes: 3, ReceivedBytes: 4, TotalNanos: 2_000_000, RouteNanos: 1000, ConnectNanos: 5000,
	})
	want := map[string]any{
		"timestamp": "1970-01-01T00:00:01.5Z", "weir.direction": "outbound", "weir.pod": "shop/front",
		"client.address": "10.0.0.5:40000", "server.address": "10.96.0.1:80", "weir.destination.service": "shop/back",
		"weir.upstream.address": "10.0.0.7:8080", "weir.upstream.local_address": "10.0.0.5:40001", "weir.upstream.pod": "shop/back-1",
		"weir.sent.bytes": 3.0, "weir.received.bytes": 4.0,
		"weir.time.total": 0.002, "weir.time.route": 0.000001, "weir.time.connect": 0.000005,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestARequestIsOneLineInTheNamesOfTheDocument(t *testing.T) {
	got := line(t, &proxypb.AccessLog{
		Direction: proxypb.AccessLog_INBOUND, Protocol: "HTTP/1.1", Method: "POST", Path: "/cart", Status: 503, Route: "HTTPRoute/shop/back",
		Attempts: 2, FirstByteNanos: 3_000_000, GrpcStatus: "14", RequestBodyBytes: 10, ResponseBodyBytes: 20,
		TraceId: []byte("\x0a0123456789abcde"), SpanId: []byte("\xff1234567"),
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

func TestOneWriteHasAllLines(t *testing.T) {
	var out writes
	NewAccessLog(&out).Write(instance, []*proxypb.AccessLog{{Service: "a"}, {Service: "b"}, {Service: "c"}})
	if len(out) != 1 || strings.Count(out[0], "\n") != 3 {
		t.Errorf("%q", out)
	}
}

// writes are what was written, at a time.
type writes []string

func (w *writes) Write(b []byte) (int, error) {
	*w = append(*w, string(b))
	return len(b), nil
}

func TestAFailureSaysItsReasonAndLostRecordsAreCounted(t *testing.T) {
	got := line(t, &proxypb.AccessLog{
		Direction: proxypb.AccessLog_INBOUND, Reason: "connect_refused", Error: "dial 10.0.0.5:80: refused\nsecond line", DroppedBefore: 7,
	})
	for key, want := range map[string]any{
		"weir.direction": "inbound", "error.type": "connect_refused", "weir.reason": "connect_refused",
		"weir.reason.detail": "dial 10.0.0.5:80: refused\nsecond line", "weir.lost_before": 7.0,
	} {
		if got[key] != want {
			t.Errorf("%s: %v, want %v", key, got[key], want)
		}
	}
}
