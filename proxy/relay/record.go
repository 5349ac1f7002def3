package relay

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/http2"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/route"
	"github.com/weirmesh/weir/proxy/telemetry"
	"github.com/weirmesh/weir/proxy/trace"
	"github.com/weirmesh/weir/proxy/upstream"
)

// record collects what is known of one connection, or one request.
type record struct {
	entry     telemetry.Record
	server    *Server   // of a request whose plan is made
	accepted  time.Time // or read
	decision  time.Time // zero: none was made
	endpoint  route.Endpoint
	handedOff bool           // to the inbound side of this very pod
	sender    authz.Identity // which that is, if it was handed over
	before    []failedAt     // attempts, of which there may be others after them
	began     time.Time      // of the attempt
	answer    time.Time      // its first byte; zero: not there yet, or passed on
	out       [2]*telemetry.Record
}

// failedAt is an attempt that failed at an endpoint.
type failedAt struct {
	endpoint netip.AddrPort
	why      *reason.Error
}

// records are lent to connections, and to requests of HTTP/1.
var records = sync.Pool{New: func() any { return &record{} }}

func newRecord(c listen.Conn) *record {
	r := &record{}
	r.reset(c)
	return r
}

// reset makes it a new one.
func (r *record) reset(c listen.Conn) {
	*r = record{
		accepted: c.Accepted,
		entry:    telemetry.Record{Start: c.Accepted, Direction: c.Direction, Client: c.Peer, Server: c.Original},
	}
	r.known(c)
}

// known notes who the peer of an inbound connection has shown to be.
func (r *record) known(c listen.Conn) {
	r.entry.Peer, r.entry.PeerNamespace, r.entry.Secure = c.ID, c.Identity.Namespace, c.ID != ""
}

// met is known of what the handshake, if there was one, was for.
func (r *record) met(c listen.Conn) {
	r.known(c)
	r.entry.TLS = c.Handshake
}

// protocols are by HTTP/1's minor version, and 2.
var protocols = [...]string{"HTTP/1.0", "HTTP/1.1", "HTTP/2"}

// begin makes it the record of a request, which was read now.
func (r *record) begin(now time.Time, version int, method, path []byte) {
	r.accepted, r.entry.Start = now, now
	r.entry.Protocol = protocols[version]
	r.entry.Method, r.entry.Path = methodName(method), string(path)
}

// now is the time of what happens to a request, or a connection, by how long ago it was
// read, or accepted: one clock is asked, where time.Now asks two.
func (r *record) now() time.Time { return r.accepted.Add(time.Since(r.accepted)) }

// methodName is a method as text; that of the usual ones is nobody's.
func methodName(method []byte) string {
	switch string(method) {
	case "GET":
		return "GET"
	case "POST":
		return "POST"
	case "PUT":
		return "PUT"
	case "HEAD":
		return "HEAD"
	case "DELETE":
		return "DELETE"
	case "PATCH":
		return "PATCH"
	case "OPTIONS":
		return "OPTIONS"
	}
	return string(method)
}

// of reads which trace the request is of. Where its sender speaks B3 alone,
// everybody behind us is told in W3C's way, too.
func (r *record) of(s *Server, m message) {
	r.server = s
	c := trace.Of(m)
	r.entry.SetTrace(c)
	if c.Known() && !c.W3C {
		change := route.HeaderChange{Set: []route.Header{{Name: trace.Header, Value: c.Traceparent()}}}
		change.Apply(m)
	}
}

func (r *record) decided(now time.Time, d route.Destination) {
	r.decision = now
	r.entry.Route = now.Sub(r.accepted)
	r.entry.Service = d.Service
}

// routed notes the route that governs.
func (r *record) routed(name string) { r.entry.RouteName = name }

// attempt notes the endpoint that is dialled; own: it is of this very pod.
func (r *record) attempt(e route.Endpoint, own bool) {
	r.endpoint, r.handedOff = e, own
	r.shown("")
	r.entry.Upstream, r.entry.Pod, r.entry.Workload = e.Addr, e.Pod, e.Workload
	if r.server != nil {
		r.begun(r.server)
	}
}

// missed notes that the endpoint, another pod's, was not reached; err may be something else.
func (r *record) missed(s *Server, err error) {
	var why *reason.Error
	if r.entry.Direction != listen.Outbound || !another(err) || !errors.As(err, &why) {
		return
	}
	if len(r.before) < maxAttempts {
		r.before = append(r.before, failedAt{r.endpoint.Addr, why})
	}
	if s.Failed != nil {
		s.Failed(&r.entry, why.Reason)
	}
}

