package telemetry

import (
	"fmt"
	"math"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"

	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/proxypb"
)

// fakeWorkloads knows the pod shop/front and the address 10.244.0.9.
type fakeWorkloads struct{}

func (fakeWorkloads) Workload(namespace, pod string) string {
	if namespace+"/"+pod == "shop/front" {
		return "shop/web"
	}
	return ""
}

func (fakeWorkloads) Callers(addrs map[netip.Addr]string) {
	known := netip.MustParseAddr("10.244.0.9")
	if _, asked := addrs[known]; asked {
		addrs[known] = "edge/ingress"
	}
}

const (
	outbound = proxypb.Direction_OUTBOUND
	inbound  = proxypb.Direction_INBOUND
)

// took is a histogram of n values of v seconds, which is no bound of a bucket.
func took(n uint64, v float64) *proxypb.Histogram {
	h := &proxypb.Histogram{
		Sum: float64(n) * v, Classic: make([]uint64, len(proxypb.Buckets)+1),
		NativeIndexes: []int32{int32(math.Ceil(math.Log2(v) * 8))}, NativeCounts: []uint64{n},
	}
	i, _ := slices.BinarySearch(proxypb.Buckets, v)
	h.Classic[i] = n
	return h
}

// everything are messages with something of every metric.
func everything() []*proxypb.Metrics {
	back := &proxypb.Peers{Direction: outbound, Service: "shop/back", Workload: "shop/backend"}
	return []*proxypb.Metrics{{Number: 1, Traffic: []*proxypb.Traffic{
		{Peers: back, Protocol: "HTTP/1.1", Route: "HTTPRoute/shop/back", Status: 200, Duration: took(3, 0.002), SentBytes: 30, ReceivedBytes: 300, Retries: 1},
		{Peers: back, Protocol: "HTTP/1.1", Route: "HTTPRoute/shop/back", Status: 503, Reason: "upstream_closed", Duration: took(1, 0.2)},
		{Peers: &proxypb.Peers{Direction: outbound, Service: "data/db"}, Opened: 2, Closed: 1, Reason: "", SentBytes: 5, ReceivedBytes: 6},
		{Peers: &proxypb.Peers{Direction: inbound, Client: "10.244.0.9"}, Protocol: "HTTP/2", GrpcStatus: "14", Status: 200, Duration: took(1, 0.02)},
		{Peers: &proxypb.Peers{Direction: inbound, Client: "10.244.7.7"}, Closed: 1, Reason: "client_gone"},
		{Peers: &proxypb.Peers{Direction: inbound, Other: true}, Protocol: "HTTP/1.0", Duration: took(1, 0.02), Reason: "client_gone"},
	}, Open: []*proxypb.Open{{Peers: back, Requests: 2}, {Peers: &proxypb.Peers{Direction: outbound}, Connections: 4}},
		Endpoints: []*proxypb.Endpoints{{Peers: back, Ready: 2, Ejected: 1}}, Ejections: []*proxypb.Ejections{{Peers: back, Count: 1}},
		Failures:         []*proxypb.Failures{{Peers: back, Reason: "cert_expired", Count: 2}, {Peers: &proxypb.Peers{Direction: outbound, Other: true}, Reason: "connect_refused", Count: 1}},
		OutboundOverhead: took(4, 0.0001), InboundOverhead: took(2, 0.0002),
		Decisions: []*proxypb.Decisions{
			{Peers: &proxypb.Peers{Direction: inbound, Client: "10.244.0.9"}, Policy: "shop/p", Verdict: proxypb.Decisions_ALLOW, Count: 3},
			{Peers: &proxypb.Peers{Direction: inbound, Client: "10.244.0.9"}, Policy: "no policy allowed it", Verdict: proxypb.Decisions_DENY, Count: 2},
			{Peers: &proxypb.Peers{Direction: inbound, Other: true}, Policy: "shop/q", Verdict: proxypb.Decisions_AUDIT_DENY, Count: 1},
		},
	}}
}

