package journal

import (
	"encoding/binary"
	"net/netip"

	"github.com/weirmesh/weir/agent/proxypb"
)

// A record in the ring begins at a multiple of 8 and is as long as one, little-endian:
//
//	  0  uint32   its size; kind (record, or filler to the end of the ring, which is 8 bytes)
//	  8  uint64   its number, from 0
//	 16  uint64   start, total, route, connect, first byte, TLS; bytes sent, received, of the
//	              request's and of the answer's body
//	 96  uint32   status, attempts
//	104  uint8    direction, then the kinds of four addresses (0: none, 4, 6), and 3 of nothing
//	112  18 bytes each of the addresses: 16 and the port
//	184  16 and 8 bytes: trace, span
//	208  uint16   lengths of the texts, which follow
const (
	offNumber    = 8
	offNumbers   = 16
	offStatus    = 96
	offAttempts  = 100
	offDirection = 104
	offKinds     = 105
	offAddresses = 112
	offTrace     = 184
	offSpan      = 200
	offLengths   = 208
	fixedSize    = offLengths + 2*texts

	addresses   = 4
	addressSize = 18
	texts       = 12 + addresses // and the zones of the addresses
	fillerSize  = 8
	maxSize     = fixedSize + texts*MaxText

	kindRecord = 1
	kindFiller = 2
)

// textsOf are the texts in their order.
func textsOf(r *Record) [texts]string {
	return [texts]string{
		r.Service, r.UpstreamPod, r.Reason, r.Error, r.Policy, r.Audited, r.PeerIdentity,
		r.Protocol, r.Method, r.Path, r.Route, r.GRPCStatus,
		r.ClientAddress.Addr().Zone(), r.ServerAddress.Addr().Zone(), r.UpstreamAddress.Addr().Zone(), r.UpstreamLocalAddress.Addr().Zone(),
	}
}

// sizeOf is what a record with these texts takes, which it cuts.
func sizeOf(all *[texts]string) uint64 {
	size := fixedSize
	for i, text := range all {
		if len(text) > MaxText {
			all[i] = text[:MaxText]
		}
		size += len(all[i])
	}
	return uint64(size+7) &^ 7
}

// encode writes the record over b, which has its size.
func encode(b []byte, number uint64, r *Record, all *[texts]string) {
	_ = b[fixedSize-1]
	le := binary.LittleEndian
	le.PutUint32(b, uint32(len(b)))
	le.PutUint32(b[4:], kindRecord)
	le.PutUint64(b[offNumber:], number)
	for i, n := range [...]uint64{
		uint64(r.StartUnixNanos), uint64(r.TotalNanos), uint64(r.RouteNanos), uint64(r.ConnectNanos), uint64(r.FirstByteNanos), uint64(r.TLSNanos),
		r.SentBytes, r.ReceivedBytes, r.RequestBodyBytes, r.ResponseBodyBytes,
	} {
		le.PutUint64(b[offNumbers+8*i:], n)
	}
	le.PutUint32(b[offStatus:], r.Status)
	le.PutUint32(b[offAttempts:], r.Attempts)
	b[offDirection] = byte(r.Direction)
	for i, a := range [...]*netip.AddrPort{&r.ClientAddress, &r.ServerAddress, &r.UpstreamAddress, &r.UpstreamLocalAddress} {
		addr := a.Addr()
		b[offKinds+i] = 0
		switch {
		case addr.Is4():
			b[offKinds+i] = 4
		case addr.Is6():
			b[offKinds+i] = 6
		}
		at := b[offAddresses+addressSize*i:]
		bytes := addr.As16()
		copy(at, bytes[:])
		le.PutUint16(at[16:], a.Port())
	}
	copy(b[offTrace:], r.TraceID[:])
	copy(b[offSpan:], r.SpanID[:])
	at := fixedSize
	for i, text := range all {
		le.PutUint16(b[offLengths+2*i:], uint16(len(text)))
		at += copy(b[at:], text)
	}
}

// number is that of an encoded record.
func number(b []byte) uint64 { return binary.LittleEndian.Uint64(b[offNumber:]) }

// decode reads a record of b's size, the same bytes as text.
func decode(r *Record, b []byte, text string) bool {
	if len(b) < fixedSize {
		return false
	}
	le := binary.LittleEndian
	n := func(i int) uint64 { return le.Uint64(b[offNumbers+8*i:]) }
	*r = Record{
		StartUnixNanos: int64(n(0)), TotalNanos: int64(n(1)), RouteNanos: int64(n(2)), ConnectNanos: int64(n(3)),
		FirstByteNanos: int64(n(4)), TLSNanos: int64(n(5)),
		SentBytes: n(6), ReceivedBytes: n(7), RequestBodyBytes: n(8), ResponseBodyBytes: n(9),
		Status: le.Uint32(b[offStatus:]), Attempts: le.Uint32(b[offAttempts:]), Direction: proxypb.Direction(b[offDirection]),
		TraceID: [16]byte(b[offTrace:]), SpanID: [8]byte(b[offSpan:]),
	}
	var all [texts]string
	at := fixedSize
	for i := range all {
		length := int(le.Uint16(b[offLengths+2*i:]))
		if length > MaxText || at+length > len(b) {
			return false
		}
		all[i] = text[at : at+length]
		at += length
	}
	r.Service, r.UpstreamPod, r.Reason, r.Error, r.Policy, r.Audited, r.PeerIdentity = all[0], all[1], all[2], all[3], all[4], all[5], all[6]
	r.Protocol, r.Method, r.Path, r.Route, r.GRPCStatus = all[7], all[8], all[9], all[10], all[11]
	zones := all[texts-addresses:]
	for i, a := range [...]*netip.AddrPort{&r.ClientAddress, &r.ServerAddress, &r.UpstreamAddress, &r.UpstreamLocalAddress} {
		from := b[offAddresses+addressSize*i:]
		addr := netip.AddrFrom16([16]byte(from))
		switch b[offKinds+i] {
		case 0:
			continue
		case 4:
			addr = addr.Unmap()
		case 6:
			addr = addr.WithZone(zones[i])
		default:
			return false
		}
		*a = netip.AddrPortFrom(addr, le.Uint16(from[16:]))
	}
	return true
}
