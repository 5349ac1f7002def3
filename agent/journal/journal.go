// Package journal is memory that a proxy writes its access log into and its agent reads it
// from, with no message between them: a record costs the proxy the writing of some 60 bytes, and
// no system call.
//
// The memory is a file of the proxy's (memfd) that neither grows nor shrinks: a page of
// counters, then a ring of blocks of records. Positions in the ring count bytes since its
// beginning and never go back. The proxy writes without looking out for the agent: when the
// ring is full the oldest block gives way, and the number that the next one begins with tells
// how many records that were. The agent says how far it has read, in the same page, so that
// the next agent goes on there; and since it has the file, it also reads what a proxy wrote
// just before it was killed.
//
// What the agent reads it takes for what anybody may have written: it copies first, and
// believes nothing that it has not checked.
package journal

import (
	"errors"
	"net/netip"
	"strings"

	"github.com/weirmesh/weir/agent/proxypb"
)

const (
	// Capacity is the size of the ring, in bytes: some 16,000 records of ordinary requests.
	Capacity = 1 << 20
	// block is what gives way at a time, and what can be read without the rest.
	block = 128 << 10
	// MaxText bounds a text of a record, in bytes: of a longer one, such as a path of
	// 60 KB, the rest is cut off.
	MaxText = 8 << 10

	headerSize = 4096
	fileSize   = headerSize + Capacity
	// magic is the first word: what this is, and in which version of this layout.
	magic = uint64(0x31_6c6e_726a_7277) // "wrjrnl1", little-endian
)

// Words of the header, by their offset. What the proxy writes and what the agent writes is
// on different cache lines.
const (
	atMagic = 0
	atHead  = 64 // end of the newest record
	atTail  = 72 // beginning of the oldest block that is whole
	// atRead is how far the agent has read, atReadNumber the number of the record there.
	atRead       = 128
	atReadNumber = 136
)

// Record is one connection, or one request, written when it ended. Times are in
// nanoseconds.
type Record struct {
	StartUnixNanos       int64
	Direction            proxypb.Direction
	ClientAddress        netip.AddrPort // who connected
	ServerAddress        netip.AddrPort // where it was going: the original destination
	Service              string         // "namespace/name" the original destination belongs to
	UpstreamAddress      netip.AddrPort // where the proxy connected to
	UpstreamLocalAddress netip.AddrPort // the proxy's own end of that connection
	UpstreamPod          string         // "namespace/name"
	Reason               string         // reason.Reason, empty when all went well
	Error                string         // the reason's detail
	SentBytes            uint64         // towards the upstream
	ReceivedBytes        uint64         // from the upstream
	TotalNanos           int64          // accept to end
	RouteNanos           int64          // accept to decision
	ConnectNanos         int64          // decision to connected
	Policy               string         // of authorization, that decided: "namespace/name", or authz.NoPolicy
	Audited              string         // those with audit that would have refused it, the same with commas between
	PeerIdentity         string         // SPIFFE ID that was shown: inbound the caller's, outbound the endpoint's
	TLSNanos             int64          // handshake with that peer, if it was for this

	// Of a request, where the connection carries HTTP; a connection without any
	// request has one record without these.
	Protocol          string // "HTTP/1.1"; empty: the connection was passed on as it is
	Method            string
	Path              string // without the query
	Status            uint32 // of the answer that the client got
	Route             string // "HTTPRoute/namespace/name"
	Attempts          uint32 // requests that were sent upstream
	FirstByteNanos    int64  // request sent to first byte of the answer
	GRPCStatus        string
	TraceID           [16]byte // zero: the request is of no trace
	SpanID            [8]byte  // the caller's span
	RequestBodyBytes  uint64   // that were passed on, as framed; no head
	ResponseBodyBytes uint64   // the same

	// DroppedBefore is how many records before this one nobody has read in time. A reader
	// fills it in.
	DroppedBefore uint64
}

// Clone is a copy to be kept.
func (r *Record) Clone() Record {
	out := *r
	for _, text := range fieldsOf(&out) {
		*text = strings.Clone(*text)
	}
	return out
}

// errDamaged is a journal that no proxy of Weir's wrote like that.
var errDamaged = errors.New("the journal is damaged")