// shown notes the identity that the endpoint has shown.
func (r *record) shown(id string) {
	if r.entry.Direction == listen.Outbound {
		r.entry.Peer, r.entry.Secure = id, id != ""
	}
}

// begun says that it goes to its endpoint.
func (r *record) begun(s *Server) {
	if s.Begun != nil {
		s.Begun(&r.entry)
	}
}

func (r *record) connected(took time.Duration, up *upstream.Conn) {
	r.entry.Connect += took
	r.entry.UpstreamLocal = up.Local
	if up.Secure != nil {
		r.entry.TLS += up.Handshake
		r.shown(up.Secure.Peer())
	}
}

// use notes the connection that a request is sent on now; own: it leads to this very
// pod.
func (r *record) use(now time.Time, up *httpUpstream, own bool) {
	r.attempt(up.endpoint, own)
	if up.secure != nil {
		r.shown(up.secure.Peer())
	}
	if !up.reused {
		r.entry.TLS += up.dialled.Handshake
		r.entry.Connect += up.took
	}
	r.entry.UpstreamLocal = up.dialled.Local
	r.entry.Attempts++
	r.began, r.answer = now, time.Time{}
	if r.entry.Attempts == 1 {
		r.entry.Overhead = max(r.began.Sub(r.accepted)-r.entry.Connect, 0)
	}
}

// send notes the endpoint that a stream is opened at, and the identity that it has to
// show.
func (r *record) send(e route.Endpoint, own bool, shows string) {
	r.attempt(e, own)
	r.shown(shows)
	r.entry.Attempts++
	r.began, r.answer = r.now(), time.Time{}
	if r.entry.Attempts == 1 {
		r.entry.Overhead = max(r.began.Sub(r.accepted), 0)
	}
}

// unsent takes send back: there was no connection to send it on.
func (r *record) unsent() {
	r.entry.Attempts--
	r.shown("")
}

// firstByte notes when an answer begins; informational ones are followed by
// another.
func (r *record) firstByte() {
	r.answer = r.now()
	r.entry.FirstByte = r.answer.Sub(r.began)
}

func (r *record) answered(status int) { r.entry.Status = uint16(status) }

func (r *record) sent(n uint64) { r.entry.Sent += n }

// received notes that bytes were passed on to the client.
func (r *record) received(n uint64) {
	r.entry.Received += n
	if !r.answer.IsZero() {
		r.entry.Overhead += time.Since(r.answer)
		r.answer = time.Time{}
	}
}

// requestBody notes how much of a request's body was there when it was sent; of
// another attempt it is the same again.
func (r *record) requestBody(n int) { r.entry.RequestBody = uint64(n) }
func (r *record) uploaded(n uint64) {
	r.entry.Sent, r.entry.RequestBody = r.entry.Sent+n, r.entry.RequestBody+n
}
func (r *record) responseBody(n int) { r.entry.ResponseBody += uint64(n) }

// ended notes what a stream carried. Heads are compressed: their bytes are nobody's.
func (r *record) ended(o http2.Outcome) {
	if r.entry.Attempts > 0 {
		r.entry.Sent, r.entry.RequestBody = o.Received, o.Received
	}
	r.entry.Received, r.entry.ResponseBody = o.Sent, o.Sent
	r.entry.GRPCStatus = o.GRPCStatus
}

func (r *record) fail(err error) {
	var e *reason.Error
	if !errors.As(err, &e) {
		e = &reason.Error{Reason: reason.ConnectFailed, Err: err}
	}
	r.entry.Reason, r.entry.Detail = e.Reason, e.Reason.Words()
	if e.Err != nil {
		r.entry.Detail = e.Err.Error()
	}
	for _, b := range r.before {
		if b.why != e {
			r.entry.Detail += fmt.Sprintf("; before that, at %s: %s", b.endpoint, b.why)
		}
	}
	var refused *refusal
	if errors.As(e.Err, &refused) {
		r.entry.Decide(refused.Decision)
	}
	if !r.decision.IsZero() && r.entry.Connect == 0 && r.entry.Upstream.IsValid() {
		r.entry.Connect = time.Since(r.decision)
	}
}

// entries are the records of what ended now: its own, and the inbound one if it was
// handed over.
func (r *record) entries(now time.Time) []*telemetry.Record {
	r.entry.Total = now.Sub(r.accepted)
	if r.entry.Protocol != "" && r.entry.Attempts == 0 {
		r.entry.Overhead = max(r.entry.Total-r.entry.Connect, 0) // nobody else was asked
	}
	out := append(r.out[:0], &r.entry)
	if r.handedOff {
		out = append(out, r.entry.Inbound(r.sender))
	}
	return out
}
