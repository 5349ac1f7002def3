// Package telemetry writes down what the node's proxies report. The names are
// OpenTelemetry's where it has one, else weir.*.
package telemetry

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/proxypb"
)

// AccessLog writes one JSON object a line for each request that the proxies saw, and
// each connection without one.
type AccessLog struct {
	mu  sync.Mutex
	out io.Writer
}

// NewAccessLog writes to out, whole lines at a time.
func NewAccessLog(out io.Writer) *AccessLog { return &AccessLog{out: out} }

// Record is one line: one request, or one connection, at one proxy. Times are in
// seconds.
type Record struct {
	Timestamp     time.Time `json:"timestamp"`
	Direction     string    `json:"weir.direction"` // "outbound" or "inbound"
	Pod           string    `json:"weir.pod"`       // whose proxy, "namespace/name"
	Client        string    `json:"client.address"`
	Server        string    `json:"server.address"` // the original destination
	Service       string    `json:"weir.destination.service,omitempty"`
	Upstream      string    `json:"weir.upstream.address,omitempty"`
	UpstreamLocal string    `json:"weir.upstream.local_address,omitempty"`
	UpstreamPod   string    `json:"weir.upstream.pod,omitempty"`
	ErrorType     string    `json:"error.type,omitempty"`
	Reason        string    `json:"weir.reason,omitempty"`
	Detail        string    `json:"weir.reason.detail,omitempty"`
	Sent          uint64    `json:"weir.sent.bytes"`            // towards the upstream
	Received      uint64    `json:"weir.received.bytes"`        // from the upstream
	TimeTotal     float64   `json:"weir.time.total"`            // accept, or the head was read, to end
	TimeRoute     float64   `json:"weir.time.route"`            // to decision
	TimeConnect   float64   `json:"weir.time.connect"`          // decision to connected
	Lost          uint64    `json:"weir.lost_before,omitempty"` // records no agent was there to read

	*HTTP // nil: the connection was passed on as it is
}

// HTTP is what a Record says of a request.
type HTTP struct {
	Method        string  `json:"http.request.method,omitempty"` // none: what came was no request
	Path          string  `json:"url.path,omitempty"`
	Status        uint32  `json:"http.response.status_code,omitempty"` // none: there was no answer
	GRPCStatus    string  `json:"rpc.response.status_code,omitempty"`
	Version       string  `json:"network.protocol.version"` // "1.1"
	Route         string  `json:"weir.route,omitempty"`     // "HTTPRoute/namespace/name"
	Attempts      uint32  `json:"weir.attempts"`            // requests that were sent upstream
	RequestBody   uint64  `json:"http.request.body.size"`
	ResponseBody  uint64  `json:"http.response.body.size"`
	TimeFirstByte float64 `json:"weir.time.first_byte"` // sent to first byte of the answer
	Trace         string  `json:"trace_id,omitempty"`
	Span          string  `json:"span_id,omitempty"` // the caller's
}

// Write writes a proxy's records.
func (l *AccessLog) Write(i *launch.Instance, records []*proxypb.AccessLog) {
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	pod := i.Attachment.PodNamespace + "/" + i.Attachment.PodName
	for _, r := range records {
		if err := encoder.Encode(newRecord(pod, r)); err != nil {
			return // a struct of strings and numbers marshals
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	_, _ = l.out.Write(out.Bytes())
}

func newRecord(pod string, r *proxypb.AccessLog) Record {
	out := Record{
		Timestamp:     time.Unix(0, r.GetStartUnixNanos()).UTC(),
		Direction:     directionName(r.GetDirection()),
		Pod:           pod,
		Client:        r.GetClientAddress(),
		Server:        r.GetServerAddress(),
		Service:       r.GetService(),
		Upstream:      r.GetUpstreamAddress(),
		UpstreamLocal: r.GetUpstreamLocalAddress(),
		UpstreamPod:   r.GetUpstreamPod(),
		ErrorType:     r.GetReason(),
		Reason:        r.GetReason(),
		Detail:        r.GetError(),
		Sent:          r.GetSentBytes(),
		Received:      r.GetReceivedBytes(),
		TimeTotal:     time.Duration(r.GetTotalNanos()).Seconds(),
		TimeRoute:     time.Duration(r.GetRouteNanos()).Seconds(),
		TimeConnect:   time.Duration(r.GetConnectNanos()).Seconds(),
		Lost:          r.GetDroppedBefore(),
	}
	if r.GetProtocol() == "" {
		return out
	}
	out.HTTP = &HTTP{
		Method:        r.GetMethod(),
		Path:          r.GetPath(),
		Status:        r.GetStatus(),
		GRPCStatus:    r.GetGrpcStatus(),
		Version:       strings.TrimPrefix(r.GetProtocol(), "HTTP/"),
		Route:         r.GetRoute(),
		Attempts:      r.GetAttempts(),
		RequestBody:   r.GetRequestBodyBytes(),
		ResponseBody:  r.GetResponseBodyBytes(),
		TimeFirstByte: time.Duration(r.GetFirstByteNanos()).Seconds(),
		Trace:         hex.EncodeToString(r.GetTraceId()),
		Span:          hex.EncodeToString(r.GetSpanId()),
	}
	return out
}

func directionName(d proxypb.AccessLog_Direction) string {
	if d == proxypb.AccessLog_INBOUND {
		return "inbound"
	}
	return "outbound"
}
