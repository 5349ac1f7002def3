package controller

import (
	"context"
	"net"
	"net/http"

	"k8s.io/client-go/tools/leaderelection"

	"github.com/weirmesh/weir/agent/telemetry"
)

// serveHealth answers kubelet until ctx is done: /healthz fails for a leader that
// has not noticed that its lease ran out, /readyz until the cluster is known. Prometheus
// finds metrics at /metrics.
func serveHealth(ctx context.Context, listener net.Listener, watchdog *leaderelection.HealthzAdaptor, synced func() bool, metrics http.Handler) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		if err := watchdog.Check(r); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !synced() {
			http.Error(w, "nodes, agents and routes are not known yet: see the log for what the API server answers", http.StatusServiceUnavailable)
		}
	})
	mux.Handle("GET /metrics", metrics)
	return telemetry.Serve(ctx, listener, mux)
}
