package telemetry

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/proxypb"
)

// Workloads says what pods are one of, as "namespace/name".
type Workloads interface {
	// Workload is empty where it is not known.
	Workload(namespace, pod string) string
	// Callers fills in the workloads of the pods at those addresses; of those that it
	// does not know, nothing.
	Callers(map[netip.Addr]string)
}

// Traffic adds up what the node's proxies count. The counters are the agent's: a
// proxy that ends, or is followed by another one, takes none of them along.
type Traffic struct {
	workloads Workloads
	now       func() time.Time

	requests, durations, requestBodies, responseBodies, inFlight, retries *family
	overhead                                                              *family
	opened, closed, open, sent, received                                  *family
	endpoints, ejections, failures                                        *family
	decisions                                                             *family

	mu      sync.Mutex
	proxies map[*launch.Instance]*reported
}

// reported is what one proxy has said last.
type reported struct {
	number uint64 // of the message
	gauges []gauge
}

// gauge is a value as it is now; the families have the sums over the proxies.
type gauge struct {
	family *family
	labels []string
	value  float64
}

const failuresHelp = "Attempts at an endpoint that failed before anything was sent to it: it could not be connected to, or there was no handshake with it. Another endpoint was tried then, if there was one."

const decisionsHelp = "What AuthorizationPolicies decided of requests, and of connections that are passed on as they are, that came for the application."

// NewTraffic returns one without a count. now is a clock.
func NewTraffic(workloads Workloads, now func() time.Time) *Traffic {
	source := []string{"source_namespace", "source_workload", "destination_namespace", "destination_workload", "destination_service"}
	directed := append([]string{"direction"}, source...)
	request := append(slices.Clone(directed), "route", "protocol")
	connection := append(slices.Clone(directed), "reason")
	counter, value := prometheus.CounterValue, prometheus.GaugeValue
	return &Traffic{
		workloads: workloads, now: now, proxies: map[*launch.Instance]*reported{},
		requests:       newFamily(counter, "weir_http_requests_total", "Requests that ended.", append(slices.Clone(request), "code", "grpc_status", "reason", "tls")...),
		durations:      newFamily(0, "weir_http_request_duration_seconds", "Time from a request's head to the end of its answer.", append(slices.Clone(request), "result", "tls")...),
		overhead:       newFamily(0, "weir_proxy_overhead_seconds", "Time of a request that the proxy itself took: until it was sent, but for connecting, and from the answer's first byte until that was passed on.", "direction"),
		requestBodies:  newFamily(counter, "weir_http_request_body_bytes_total", "Bytes of requests' bodies that were passed on, as they were framed.", directed...),
		responseBodies: newFamily(counter, "weir_http_response_body_bytes_total", "Bytes of answers' bodies that were passed on, as they were framed.", directed...),
		inFlight:       newFamily(value, "weir_http_requests_in_flight", "Requests that went to an endpoint and have not ended.", directed...),
		retries:        newFamily(counter, "weir_retries_total", "Requests that were sent again; the first time is not counted.", directed...),
		opened:         newFamily(counter, "weir_tcp_connections_opened_total", "Connections that began, of those that are passed on as they are.", connection...),
		closed:         newFamily(counter, "weir_tcp_connections_closed_total", "Connections that ended, of those that are passed on as they are.", connection...),
		open:           newFamily(value, "weir_tcp_connections_open", "Connections that are passed on as they are, now.", connection...),
		sent:           newFamily(counter, "weir_tcp_sent_bytes_total", "Bytes towards the destination, of connections that ended.", connection...),
		received:       newFamily(counter, "weir_tcp_received_bytes_total", "Bytes from the destination, of connections that ended.", connection...),
		endpoints:      newFamily(value, "weir_endpoints", "Endpoints of the destinations in use: ready ones, and those of them that a proxy has ejected because they failed; each as often as there are proxies that use it.", append(slices.Clone(source), "state")...),
		decisions:      newFamily(counter, "weir_authorization_decisions_total", decisionsHelp, append(slices.Clone(source), "policy", "verdict")...),
		ejections:      newFamily(counter, "weir_endpoint_ejections_total", "How often a proxy set an endpoint aside because it failed.", source...),
		failures:       newFamily(counter, "weir_endpoint_failures_total", failuresHelp, append(slices.Clone(source), "reason")...),
	}
}

