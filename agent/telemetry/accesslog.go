// Package telemetry writes down what the node's proxies report. The names are
// OpenTelemetry's where it has one, else weir.*.
package telemetry

import (
	"encoding/hex"
	"encoding/json"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/journal"
	"github.com/weirmesh/weir/agent/proxypb"
)

// Record is one line, for those who read it: one request, or one connection, at one
// proxy. Times are in seconds.
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
	Policy        string    `json:"weir.policy,omitempty"`         // of authorization, that decided
	Audited       string    `json:"weir.policy.audited,omitempty"` // those with audit that would have refused it
	PeerIdentity  string    `json:"weir.peer.identity,omitempty"`  // SPIFFE ID that was shown: inbound the caller's, outbound the endpoint's
	Sent          uint64    `json:"weir.sent.bytes"`               // towards the upstream
	Received      uint64    `json:"weir.received.bytes"`           // from the upstream
	TimeTotal     float64   `json:"weir.time.total"`               // accept, or the head was read, to end
	TimeRoute     float64   `json:"weir.time.route"`               // to decision
	TimeConnect   float64   `json:"weir.time.connect"`             // decision to connected
	TimeTLS       float64   `json:"weir.time.tls,omitempty"`       // handshake with the peer, if it was for this: inbound before the decision, outbound a part of connect
	Lost          uint64    `json:"weir.lost_before,omitempty"`    // records no agent was there to read

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

// appendLine appends what encoding/json makes of the row as a Record, without its
// reflection: a node writes tens of thousands of lines a second.
func appendLine(out []byte, pod string, r *journal.Record) []byte {
	out = append(out, `{"timestamp":"`...)
	out = time.Unix(0, r.StartUnixNanos).UTC().AppendFormat(out, time.RFC3339Nano)
	out = append(out, '"')
	out = appendText(out, "weir.direction", directionName(r.Direction))
	out = appendText(out, "weir.pod", pod)
	out = appendAddress(out, "client.address", r.ClientAddress)
	out = appendAddress(out, "server.address", r.ServerAddress)
	out = appendAny(out, "weir.destination.service", r.Service)
	if r.UpstreamAddress.IsValid() {
		out = appendAddress(out, "weir.upstream.address", r.UpstreamAddress)
	}
	if r.UpstreamLocalAddress.IsValid() {
		out = appendAddress(out, "weir.upstream.local_address", r.UpstreamLocalAddress)
	}
	out = appendAny(out, "weir.upstream.pod", r.UpstreamPod)
	out = appendAny(out, "error.type", r.Reason)
	out = appendAny(out, "weir.reason", r.Reason)
	out = appendAny(out, "weir.reason.detail", r.Error)
	out = appendAny(out, "weir.policy", r.Policy)
	out = appendAny(out, "weir.policy.audited", r.Audited)
	out = appendAny(out, "weir.peer.identity", r.PeerIdentity)
	out = appendNumber(out, "weir.sent.bytes", r.SentBytes)
	out = appendNumber(out, "weir.received.bytes", r.ReceivedBytes)
	out = appendSeconds(out, "weir.time.total", r.TotalNanos)
	out = appendSeconds(out, "weir.time.route", r.RouteNanos)
	out = appendSeconds(out, "weir.time.connect", r.ConnectNanos)
	if r.TLSNanos != 0 {
		out = appendSeconds(out, "weir.time.tls", r.TLSNanos)
	}
	if r.DroppedBefore > 0 {
		out = appendNumber(out, "weir.lost_before", r.DroppedBefore)
	}
	if r.Protocol != "" {
		out = appendHTTP(out, r)
	}
	return append(out, '}', '\n')
}

func appendHTTP(out []byte, r *journal.Record) []byte {
	out = appendAny(out, "http.request.method", r.Method)
	out = appendAny(out, "url.path", r.Path)
	if r.Status > 0 {
		out = appendNumber(out, "http.response.status_code", uint64(r.Status))
	}
	out = appendAny(out, "rpc.response.status_code", r.GRPCStatus)
	out = appendText(out, "network.protocol.version", strings.TrimPrefix(r.Protocol, "HTTP/"))
	out = appendAny(out, "weir.route", r.Route)
	out = appendNumber(out, "weir.attempts", uint64(r.Attempts))
	out = appendNumber(out, "http.request.body.size", r.RequestBodyBytes)
	out = appendNumber(out, "http.response.body.size", r.ResponseBodyBytes)
	out = appendSeconds(out, "weir.time.first_byte", r.FirstByteNanos)
	if r.TraceID != [16]byte{} {
		out = hex.AppendEncode(appendKey(out, "trace_id", '"'), r.TraceID[:])
		out = hex.AppendEncode(appendKey(append(out, '"'), "span_id", '"'), r.SpanID[:])
		out = append(out, '"')
	}
	return out
}

// appendKey begins a member that is not the first; more is the value's beginning.
func appendKey(out []byte, key string, more ...byte) []byte {
	out = append(out, ',', '"')
	out = append(out, key...)
	return append(append(out, '"', ':'), more...)
}

// appendAny appends a text if it is not empty.
func appendAny(out []byte, key, text string) []byte {
	if text == "" {
		return out
	}
	return appendText(out, key, text)
}

func appendText(out []byte, key, text string) []byte {
	out = appendKey(out, key)
	for i := range len(text) {
		if c := text[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			quoted, _ := json.Marshal(text) // a string marshals
			return append(out, quoted...)
		}
	}
	out = append(append(out, '"'), text...)
	return append(out, '"')
}

// appendAddress appends an address, or an empty text for none.
func appendAddress(out []byte, key string, addr netip.AddrPort) []byte {
	if addr.Addr().Zone() != "" { // which may be any text
		return appendText(out, key, addr.String())
	}
	out = appendKey(out, key, '"')
	if addr.IsValid() {
		out = addr.AppendTo(out)
	}
	return append(out, '"')
}

func appendNumber(out []byte, key string, n uint64) []byte {
	return strconv.AppendUint(appendKey(out, key), n, 10)
}

// appendSeconds appends a time to the nanosecond, with no digit that says nothing.
func appendSeconds(out []byte, key string, nanos int64) []byte {
	out = appendKey(out, key)
	whole, rest := nanos/int64(time.Second), nanos%int64(time.Second)
	if nanos < 0 { // of clocks that were set
		out, whole, rest = append(out, '-'), -whole, -rest
	}
	out = strconv.AppendInt(out, whole, 10)
	if rest == 0 {
		return out
	}
	out = append(out, '.')
	for digit := int64(time.Second) / 10; rest > 0; digit /= 10 {
		out = append(out, byte('0'+rest/digit))
		rest %= digit
	}
	return out
}

func directionName(d proxypb.Direction) string {
	if d == proxypb.Direction_INBOUND {
		return "inbound"
	}
	return "outbound"
}
