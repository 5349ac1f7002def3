// Package telemetry holds what the proxy reports: records of requests and connections,
// which go into the journal where they end (Record), and what is counted of them, bounded,
// until an agent has acknowledged it (Meter). It writes no file and serves no metrics: the
// agent does.
package telemetry

import (
	"net/netip"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/journal"
	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/trace"
)

// Record is what is known of one request, or of one connection that is passed on as
// it is. A value: its texts are those of the config, or its own.
type Record struct {
	Start     time.Time
	Direction listen.Direction
	Client    netip.AddrPort // who connected
	Server    netip.AddrPort // where it was going: the original destination

	Service       string // "namespace/name" the original destination belongs to
	Upstream      netip.AddrPort
	UpstreamLocal netip.AddrPort // the proxy's own end of that connection
	Pod, Workload string         // the upstream's, "namespace/name"

	// Peer is the SPIFFE ID that was shown: inbound the caller's, outbound the endpoint's;
	// of an inbound one with its namespace. Empty: it has shown none.
	Peer, PeerNamespace string
	Secure              bool          // between two proxies, with TLS
	TLS                 time.Duration // handshake with the peer, if it was for this; outbound a part of Connect

	Reason         reason.Reason
	Detail         string // of the reason
	Sent, Received uint64 // bytes towards and from the upstream

	// Authorization is what was decided of what is for the application of this very pod;
	// it means nothing where nothing was, as no policy governs.
	Authorization authz.Decision
	decided       decided

	Total, Route, Connect time.Duration // accept to end, accept to decision, to connect

	// Of requests. Protocol is empty of a connection that is passed on as it is.
	Protocol     string // "HTTP/1.1"
	Method, Path string // no query
	RouteName    string // "HTTPRoute/namespace/name"
	Status       uint16 // of the answer that the client got
	Attempts     uint16 // requests that were sent upstream
	GRPCStatus   string
	FirstByte    time.Duration // request sent to first byte of the answer
	Overhead     time.Duration // time the proxy itself took
	Trace        [16]byte      // zero: of no trace
	Span         [8]byte

	RequestBody, ResponseBody uint64 // bytes that were passed on, as they were framed

	open *open // what it counts for while it goes on; see Meter.Begin
}

// decided is whether there is an Authorization, and whether it is counted.
type decided uint8

const (
	undecided decided = iota
	uncounted
	counted
)

// Decide notes what was decided; a later decision takes the place of an earlier one.
func (r *Record) Decide(d authz.Decision) { r.Authorization, r.decided = d, uncounted }

// SetTrace notes the span that the request was sent in.
func (r *Record) SetTrace(c trace.Context) { r.Trace, r.Span = c.Trace, c.Span }

// Inbound is the record of the other side, where both are in this very pod, which is
// own's.
func (r *Record) Inbound(own authz.Identity) *Record {
	in := *r
	in.Direction, in.Server = listen.Inbound, r.Upstream
	in.Peer, in.PeerNamespace = own.String(), own.Namespace
	in.TLS = 0
	in.open = nil
	return &in
}

// direction on the wire.
func direction(d listen.Direction) proxypb.Direction {
	if d == listen.Inbound {
		return proxypb.Direction_INBOUND
	}
	return proxypb.Direction_OUTBOUND
}

// Row is the record as the agent is told it.
func (r *Record) Row() journal.Record {
	return journal.Record{
		StartUnixNanos: r.Start.UnixNano(), Direction: direction(r.Direction),
		ClientAddress: r.Client, ServerAddress: r.Server, Service: r.Service,
		UpstreamAddress: r.Upstream, UpstreamLocalAddress: r.UpstreamLocal, UpstreamPod: r.Pod,
		Reason: r.Reason.String(), Error: r.Detail, SentBytes: r.Sent, ReceivedBytes: r.Received,
		TotalNanos: r.Total.Nanoseconds(), RouteNanos: r.Route.Nanoseconds(), ConnectNanos: r.Connect.Nanoseconds(),
		Protocol: r.Protocol, Method: r.Method, Path: r.Path, Status: uint32(r.Status), Route: r.RouteName, Attempts: uint32(r.Attempts),
		FirstByteNanos: r.FirstByte.Nanoseconds(), GRPCStatus: r.GRPCStatus, TraceID: r.Trace, SpanID: r.Span,
		RequestBodyBytes: r.RequestBody, ResponseBodyBytes: r.ResponseBody,
		Policy: r.Authorization.Policy, Audited: strings.Join(r.Authorization.Audited, ","),
		PeerIdentity: r.Peer, TLSNanos: r.TLS.Nanoseconds(),
	}
}
