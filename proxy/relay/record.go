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

// record collects what the access log says of one connection.
type record struct {
	accepted  time.Time
	decision  time.Time // zero: none was made
	entry     *proxypb.AccessLog
	endpoint  route.Endpoint
	handedOff bool // to the inbound side of this very pod
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

func (r *record) decided(now time.Time, d route.Destination) {
	r.decision = now
	r.entry.RouteNanos = now.Sub(r.accepted).Nanoseconds()
	r.entry.Service = d.Service
}

func (r *record) attempt(e route.Endpoint, own bool) {
	r.endpoint, r.handedOff = e, own
	r.entry.UpstreamAddress = e.Addr.String()
	r.entry.UpstreamPod = e.Pod
}

func (r *record) connected(now time.Time, up *upstream.Conn) {
	r.entry.ConnectNanos = now.Sub(r.decision).Nanoseconds()
	r.entry.UpstreamLocalAddress = up.Local.String()
}

func (r *record) ended(sent, received uint64) {
	r.entry.SentBytes, r.entry.ReceivedBytes = sent, received
}

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
