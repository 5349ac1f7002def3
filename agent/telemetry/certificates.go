package telemetry

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weirmesh/weir/agent/launch"
)

// certificates is weir_certificate_not_after_timestamp_seconds: the first end of each
// kind. A kind of which there is none has no value, so that it does not look expired.
// And it is weir_certificate_renewals_total.
type certificates struct {
	mu        sync.Mutex
	leaves    map[*launch.Instance]time.Time
	renewals  uint64
	authority func() (time.Time, time.Time) // nil: this agent knows of none
}

var certificatesDesc = prometheus.NewDesc("weir_certificate_not_after_timestamp_seconds",
	"When certificates expire, the first of each kind: the roots that are trusted, the issuer's that signs, and the leaves of this node's proxies. Leaves are renewed at half of their life.",
	[]string{"kind"}, nil)

var renewalsDesc = prometheus.NewDesc("weir_certificate_renewals_total",
	"Certificates that a proxy of this node uses in the place of one it had before.", nil, nil)

// Describe implements prometheus.Collector.
func (c *certificates) Describe(ch chan<- *prometheus.Desc) {
	ch <- certificatesDesc
	ch <- renewalsDesc
}

// Collect implements prometheus.Collector.
func (c *certificates) Collect(ch chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	say := func(kind string, end time.Time) {
		if !end.IsZero() {
			ch <- prometheus.MustNewConstMetric(certificatesDesc, prometheus.GaugeValue, float64(end.Unix()), kind)
		}
	}
	if c.authority != nil {
		root, issuer := c.authority()
		say("root", root)
		say("issuer", issuer)
	}
	var first time.Time
	for _, end := range c.leaves {
		if first.IsZero() || end.Before(first) {
			first = end
		}
	}
	say("leaf", first)
	ch <- prometheus.MustNewConstMetric(renewalsDesc, prometheus.CounterValue, float64(c.renewals))
}

// Certificate says when the certificate that a proxy has ends. It may say so again.
func (m *Metrics) Certificate(i *launch.Instance, notAfter time.Time) {
	m.certificates.mu.Lock()
	defer m.certificates.mu.Unlock()
	if before, had := m.certificates.leaves[i]; had && !before.Equal(notAfter) {
		m.certificates.renewals++
	}
	m.certificates.leaves[i] = notAfter
}

// Authority has ends asked when the first root ends that is trusted, and the
// certificate of the key that signs.
func (m *Metrics) Authority(ends func() (time.Time, time.Time)) {
	m.certificates.mu.Lock()
	defer m.certificates.mu.Unlock()
	m.certificates.authority = ends
}

// Forget drops what is known of a proxy that is there no more, but for what it counted.
func (m *Metrics) Forget(i *launch.Instance) {
	m.Traffic.Forget(i)
	m.certificates.mu.Lock()
	defer m.certificates.mu.Unlock()
	delete(m.certificates.leaves, i)
}
