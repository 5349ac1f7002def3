package telemetry

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/proxypb"
)

// States of captured pods.
const (
	StateCaptured = "captured" // rules are in place, a proxy is looked after
	StatePending  = "pending"  // an ADD is under way
	StateExcluded = "excluded" // released, the last connections are ending
)

// Metrics counts what the agent does, for Prometheus, and has what the proxies count
// (Traffic). Labels are bounded: none names a pod. manifests/METRICS.md has them all.
type Metrics struct {
	*Traffic

	registry    *prometheus.Registry
	operations  *prometheus.CounterVec
	durations   *prometheus.HistogramVec
	restarts    prometheus.Counter
	balancing   *prometheus.GaugeVec
	convergence *prometheus.HistogramVec
	rejections  *prometheus.CounterVec

	certificates *certificates
}

// NewMetrics makes the agent's metrics. pods counts pods by state when asked, proxies
// proxies by version.
func NewMetrics(version string, workloads Workloads, pods, proxies func() map[string]int) *Metrics {
	m := &Metrics{
		Traffic:  NewTraffic(workloads, time.Now),
		registry: prometheus.NewRegistry(),
		operations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "weir_capture_operations_total",
			Help: "What was done about the capture of pods: add, capture and release in place, repair of drift.",
		}, []string{"op", "result"}),
		durations: newHistogram("weir_capture_duration_seconds",
			"Time that the phases of an ADD took: decide, ready (the proxy is started and has its config), rules.", "phase"),
		convergence: newHistogram("weir_config_convergence_seconds",
			"Time from a change of the cluster that the agent saw until a proxy that it matters to acknowledged its new config.", "kind"),
		rejections: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "weir_config_rejections_total",
			Help: "Resources that a proxy refused to take; it keeps what it had.",
		}, []string{"kind"}),
		certificates: &certificates{leaves: map[*launch.Instance]time.Time{}},
		restarts: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "weir_proxy_restarts_total",
			Help: "Proxies that died and were started again.",
		}),
		balancing: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "weir_connect_time_balancing",
			Help: "1 if this node's kernel chooses a Service's endpoint while an application connects, so that routes are bypassed, else 0; by family, once it is known.",
		}, []string{"family"}),
	}
	info := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "weir_build_info", Help: "Always 1; the version is in the label.",
	}, []string{"version"})
	info.WithLabelValues(version).Set(1)
	m.registry.MustRegister(m.operations, m.durations, m.restarts, m.balancing, m.convergence, m.rejections, info, m.certificates, m.Traffic, podStates(pods), proxyVersions(proxies), collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// newHistogram has the classic buckets, and native ones beside them.
func newHistogram(name, help string, labels ...string) *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: name, Help: help, Buckets: proxypb.Buckets, NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 160,
	}, labels)
}

// Converged records how long it took until a proxy had a change of its config. kind
// is "proxy", "identity" or "destination", as for Rejected.
func (m *Metrics) Converged(kind string, took time.Duration) {
	m.convergence.WithLabelValues(kind).Observe(took.Seconds())
}

// Rejected counts a resource that a proxy refused.
func (m *Metrics) Rejected(kind string) { m.rejections.WithLabelValues(kind).Inc() }

// Operation counts one operation and whether it succeeded.
func (m *Metrics) Operation(op string, err error) {
	result := "ok"
	if err != nil {
		result = "error"
	}
	m.operations.WithLabelValues(op, result).Inc()
}

// Phase records how long one phase of an ADD took.
func (m *Metrics) Phase(phase string, took time.Duration) {
	m.durations.WithLabelValues(phase).Observe(took.Seconds())
}

// ProxyRestarted counts a proxy that died and was started again.
func (m *Metrics) ProxyRestarted() { m.restarts.Inc() }

// ConnectTimeBalancing says whether the node balances connections to an address
// of that family before the rules see them.
func (m *Metrics) ConnectTimeBalancing(addr netip.Addr, does bool) {
	family, value := "ipv6", 0.0
	if addr.Is4() {
		family = "ipv4"
	}
	if does {
		value = 1
	}
	m.balancing.WithLabelValues(family).Set(value)
}

// podStates is weir_capture_pods, counted when it is asked for.
type podStates func() map[string]int

var podStatesDesc = prometheus.NewDesc("weir_capture_pods", "Pods of this node that have a proxy, by state.", []string{"state"}, nil)

// Describe implements prometheus.Collector.
func (podStates) Describe(ch chan<- *prometheus.Desc) { ch <- podStatesDesc }

// Collect implements prometheus.Collector.
func (p podStates) Collect(ch chan<- prometheus.Metric) {
	counts := p()
	for _, state := range []string{StateCaptured, StatePending, StateExcluded} {
		ch <- prometheus.MustNewConstMetric(podStatesDesc, prometheus.GaugeValue, float64(counts[state]), state)
	}
}

// proxyVersions is weir_proxies, counted when it is asked for.
type proxyVersions func() map[string]int

var proxyVersionsDesc = prometheus.NewDesc("weir_proxies",
	"Proxies of this node that the agent is in touch with, by what they say their version is: more than one while an upgrade is under way.", []string{"version"}, nil)

// Describe implements prometheus.Collector.
func (proxyVersions) Describe(ch chan<- *prometheus.Desc) { ch <- proxyVersionsDesc }

// Collect implements prometheus.Collector.
func (p proxyVersions) Collect(ch chan<- prometheus.Metric) {
	for version, n := range p() {
		ch <- prometheus.MustNewConstMetric(proxyVersionsDesc, prometheus.GaugeValue, float64(n), version)
	}
}

// Handler answers with all metrics.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}

// Serve answers HTTP on listener until ctx is done.
func Serve(ctx context.Context, listener net.Listener, handler http.Handler) error {
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
