// Package telemetry writes down what the node's proxies report. The names are
// OpenTelemetry's where it has one, else weir.*.
package telemetry

import (
	"encoding/json"
	"io"
	"sync"
	"time"

	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/proxypb"
)

// AccessLog writes one JSON object a line for each connection the proxies saw.
type AccessLog struct {
	mu  sync.Mutex
	out io.Writer
}

// NewAccessLog writes to out, a line at a time.
func NewAccessLog(out io.Writer) *AccessLog { return &AccessLog{out: out} }

// Record is one line: one connection at one proxy. Times are in seconds.
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
	TimeTotal     float64   `json:"weir.time.total"`            // accept to end
	TimeRoute     float64   `json:"weir.time.route"`            // accept to decision
	TimeConnect   float64   `json:"weir.time.connect"`          // decision to connected
	Lost          uint64    `json:"weir.lost_before,omitempty"` // records no agent was there to read
}

// Write writes one record.
func (l *AccessLog) Write(i *launch.Instance, r *proxypb.AccessLog) {
	direction := "outbound"
	if r.GetDirection() == proxypb.AccessLog_INBOUND {
		direction = "inbound"
	}
	b, err := json.Marshal(Record{
		Timestamp:     time.Unix(0, r.GetStartUnixNanos()).UTC(),
		Direction:     direction,
		Pod:           i.Attachment.PodNamespace + "/" + i.Attachment.PodName,
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
	})
	if err != nil {
		return // a struct of strings and numbers marshals
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	_, _ = l.out.Write(append(b, '\n'))
}
