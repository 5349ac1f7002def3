package proxypb

import (
	"slices"
	"strings"
)

// What nobody's message may exceed, or else a text that is sent once could fill the
// agent's disk.
const (
	// MaxText bounds a text of a record, in bytes: of a longer one, such as a path of
	// 60 KB, the rest is cut off.
	MaxText = 8 << 10
	// MaxRows bounds the records of a message; more are not read.
	MaxRows = 1024
)

// AccessLog is one connection, or one request, reported when it ended: a row of
// AccessLogs. Times are in nanoseconds.
type AccessLog struct {
	StartUnixNanos       int64
	Direction            Direction
	ClientAddress        string // who connected, ADDRESS:PORT
	ServerAddress        string // where it was going: the original destination
	Service              string // "namespace/name" the original destination belongs to
	UpstreamAddress      string // where the proxy connected to
	UpstreamLocalAddress string // the proxy's own end of that connection
	UpstreamPod          string // "namespace/name"
	Reason               string // reason.Reason, empty when all went well
	Error                string // the reason's detail
	SentBytes            uint64 // towards the upstream
	ReceivedBytes        uint64 // from the upstream
	TotalNanos           int64  // accept to end
	RouteNanos           int64  // accept to decision
	ConnectNanos         int64  // decision to connected
	DroppedBefore        uint64 // records lost before this one because no agent read them
	Policy               string // of authorization, that decided: "namespace/name", or authz.NoPolicy
	Audited              string // those with audit that would have refused it, the same with commas between
	PeerIdentity         string // SPIFFE ID that was shown: inbound the caller's, outbound the endpoint's
	TLSNanos             int64  // handshake with that peer, if it was for this

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
}

// Rows is how many records there are.
func (x *AccessLogs) Rows() int { return min(len(x.GetStartUnixNanos()), MaxRows) }

// Row is one of the records, from 0. What columns lack, of a message that no Weir
// wrote, is zero.
func (x *AccessLogs) Row(i int) AccessLog {
	out := AccessLog{
		StartUnixNanos:       x.StartUnixNanos[i],
		Direction:            at(x.Direction, i),
		ClientAddress:        x.text(x.ClientAddress, i),
		ServerAddress:        x.text(x.ServerAddress, i),
		Service:              x.text(x.Service, i),
		UpstreamAddress:      x.text(x.UpstreamAddress, i),
		UpstreamLocalAddress: x.text(x.UpstreamLocalAddress, i),
		UpstreamPod:          x.text(x.UpstreamPod, i),
		Reason:               x.text(x.Reason, i),
		Error:                x.text(x.Error, i),
		SentBytes:            at(x.SentBytes, i),
		ReceivedBytes:        at(x.ReceivedBytes, i),
		TotalNanos:           at(x.TotalNanos, i),
		RouteNanos:           at(x.RouteNanos, i),
		ConnectNanos:         at(x.ConnectNanos, i),
		Protocol:             x.text(x.Protocol, i),
		Method:               x.text(x.Method, i),
		Path:                 x.text(x.Path, i),
		Status:               at(x.Status, i),
		Route:                x.text(x.Route, i),
		Attempts:             at(x.Attempts, i),
		FirstByteNanos:       at(x.FirstByteNanos, i),
		GRPCStatus:           x.text(x.GrpcStatus, i),
		RequestBodyBytes:     at(x.RequestBodyBytes, i),
		ResponseBodyBytes:    at(x.ResponseBodyBytes, i),
		Policy:               x.text(x.Policy, i),
		Audited:              x.text(x.Audited, i),
		PeerIdentity:         x.text(x.PeerIdentity, i),
		TLSNanos:             at(x.TlsNanos, i),
	}
	if i == 0 {
		out.DroppedBefore = x.DroppedBefore
	}
	idAt(out.TraceID[:], x.TraceId, i)
	idAt(out.SpanID[:], x.SpanId, i)
	return out
}

func (x *AccessLogs) text(column []uint32, i int) string {
	if n := at(column, i); n > 0 && int(n) <= len(x.Texts) {
		return cut(x.Texts[n-1])
	}
	return ""
}

// cut makes a text no longer than MaxText, and UTF-8, as a message has it.
func cut(text string) string {
	if len(text) > MaxText {
		text = text[:MaxText]
	}
	return strings.ToValidUTF8(text, "\uFFFD")
}

func at[T any](column []T, i int) T {
	if i < len(column) {
		return column[i]
	}
	var zero T
	return zero
}

func idAt(out, column []byte, i int) {
	if end := (i + 1) * len(out); end <= len(column) {
		copy(out, column[end-len(out):end])
	}
}

// AccessLogWriter makes AccessLogs of rows, again and again with the same memory. The
// zero value is ready.
type AccessLogWriter struct {
	logs    AccessLogs
	numbers map[string]uint32 // of texts
	row     AccessLog         // that is being written
}

