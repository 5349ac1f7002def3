package relay

import (
	"errors"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/route"
	"github.com/weirmesh/weir/proxy/upstream"
)

// record collects what the access log says of one connection, or one request.
type record struct {
	accepted  time.Time
	decision  time.Time // zero: none was made
	entry     *proxypb.AccessLog
	endpoint  route.Endpoint
	handedOff bool      // to the inbound side of this very pod
	began     time.Time // of the attempt
}

func newRecord(c listen.Conn) *record {
	direction := proxypb.AccessLog_OUTBOUND
	if c.Direction == listen.Inbound {
		direction = proxypb.AccessLog_INBOUND
	}
	return &record{
		accepted: c.Accepted,
		entry: &proxypb.AccessLog{
			StartUnixNanos: c.Accepted.UnixNano(),
			Direction:      direction,
			ClientAddress:  c.Peer.String(),
			ServerAddress:  c.Original.String(),
		},
	}
}

// protocols are by HTTP/1's minor version, and 2.
var protocols = [...]string{"HTTP/1.0", "HTTP/1.1", "HTTP/2"}

// begin makes it the record of a request, which was read now.
func (r *record) begin(now time.Time, version int, method, path string) {
	r.accepted = now
	r.entry.StartUnixNanos = now.UnixNano()
	r.entry.Protocol = protocols[version]
	r.entry.Method, r.entry.Path = method, path
}

func (r *record) decided(now time.Time, d route.Destination) {
	r.decision = now
	r.entry.RouteNanos = now.Sub(r.accepted).Nanoseconds()
	r.entry.Service = d.Service
}

// routed notes the route that governs.
func (r *record) routed(name string) { r.entry.Route = name }

// attempt notes the endpoint that is dialled; own: it is of this very pod.
func (r *record) attempt(e route.Endpoint, own bool) {
	r.endpoint, r.handedOff = e, own
	r.entry.UpstreamAddress = e.Addr.String()
	r.entry.UpstreamPod = e.Pod
}

func (r *record) connected(took time.Duration, up *upstream.Conn) {
	r.entry.ConnectNanos += took.Nanoseconds()
	r.entry.UpstreamLocalAddress = up.Local.String()
}

// use notes the connection that a request is sent on; own: it leads to this very
// pod.
func (r *record) use(up *httpUpstream, own bool) {
	r.attempt(up.endpoint, own)
	r.entry.UpstreamLocalAddress = up.dialled.Local.String()
	r.entry.Attempts++
	r.entry.ConnectNanos += up.took.Nanoseconds()
	r.began = time.Now()
}

// send notes the endpoint that a stream is opened at.
func (r *record) send(e route.Endpoint, own bool) {
	r.attempt(e, own)
	r.entry.Attempts++
	r.began = time.Now()
}

func (r *record) grpc(status string) { r.entry.GrpcStatus = status }

func (r *record) firstByte(now time.Time) {
	r.entry.FirstByteNanos = now.Sub(r.began).Nanoseconds()
}

func (r *record) answered(status int) { r.entry.Status = uint32(status) }

func (r *record) sent(n uint64)     { r.entry.SentBytes += n }
func (r *record) received(n uint64) { r.entry.ReceivedBytes += n }

func (r *record) fail(err error) {
	var e *reason.Error
	if !errors.As(err, &e) {
		e = &reason.Error{Reason: reason.ConnectFailed, Err: err}
	}
	r.entry.Reason = e.Reason.String()
	r.entry.Error = e.Reason.Words()
	if e.Err != nil {
		r.entry.Error = e.Err.Error()
	}
	if !r.decision.IsZero() && r.entry.GetConnectNanos() == 0 && r.entry.GetUpstreamAddress() != "" {
		r.entry.ConnectNanos = time.Since(r.decision).Nanoseconds()
	}
}

// entries are the records of a connection that ended now: its own, and the
// inbound one if it was handed over.
func (r *record) entries(now time.Time) []*proxypb.AccessLog {
	r.entry.TotalNanos = now.Sub(r.accepted).Nanoseconds()
	out := []*proxypb.AccessLog{r.entry}
	if r.handedOff {
		inbound := proto.CloneOf(r.entry)
		inbound.Direction = proxypb.AccessLog_INBOUND
		inbound.ServerAddress = r.entry.GetUpstreamAddress()
		out = append(out, inbound)
	}
	return out
}