// families are all of them.
func (t *Traffic) families() []*family {
	return []*family{
		t.requests, t.durations, t.overhead, t.requestBodies, t.responseBodies, t.inFlight, t.retries,
		t.opened, t.closed, t.open, t.sent, t.received, t.endpoints, t.ejections,
		t.failures, t.decisions,
	}
}

// Report counts what a proxy says, unless it has said so before.
func (t *Traffic) Report(i *launch.Instance, m *proxypb.Metrics) {
	names := t.names(i, m)
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.proxies[i]
	if p == nil {
		p = &reported{}
		t.proxies[i] = p
	}
	if p.number == m.GetNumber() {
		return
	}
	p.number, p.gauges = m.GetNumber(), nil
	now := t.now()
	for _, x := range m.GetTraffic() {
		t.count(now, names.directed(x.GetPeers()), x)
	}
	t.overhead.merge(now, m.GetOutboundOverhead(), "outbound")
	t.overhead.merge(now, m.GetInboundOverhead(), "inbound")
	for _, x := range m.GetEjections() {
		t.ejections.add(now, x.GetCount(), names.peers(x.GetPeers())...)
	}
	for _, x := range m.GetFailures() {
		t.failures.add(now, x.GetCount(), with(names.peers(x.GetPeers()), x.GetReason())...)
	}
	for _, x := range m.GetDecisions() {
		t.decisions.add(now, x.GetCount(), with(names.peers(x.GetPeers()), x.GetPolicy(), verdict(x.GetVerdict()))...)
	}
	set := func(f *family, value uint64, labels ...string) {
		if value > 0 {
			p.gauges = append(p.gauges, gauge{f, labels, float64(value)})
		}
	}
	for _, x := range m.GetOpen() {
		peers := names.directed(x.GetPeers())
		set(t.inFlight, x.GetRequests(), peers...)
		set(t.open, x.GetConnections(), with(peers, "")...)
	}
	for _, x := range m.GetEndpoints() {
		peers := names.peers(x.GetPeers())
		set(t.endpoints, x.GetReady(), with(peers, "ready")...)
		set(t.endpoints, x.GetEjected(), with(peers, "ejected")...)
	}
}

// Forget drops the gauges of a proxy that is there no more.
func (t *Traffic) Forget(i *launch.Instance) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.proxies, i)
}

func (t *Traffic) count(now time.Time, peers []string, x *proxypb.Traffic) {
	if x.GetProtocol() == "" {
		t.opened.add(now, x.GetOpened(), with(peers, "")...)
		ended := with(peers, x.GetReason())
		t.closed.add(now, x.GetClosed(), ended...)
		t.sent.add(now, x.GetSentBytes(), ended...)
		t.received.add(now, x.GetReceivedBytes(), ended...)
		return
	}
	route, code := x.GetRoute(), ""
	if x.GetStatus() > 0 {
		code = strconv.FormatUint(uint64(x.GetStatus()), 10)
	}
	request := with(peers, route, protocol(x))
	n := uint64(0)
	for _, c := range x.GetDuration().GetClassic() {
		n += c
	}
	t.requests.add(now, n, with(request, code, x.GetGrpcStatus(), x.GetReason(), tls(x))...)
	t.durations.merge(now, x.GetDuration(), with(request, result(x), tls(x))...)
	t.requestBodies.add(now, x.GetSentBytes(), peers...)
	t.responseBodies.add(now, x.GetReceivedBytes(), peers...)
	t.retries.add(now, x.GetRetries(), peers...)
}

// tls is the value of the label: "mutual" between two proxies.
func tls(x *proxypb.Traffic) string {
	if x.GetMutualTls() {
		return "mutual"
	}
	return "none"
}

// protocol is "http1", "http2" or "grpc".
func protocol(x *proxypb.Traffic) string {
	if x.GetGrpcStatus() != "" {
		return "grpc"
	}
	version, _, _ := strings.Cut(strings.TrimPrefix(x.GetProtocol(), "HTTP/"), ".")
	return "http" + version
}

