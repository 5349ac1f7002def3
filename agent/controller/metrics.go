package controller

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics count what the signer does, for Prometheus.
type metrics struct {
	registry *prometheus.Registry
	requests *prometheus.CounterVec
	cas      *prometheus.GaugeVec
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "weir_signer_requests_total",
			Help: "Requests for certificates that this replica answered, by result: signed, error (it is tried again), or why one was denied.",
		}, []string{"result"}),
		cas: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "weir_signer_ca_usable",
			Help: "1 if the leader can use what is in that Secret, else 0; an operator's that is not there is fine. Of a replica that does not lead there is none.",
		}, []string{"secret"}),
	}
	m.registry.MustRegister(m.requests, m.cas)
	return m
}

func (m *metrics) request(result string) { m.requests.WithLabelValues(result).Inc() }

func (m *metrics) ca(keyring, issuer bool) {
	for secret, fine := range map[string]bool{caSecret: keyring, issuerSecret: issuer} {
		value := 0.0
		if fine {
			value = 1
		}
		m.cas.WithLabelValues(secret).Set(value)
	}
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}
