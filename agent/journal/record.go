package journal

import (
	"encoding/binary"
	"net/netip"

	"github.com/weirmesh/weir/agent/proxypb"
)

// The ring is of blocks, each of which can be read without the others. A block begins with
// the number of its first record, 8 bytes, little-endian. Then come records, and where one
// does not fit any more, or the ring is begun anew, a zero byte to the block's end.
//
// A record is the length of what follows, as a varint, and then
//
//	4 bytes   flags: the direction; whether there is a trace; which addresses, and which
//	          texts, are others than those of the record before (in a block's first: than none)
//	varints   start since the one before's, total, route, connect, first byte, TLS (zigzag);
//	          bytes sent, received, of the request's and of the answer's body; status, attempts
//	24 bytes  trace and span, if there is one
//	          addresses that are others: 0, 4 or 6, the bytes of one of IPv4 or IPv6, the port
//	          texts that are others: length, as a varint, and bytes
//
// So a record of a request that is like the one before takes some 60 bytes.
const (
	addresses = 4
	fields    = 12                 // of texts
	texts     = fields + addresses // and the zones of the addresses

	flagInbound   = 1 << 0
	flagOutbound  = 1 << 1
	flagTrace     = 1 << 2
	flagAddresses = 4 // the first bit of addresses
	flagTexts     = flagAddresses + addresses
	flagsEnd      = flagTexts + texts

	blockHeader = 8
	// maxFixed is the most that a record takes without its texts, and their lengths.
	maxFixed = 256 + 3*texts
	// maxTexts bounds all texts of a record: of more, the last are cut.
	maxTexts = 60 << 10
	maxSize  = maxFixed + maxTexts
)

// fieldsOf are the fields that are texts, in their order.
func fieldsOf(r *Record) [fields]*string {
	return [fields]*string{
		&r.Service, &r.UpstreamPod, &r.Reason, &r.Error, &r.Policy, &r.Audited, &r.PeerIdentity,
		&r.Protocol, &r.Method, &r.Path, &r.Route, &r.GRPCStatus,
	}
}

// textsOf are those, and the addresses' zones, cut.
func textsOf(r *Record) [texts]string {
	var all [texts]string
	for i, text := range fieldsOf(r) {
		all[i] = *text
	}
	for i, a := range addressesOf(r) {
		all[fields+i] = a.Addr().Zone()
	}
	left := maxTexts
	for i, text := range all {
		if most := min(MaxText, left); len(text) > most {
			all[i] = text[:most]
		}
		left -= len(all[i])
	}
	return all
}

// addressesOf are the addresses in their order.
func addressesOf(r *Record) [addresses]*netip.AddrPort {
	return [addresses]*netip.AddrPort{&r.ClientAddress, &r.ServerAddress, &r.UpstreamAddress, &r.UpstreamLocalAddress}
}

// previous is what a record says the least of again.
type previous struct {
	start     int64
	addresses [addresses]netip.AddrPort
	texts     [texts]string
}

// encode appends a record without its length, and has before be that.
func encode(b []byte, r *Record, before *previous) []byte {
	le := binary.LittleEndian
	at := len(b)
	b = append(b, 0, 0, 0, 0)
	flags := uint32(0)
	switch r.Direction {
	case proxypb.Direction_INBOUND:
		flags = flagInbound
	case proxypb.Direction_OUTBOUND:
		flags = flagOutbound
	}
	for _, n := range [...]int64{r.StartUnixNanos - before.start, r.TotalNanos, r.RouteNanos, r.ConnectNanos, r.FirstByteNanos, r.TLSNanos} {
		b = binary.AppendVarint(b, n)
	}
	for _, n := range [...]uint64{r.SentBytes, r.ReceivedBytes, r.RequestBodyBytes, r.ResponseBodyBytes, uint64(r.Status), uint64(r.Attempts)} {
		b = binary.AppendUvarint(b, n)
	}
	before.start = r.StartUnixNanos
	if r.TraceID != [16]byte{} || r.SpanID != [8]byte{} {
		flags |= flagTrace
		b = append(append(b, r.TraceID[:]...), r.SpanID[:]...)
	}
	for i, a := range addressesOf(r) {
		if *a == before.addresses[i] {
			continue
		}
		before.addresses[i] = *a
		flags |= 1 << (flagAddresses + i)
		addr := a.Addr()
		switch {
		case addr.Is4():
			bytes := addr.As4()
			b = append(append(b, 4), bytes[:]...)
		case addr.Is6():
			bytes := addr.As16()
			b = append(append(b, 6), bytes[:]...)
		default:
			b = append(b, 0)
		}
		b = le.AppendUint16(b, a.Port())
	}
	for i, text := range textsOf(r) {
		if text == before.texts[i] {
			continue
		}
		before.texts[i] = text
		flags |= 1 << (flagTexts + i)
		b = binary.AppendUvarint(b, uint64(len(text)))
		b = append(b, text...)
	}
	le.PutUint32(b[at:], flags)
	return b
}

