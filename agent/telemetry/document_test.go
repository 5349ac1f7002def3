package telemetry

import (
	"flag"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/agent/proxypb"
)

var update = flag.Bool("update", false, "write the document anew")

// labelOrder is the order of labels in the document, which Prometheus does not keep.
var labelOrder = []string{
	"direction", "source_namespace", "source_workload", "destination_namespace", "destination_workload", "destination_service",
	"route", "protocol", "code", "grpc_status", "op", "result", "reason", "tls", "policy", "verdict", "state", "phase", "kind", "family", "version",
}

// document has every metric that is Weir's own, with its labels.
func document(t *testing.T) string {
	families, err := testMetrics().registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	b.WriteString(`# Metrics

The agent serves them on port 15090 of its node, for itself and for all proxies of
the node (and Go's and the process's own, of the agent). The counters of proxies are
the agent's: a proxy's restart resets none, the agent's restart does. A proxy tells
what it counted within 5 s, and at its end.

| Metric | Type | Labels | What it is |
|---|---|---|---|
`)
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), "weir_") {
			continue
		}
		var labels []string
		for _, l := range f.GetMetric()[0].GetLabel() {
			labels = append(labels, l.GetName())
		}
		slices.SortFunc(labels, func(a, b string) int { return slices.Index(labelOrder, a) - slices.Index(labelOrder, b) })
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", f.GetName(), strings.ToLower(f.GetType().String()), strings.Join(labels, ", "), f.GetHelp())
	}
	fmt.Fprintf(&b, `
Histograms have classic buckets, up to
%s seconds, and native ones beside them.

| Label | Values |
|---|---|
| direction | %[2]soutbound%[2]s: counted by the caller's proxy; %[2]sinbound%[2]s: by the called one's. A request inside the mesh is counted by both |
| source_namespace, source_workload | the caller's: the pod's controller, a ReplicaSet's Deployment, a Job's CronJob, or a pod of its own; inbound by the caller's address, if that is a pod's. The namespace is that of the caller's identity, if it has shown one; a workload of another namespace is then not its |
| destination_namespace, destination_workload | the same of the endpoint, if that is a pod; else the Service's name |
| destination_service | the Service that was called; inbound nobody says |
| route | %[2]sKind/namespace/name%[2]s of the route that governed, or none |
| protocol | %[2]shttp1%[2]s, %[2]shttp2%[2]s, %[2]sgrpc%[2]s |
| code | of the answer that the client got; none: there was none |
| grpc_status | a number, of gRPC alone |
| result | %[2]serror%[2]s: with a reason, a code from 500 on, or a gRPC status that is the server's fault; else %[2]sok%[2]s. Of operations: whether they succeeded |
| reason | why it failed, in the access log's words; none: it did not |
| tls | %[2]smutual%[2]s: between two proxies, each of which has shown its identity; else %[2]snone%[2]s |
| policy | the AuthorizationPolicy that decided, or "no policy allowed it"; none: no ALLOW policy selects the pod |
| verdict | %[2]sallow%[2]s, %[2]sdeny%[2]s, or %[2]saudit_deny%[2]s: it would be refused if the policy had no %[2]saudit%[2]s |
| state | of endpoints %[2]sready%[2]s, %[2]sejected%[2]s; of pods %[2]scaptured%[2]s, %[2]spending%[2]s, %[2]sexcluded%[2]s |
| kind | of config %[2]sproxy%[2]s, %[2]sidentity%[2]s, %[2]sdestination%[2]s; of certificates %[2]sroot%[2]s, %[2]sissuer%[2]s, %[2]sleaf%[2]s |

What nobody knows is %[2]s%[3]s%[2]s. No label is a host, a path, a user agent or a pod. A
series of proxies that nothing is added to for %[4]d minutes goes. Of too many sets of
labels, %[5]d a metric and 512 a proxy between two reports, the rest is %[2]s%[6]s%[2]s; callers
are not told apart before that.
`, joined(proxypb.Buckets), "`", Unknown, int(idle.Minutes()), maxSeries, Other)
	return b.String()
}

func joined(bounds []float64) string {
	var out []string
	for _, b := range bounds {
		out = append(out, fmt.Sprint(b))
	}
	return strings.Join(out, ", ")
}