// clock is a time that a test sets.
type clock struct{ now time.Time }

func newTraffic() (*Traffic, *clock, *prometheus.Registry) {
	c := &clock{time.Unix(1000, 0)}
	traffic := NewTraffic(fakeWorkloads{}, func() time.Time { return c.now })
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(traffic)
	return traffic, c, registry
}

func TestLabelsNameBothEndsByTheirWorkloads(t *testing.T) {
	traffic, _, registry := newTraffic()
	for _, m := range everything() {
		traffic.Report(instance, m)
	}
	const web = `source_namespace="shop",source_workload="web"`
	const intoWeb = `destination_namespace="shop",destination_service="unknown",destination_workload="web",direction="inbound"`
	const back = `destination_namespace="shop",destination_service="back",destination_workload="backend"`
	const decided = `weir_authorization_decisions_total{destination_namespace="shop",destination_service="unknown",destination_workload="web",policy=`
	want := `
# HELP weir_authorization_decisions_total ` + decisionsHelp + `
# TYPE weir_authorization_decisions_total counter
` + decided + `"no policy allowed it",source_namespace="edge",source_workload="ingress",verdict="deny"} 2
` + decided + `"shop/p",source_namespace="edge",source_workload="ingress",verdict="allow"} 3
` + decided + `"shop/q",source_namespace="_other",source_workload="_other",verdict="audit_deny"} 1
# HELP weir_endpoint_ejections_total How often a proxy set an endpoint aside because it failed.
# TYPE weir_endpoint_ejections_total counter
weir_endpoint_ejections_total{` + back + `,` + web + `} 1
# HELP weir_endpoint_failures_total ` + failuresHelp + `
# TYPE weir_endpoint_failures_total counter
weir_endpoint_failures_total{` + back + `,reason="cert_expired",` + web + `} 2
weir_endpoint_failures_total{destination_namespace="_other",destination_service="_other",destination_workload="_other",reason="connect_refused",` + web + `} 1
# HELP weir_http_requests_in_flight Requests that went to an endpoint and have not ended.
# TYPE weir_http_requests_in_flight gauge
weir_http_requests_in_flight{` + back + `,direction="outbound",` + web + `} 2
# HELP weir_http_requests_total Requests that ended.
# TYPE weir_http_requests_total counter
weir_http_requests_total{code="200",` + back + `,direction="outbound",grpc_status="",protocol="http1",reason="",route="HTTPRoute/shop/back",` + web + `,tls="none"} 3
weir_http_requests_total{code="503",` + back + `,direction="outbound",grpc_status="",protocol="http1",reason="upstream_closed",route="HTTPRoute/shop/back",` + web + `,tls="none"} 1
weir_http_requests_total{code="200",` + intoWeb + `,grpc_status="14",protocol="grpc",reason="",route="",source_namespace="edge",source_workload="ingress",tls="none"} 1
weir_http_requests_total{code="",` + intoWeb + `,grpc_status="",protocol="http1",reason="client_gone",route="",source_namespace="_other",source_workload="_other",tls="none"} 1
# HELP weir_retries_total Requests that were sent again; the first time is not counted.
# TYPE weir_retries_total counter
weir_retries_total{` + back + `,direction="outbound",` + web + `} 1
# HELP weir_tcp_connections_closed_total Connections that ended, of those that are passed on as they are.
# TYPE weir_tcp_connections_closed_total counter
weir_tcp_connections_closed_total{destination_namespace="data",destination_service="db",destination_workload="db",direction="outbound",reason="",` + web + `} 1
weir_tcp_connections_closed_total{` + intoWeb + `,reason="client_gone",source_namespace="unknown",source_workload="unknown"} 1
# HELP weir_tcp_connections_open Connections that are passed on as they are, now.
# TYPE weir_tcp_connections_open gauge
weir_tcp_connections_open{destination_namespace="unknown",destination_service="unknown",destination_workload="unknown",direction="outbound",reason="",` + web + `} 4
`
	err := testutil.GatherAndCompare(registry, strings.NewReader(want), "weir_authorization_decisions_total", "weir_endpoint_ejections_total", "weir_endpoint_failures_total", "weir_http_requests_in_flight",
		"weir_http_requests_total", "weir_retries_total", "weir_tcp_connections_closed_total", "weir_tcp_connections_open")
	if err != nil {
		t.Error(err)
	}
}

