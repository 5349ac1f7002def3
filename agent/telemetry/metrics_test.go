package telemetry

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/weirmesh/weir/agent/launch"
)

var instance = launch.NewInstance(launch.Attachment{PodNamespace: "shop", PodName: "front"}, "")

func testMetrics() *Metrics {
	m := NewMetrics("v1", fakeWorkloads{}, func() map[string]int { return map[string]int{StateCaptured: 3} },
		func() map[string]int { return map[string]int{"v1": 2, "v0": 1} })
	for _, report := range everything() {
		m.Report(instance, report)
	}
	m.Converged("destination", 3*time.Millisecond)
	m.Rejected("proxy")
	m.Operation("add", nil)
	m.Operation("add", errors.New("no"))
	m.Phase("ready", 10*time.Millisecond)
	m.ProxyRestarted()
	m.Certificate(instance, time.Unix(1772409600, 0))
	m.Authority(func() (time.Time, time.Time) { return time.Unix(1803945600, 0), time.Unix(1788177600, 0) })
	m.ConnectTimeBalancing(netip.MustParseAddr("10.96.0.1"), true)
	m.ConnectTimeBalancing(netip.MustParseAddr("fd00:96::1"), false)
	return m
}

func TestMetricsAreNamedAsPrometheusWantsThem(t *testing.T) {
	problems, err := testutil.GatherAndLint(testMetrics().registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// TestTheFirstCertificateThatEndsIsMeasured: and none, where there is none.
func TestTheFirstCertificateThatEndsIsMeasured(t *testing.T) {
	const head = `
# HELP weir_certificate_not_after_timestamp_seconds When certificates expire, the first of each kind: the roots that are trusted, the issuer's that signs, and the leaves of this node's proxies. Leaves are renewed at half of their life.
# TYPE weir_certificate_not_after_timestamp_seconds gauge
`
	const authority = `weir_certificate_not_after_timestamp_seconds{kind="issuer"} 1.7881776e+09
weir_certificate_not_after_timestamp_seconds{kind="root"} 1.8039456e+09
`
	m := testMetrics()
	compare := func(want string) {
		t.Helper()
		if err := testutil.GatherAndCompare(m.registry, strings.NewReader(want), "weir_certificate_not_after_timestamp_seconds"); err != nil {
			t.Error(err)
		}
	}
	other := launch.NewInstance(launch.Attachment{}, "")
	m.Certificate(other, time.Unix(1772400000, 0))
	compare(head + authority + `weir_certificate_not_after_timestamp_seconds{kind="leaf"} 1.7724e+09` + "\n")
	m.Forget(other)
	compare(head + authority + `weir_certificate_not_after_timestamp_seconds{kind="leaf"} 1.7724096e+09` + "\n")
	m.Forget(instance)
	compare(head + authority)
}

// TestRenewalsAreCounted: not the first certificate, and none twice.
func TestRenewalsAreCounted(t *testing.T) {
	m := testMetrics() // the first
	for _, end := range []int64{1772409600, 1772409700, 1772409700, 1772409800} {
		m.Certificate(instance, time.Unix(end, 0))
	}
	want := `
# HELP weir_certificate_renewals_total Certificates that a proxy of this node uses in the place of one it had before.
# TYPE weir_certificate_renewals_total counter
weir_certificate_renewals_total 2
`
	if err := testutil.GatherAndCompare(m.registry, strings.NewReader(want), "weir_certificate_renewals_total"); err != nil {
		t.Error(err)
	}
}

func TestOperationsAndPodsAreCounted(t *testing.T) {
	want := `
# HELP weir_capture_operations_total What was done about the capture of pods: add, capture and release in place, repair of drift.
# TYPE weir_capture_operations_total counter
weir_capture_operations_total{op="add",result="error"} 1
weir_capture_operations_total{op="add",result="ok"} 1
# HELP weir_capture_pods Pods of this node that have a proxy, by state.
# TYPE weir_capture_pods gauge
weir_capture_pods{state="captured"} 3
weir_capture_pods{state="excluded"} 0
weir_capture_pods{state="pending"} 0
# HELP weir_connect_time_balancing 1 if this node's kernel chooses a Service's endpoint while an application connects, so that routes are bypassed, else 0; by family, once it is known.
# TYPE weir_connect_time_balancing gauge
weir_connect_time_balancing{family="ipv4"} 1
weir_connect_time_balancing{family="ipv6"} 0
# HELP weir_proxies Proxies of this node that the agent is in touch with, by what they say their version is: more than one while an upgrade is under way.
# TYPE weir_proxies gauge
weir_proxies{version="v0"} 1
weir_proxies{version="v1"} 2
`
	err := testutil.GatherAndCompare(testMetrics().registry, strings.NewReader(want), "weir_capture_operations_total", "weir_capture_pods", "weir_connect_time_balancing", "weir_proxies")
	if err != nil {
		t.Error(err)
	}
}