// Write makes a message of so many rows, up to MaxRows; row fills in the i-th, which is empty, and
// of which DroppedBefore counts in the first alone. The message is good until Write is
// called again.
func (w *AccessLogWriter) Write(rows int, row func(i int, into *AccessLog)) *AccessLogs {
	w.clear()
	x := &w.logs
	x.StartUnixNanos = slices.Grow(x.StartUnixNanos, rows)[:rows]
	for i := range rows {
		r := &w.row
		*r = AccessLog{}
		row(i, r)
		if i == 0 {
			x.DroppedBefore = r.DroppedBefore
		}
		x.StartUnixNanos[i] = r.StartUnixNanos
		put(&x.Direction, i, rows, r.Direction)
		w.putText(&x.ClientAddress, i, rows, r.ClientAddress)
		w.putText(&x.ServerAddress, i, rows, r.ServerAddress)
		w.putText(&x.Service, i, rows, r.Service)
		w.putText(&x.UpstreamAddress, i, rows, r.UpstreamAddress)
		w.putText(&x.UpstreamLocalAddress, i, rows, r.UpstreamLocalAddress)
		w.putText(&x.UpstreamPod, i, rows, r.UpstreamPod)
		w.putText(&x.Reason, i, rows, r.Reason)
		w.putText(&x.Error, i, rows, r.Error)
		put(&x.SentBytes, i, rows, r.SentBytes)
		put(&x.ReceivedBytes, i, rows, r.ReceivedBytes)
		put(&x.TotalNanos, i, rows, r.TotalNanos)
		put(&x.RouteNanos, i, rows, r.RouteNanos)
		put(&x.ConnectNanos, i, rows, r.ConnectNanos)
		w.putText(&x.Protocol, i, rows, r.Protocol)
		w.putText(&x.Method, i, rows, r.Method)
		w.putText(&x.Path, i, rows, r.Path)
		put(&x.Status, i, rows, r.Status)
		w.putText(&x.Route, i, rows, r.Route)
		put(&x.Attempts, i, rows, r.Attempts)
		put(&x.FirstByteNanos, i, rows, r.FirstByteNanos)
		w.putText(&x.GrpcStatus, i, rows, r.GRPCStatus)
		putID(&x.TraceId, i, rows, r.TraceID[:])
		putID(&x.SpanId, i, rows, r.SpanID[:])
		put(&x.RequestBodyBytes, i, rows, r.RequestBodyBytes)
		put(&x.ResponseBodyBytes, i, rows, r.ResponseBodyBytes)
		w.putText(&x.Policy, i, rows, r.Policy)
		w.putText(&x.Audited, i, rows, r.Audited)
		w.putText(&x.PeerIdentity, i, rows, r.PeerIdentity)
		put(&x.TlsNanos, i, rows, r.TLSNanos)
	}
	return x
}

// clear empties the columns, and keeps their memory.
func (w *AccessLogWriter) clear() {
	x := &w.logs
	clear(x.Texts)
	x.Texts, x.StartUnixNanos, x.Direction = x.Texts[:0], x.StartUnixNanos[:0], x.Direction[:0]
	for _, column := range []*[]uint32{
		&x.ClientAddress, &x.ServerAddress, &x.Service, &x.UpstreamAddress, &x.UpstreamLocalAddress, &x.UpstreamPod, &x.Reason, &x.Error,
		&x.Protocol, &x.Method, &x.Path, &x.Route, &x.GrpcStatus, &x.Status, &x.Attempts, &x.Policy, &x.Audited, &x.PeerIdentity,
	} {
		*column = (*column)[:0]
	}
	for _, column := range []*[]uint64{&x.SentBytes, &x.ReceivedBytes, &x.RequestBodyBytes, &x.ResponseBodyBytes} {
		*column = (*column)[:0]
	}
	for _, column := range []*[]int64{&x.TotalNanos, &x.RouteNanos, &x.ConnectNanos, &x.FirstByteNanos, &x.TlsNanos} {
		*column = (*column)[:0]
	}
	x.TraceId, x.SpanId = x.TraceId[:0], x.SpanId[:0]
	clear(w.numbers)
	w.row = AccessLog{}
}

// put writes a value into a column of so many rows; an empty column is one of zeros.
func put[T comparable](column *[]T, i, rows int, value T) {
	var zero T
	if value == zero {
		return
	}
	zeros(column, rows)
	(*column)[i] = value
}

func zeros[T any](column *[]T, size int) {
	if len(*column) == 0 {
		*column = slices.Grow(*column, size)[:size]
		clear(*column)
	}
}

func putID(column *[]byte, i, rows int, id []byte) {
	for _, b := range id {
		if b != 0 {
			zeros(column, rows*len(id))
			copy((*column)[i*len(id):], id)
			return
		}
	}
}

func (w *AccessLogWriter) putText(column *[]uint32, i, rows int, text string) {
	if text == "" {
		return
	}
	zeros(column, rows)
	// Mostly it is the text of the row before.
	if i > 0 {
		if n := (*column)[i-1]; n > 0 && w.logs.Texts[n-1] == text { // which is neither cut nor mended
			(*column)[i] = n
			return
		}
	}
	n, ok := w.numbers[text]
	if !ok {
		if w.numbers == nil {
			w.numbers = map[string]uint32{}
		}
		w.logs.Texts = append(w.logs.Texts, cut(text))
		n = uint32(len(w.logs.Texts))
		w.numbers[text] = n
	}
	(*column)[i] = n
}