// TestAMessageIsCountedOnce: a session that broke after it was counted sends it again.
func TestAMessageIsCountedOnce(t *testing.T) {
	traffic, _, registry := newTraffic()
	m := everything()[0]
	traffic.Report(instance, m)
	traffic.Report(instance, m)
	other := launch.NewInstance(launch.Attachment{PodNamespace: "shop", PodName: "front"}, "")
	traffic.Report(other, m) // of another proxy
	m.Number = 2
	traffic.Report(instance, m)
	if got := value(t, registry, "weir_http_requests_total", `code="200"`, "back"); got != 9 {
		t.Errorf("%v requests, want 9", got)
	}
	if got := value(t, registry, "weir_http_requests_in_flight"); got != 4 {
		t.Errorf("%v in flight, want those of two proxies", got)
	}
	traffic.Forget(other)
	if got := value(t, registry, "weir_http_requests_in_flight"); got != 2 {
		t.Errorf("%v in flight when one proxy is gone, want 2", got)
	}
	if got := value(t, registry, "weir_http_requests_total", `code="200"`, "back"); got != 9 {
		t.Errorf("%v requests when one proxy is gone, want 9", got)
	}
}

func TestHistogramsHaveClassicAndNativeBuckets(t *testing.T) {
	traffic, _, registry := newTraffic()
	traffic.Report(instance, everything()[0])
	h := find(t, registry, "weir_http_request_duration_seconds", `result="ok"`, "back")[0].GetHistogram()
	if h.GetSampleCount() != 3 || math.Abs(h.GetSampleSum()-0.006) > 1e-9 || len(h.GetBucket()) != len(proxypb.Buckets) {
		t.Errorf("%v", h)
	}
	for _, b := range h.GetBucket() {
		want := uint64(0)
		if b.GetUpperBound() >= 0.002 {
			want = 3
		}
		if b.GetCumulativeCount() != want {
			t.Errorf("up to %v: %d, want %d", b.GetUpperBound(), b.GetCumulativeCount(), want)
		}
	}
	if h.GetSchema() != 3 || len(h.GetPositiveSpan()) != 1 || h.GetPositiveSpan()[0].GetOffset() != -71 || !cmp.Equal(h.GetPositiveDelta(), []int64{3}) {
		t.Errorf("native: %v", h) // 2^(-72/8) = 0.00195 < 0.002 <= 2^(-71/8) = 0.00213
	}
	if got := find(t, registry, "weir_http_request_duration_seconds", `result="error"`); len(got) != 3 {
		t.Errorf("%d series of errors, want 3: %v", len(got), got)
	}
}

func TestAHistogramOfOtherBucketsIsLeftOut(t *testing.T) {
	traffic, _, registry := newTraffic()
	traffic.Report(instance, &proxypb.Metrics{Number: 1, OutboundOverhead: &proxypb.Histogram{Sum: 1, Classic: []uint64{1}, Zero: 1}})
	far := took(1, 1)
	far.NativeIndexes[0] = maxIndex + 1
	traffic.Report(instance, &proxypb.Metrics{Number: 2, OutboundOverhead: far})
	if got := find(t, registry, "weir_proxy_overhead_seconds"); got != nil {
		t.Errorf("%v", got)
	}
}

func TestIdleSeriesGo(t *testing.T) {
	traffic, clock, registry := newTraffic()
	m := everything()[0]
	traffic.Report(instance, m)
	clock.now = clock.now.Add(idle / 2)
	traffic.Report(instance, &proxypb.Metrics{Number: 2, Traffic: m.GetTraffic()[:1]})
	clock.now = clock.now.Add(idle / 2)
	got := find(t, registry, "weir_http_requests_total")
	if len(got) != 1 || got[0].GetCounter().GetValue() != 6 {
		t.Errorf("%v", got)
	}
}