// cursor reads what was encoded; once it has failed, everything is zero.
type cursor struct {
	b      []byte
	failed bool
}

func (c *cursor) take(n uint64) []byte {
	if n > uint64(len(c.b)) {
		c.failed, c.b = true, nil
		return nil
	}
	out := c.b[:n]
	c.b = c.b[n:]
	return out
}

func (c *cursor) uvarint() uint64 {
	v, n := binary.Uvarint(c.b)
	if n <= 0 {
		c.failed, c.b = true, nil
		return 0
	}
	c.b = c.b[n:]
	return v
}

func (c *cursor) varint() int64 {
	v := c.uvarint() // zigzag
	return int64(v>>1) ^ -int64(v&1)
}

// decode reads a record without its length, and has before be that.
func decode(r *Record, b []byte, before *copied) bool {
	c := cursor{b: b}
	head := c.take(4)
	if head == nil {
		return false
	}
	flags := binary.LittleEndian.Uint32(head)
	if flags>>flagsEnd != 0 {
		return false
	}
	*r = Record{}
	switch flags & (flagInbound | flagOutbound) {
	case flagInbound:
		r.Direction = proxypb.Direction_INBOUND
	case flagOutbound:
		r.Direction = proxypb.Direction_OUTBOUND
	}
	before.start += c.varint()
	r.StartUnixNanos = before.start
	for _, n := range [...]*int64{&r.TotalNanos, &r.RouteNanos, &r.ConnectNanos, &r.FirstByteNanos, &r.TLSNanos} {
		*n = c.varint()
	}
	for _, n := range [...]*uint64{&r.SentBytes, &r.ReceivedBytes, &r.RequestBodyBytes, &r.ResponseBodyBytes} {
		*n = c.uvarint()
	}
	r.Status, r.Attempts = uint32(c.uvarint()), uint32(c.uvarint())
	if flags&flagTrace != 0 {
		copy(r.TraceID[:], c.take(16))
		copy(r.SpanID[:], c.take(8))
	}
	for i := range addresses {
		if flags&(1<<(flagAddresses+i)) != 0 {
			before.addresses[i] = c.address()
		}
	}
	for i := range texts {
		if flags&(1<<(flagTexts+i)) == 0 {
			continue
		}
		n := c.uvarint()
		if n > MaxText {
			return false
		}
		before.set(i, c.take(n))
	}
	for i, a := range addressesOf(r) {
		*a = before.addresses[i]
		if zone := before.texts[fields+i]; zone != "" {
			*a = netip.AddrPortFrom(a.Addr().WithZone(zone), a.Port())
		}
	}
	for i, text := range fieldsOf(r) {
		*text = before.texts[i]
	}
	return !c.failed && len(c.b) == 0
}

func (c *cursor) address() netip.AddrPort {
	var addr netip.Addr
	kind := c.take(1)
	switch {
	case kind == nil:
		return netip.AddrPort{}
	case kind[0] == 4:
		if b := c.take(4); b != nil {
			addr = netip.AddrFrom4([4]byte(b))
		}
	case kind[0] == 6:
		if b := c.take(16); b != nil {
			addr = netip.AddrFrom16([16]byte(b))
		}
	case kind[0] != 0:
		c.failed = true
	}
	port := c.take(2)
	if port == nil {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(addr, binary.LittleEndian.Uint16(port))
}