// result is "error" for what a server or the proxy failed to do, else "ok".
func result(x *proxypb.Traffic) string {
	if x.GetReason() != "" || x.GetStatus() >= 500 {
		return "error"
	}
	switch x.GetGrpcStatus() {
	// The server's errors, as OpenTelemetry has them: UNKNOWN, DEADLINE_EXCEEDED,
	// UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS.
	case "2", "4", "12", "13", "14", "15":
		return "error"
	}
	return "ok"
}

// verdict is the value of the label; of one that is unknown, as of another version, "".
func verdict(v proxypb.Decisions_Verdict) string {
	switch v {
	case proxypb.Decisions_ALLOW:
		return "allow"
	case proxypb.Decisions_DENY:
		return "deny"
	case proxypb.Decisions_AUDIT_DENY:
		return "audit_deny"
	}
	return ""
}

// with is a copy of labels with more behind them.
func with(labels []string, more ...string) []string { return slices.Concat(labels, more) }

// names knows the workloads that a message is about.
type names struct {
	own     string
	callers map[netip.Addr]string
}

func (t *Traffic) names(i *launch.Instance, m *proxypb.Metrics) names {
	a := i.Attachment
	n := names{own: t.workloads.Workload(a.PodNamespace, a.PodName), callers: map[netip.Addr]string{}}
	if n.own == "" {
		n.own = a.PodNamespace + "/" + Unknown
	}
	note := func(p *proxypb.Peers) {
		if addr, err := netip.ParseAddr(p.GetClient()); err == nil {
			n.callers[addr] = ""
		}
	}
	for _, x := range m.GetTraffic() {
		note(x.GetPeers())
	}
	for _, x := range m.GetOpen() {
		note(x.GetPeers())
	}
	for _, x := range m.GetDecisions() {
		note(x.GetPeers())
	}
	if len(n.callers) > 0 {
		t.workloads.Callers(n.callers)
	}
	return n
}

// directed are the values of direction and of what peers has.
func (n names) directed(p *proxypb.Peers) []string {
	return append([]string{directionName(p.GetDirection())}, n.peers(p)...)
}

// peers are the values of the labels of both ends. One is the pod itself. Of a
// destination whose endpoint's pod is not known the workload is called as its
// Service.
func (n names) peers(p *proxypb.Peers) []string {
	ownNamespace, own := split(n.own)
	if p.GetDirection() == proxypb.Direction_INBOUND {
		namespace, workload := Other, Other
		if !p.GetOther() {
			addr, _ := netip.ParseAddr(p.GetClient())
			namespace, workload = caller(p.GetNamespace(), n.callers[addr])
		}
		return []string{namespace, workload, ownNamespace, own, Unknown}
	}
	if p.GetOther() {
		return []string{ownNamespace, own, Other, Other, Other}
	}
	namespace, service := split(p.GetService())
	workload := service
	if p.GetWorkload() != "" {
		namespace, workload = split(p.GetWorkload())
	}
	return []string{ownNamespace, own, namespace, workload, service}
}

// caller are the namespace and the workload of a caller: of its identity, if it has shown
// one, and of its address, if that is a pod's of the same namespace.
func caller(shown, known string) (string, string) {
	if namespace, workload := split(known); shown == "" || shown == namespace {
		return namespace, workload
	}
	return shown, Unknown
}

// split splits "namespace/name".
func split(id string) (string, string) {
	namespace, name, ok := strings.Cut(id, "/")
	if !ok {
		return Unknown, Unknown
	}
	return namespace, name
}

// Describe implements prometheus.Collector.
func (t *Traffic) Describe(ch chan<- *prometheus.Desc) {
	for _, f := range t.families() {
		ch <- f.desc
	}
}

// Collect implements prometheus.Collector.
func (t *Traffic) Collect(ch chan<- prometheus.Metric) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	for _, f := range []*family{t.inFlight, t.open, t.endpoints} {
		clear(f.series)
	}
	for _, p := range t.proxies {
		for _, g := range p.gauges {
			g.family.at(now, g.labels...).value += g.value
		}
	}
	for _, f := range t.families() {
		f.collect(now, ch)
	}
}