func TestTooManySeriesAreOne(t *testing.T) {
	traffic, _, registry := newTraffic()
	m := &proxypb.Metrics{Number: 1}
	for i := range maxSeries + 5 {
		m.Traffic = append(m.Traffic, &proxypb.Traffic{Peers: &proxypb.Peers{Direction: outbound, Service: fmt.Sprintf("shop/s%d", i)}, Closed: 1})
	}
	traffic.Report(instance, m)
	if got := len(find(t, registry, "weir_tcp_connections_closed_total")); got != maxSeries+1 {
		t.Errorf("%d series", got)
	}
	if got := value(t, registry, "weir_tcp_connections_closed_total", `direction="_other"`, `destination_service="_other"`); got != 5 {
		t.Errorf("%v others, want 5", got)
	}
}

// find are the series of a metric whose labels have all of the texts.
func find(t *testing.T, registry prometheus.Gatherer, name string, texts ...string) []*dto.Metric {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var out []*dto.Metric
	for _, f := range families {
		for _, m := range f.GetMetric() {
			labels := ""
			for _, l := range m.GetLabel() {
				labels += fmt.Sprintf("%s=%q ", l.GetName(), l.GetValue())
			}
			if f.GetName() == name && !slices.ContainsFunc(texts, func(text string) bool { return !strings.Contains(labels, text) }) {
				out = append(out, m)
			}
		}
	}
	return out
}

// value is that of the one series that find finds.
func value(t *testing.T, registry prometheus.Gatherer, name string, texts ...string) float64 {
	t.Helper()
	found := find(t, registry, name, texts...)
	if len(found) != 1 {
		t.Fatalf("%d series: %v", len(found), found)
	}
	return found[0].GetCounter().GetValue() + found[0].GetGauge().GetValue()
}

// TestDocument holds METRICS.md to what there is.
func TestDocument(t *testing.T) {
	const path = "../../manifests/METRICS.md"
	want := document(t)
	if *update {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("METRICS.md is not true any more (-code +document), see -update:\n%s", diff)
	}
}

// TestACallerIsOfTheNamespaceOfItsIdentity: an address may be another pod's by now.
func TestACallerIsOfTheNamespaceOfItsIdentity(t *testing.T) {
	for _, c := range []struct{ shown, client, namespace, workload string }{
		{"", "10.244.0.9", "edge", "ingress"},
		{"edge", "10.244.0.9", "edge", "ingress"},
		{"shop", "10.244.0.9", "shop", Unknown},
		{"shop", "10.244.7.7", "shop", Unknown},
		{"shop", "", "shop", Unknown},
		{"", "", Unknown, Unknown},
	} {
		traffic, _, registry := newTraffic()
		peers := &proxypb.Peers{Direction: inbound, Client: c.client, Namespace: c.shown}
		traffic.Report(instance, &proxypb.Metrics{
			Number:    1,
			Traffic:   []*proxypb.Traffic{{Peers: peers, Protocol: "HTTP/2", Status: 200, Duration: took(1, 0.02), MutualTls: c.shown != ""}},
			Decisions: []*proxypb.Decisions{{Peers: peers, Policy: "shop/p", Verdict: proxypb.Decisions_ALLOW, Count: 1}},
		})
		tls := map[bool]string{true: "mutual", false: "none"}[c.shown != ""]
		source := []string{`source_namespace="` + c.namespace + `"`, `source_workload="` + c.workload + `"`}
		if got := value(t, registry, "weir_http_requests_total", append(source, `tls="`+tls+`"`)...); got != 1 {
			t.Errorf("%v: %v requests", c, got)
		}
		if got := value(t, registry, "weir_authorization_decisions_total", source...); got != 1 {
			t.Errorf("%v: %v decisions", c, got)
		}
	}
}
