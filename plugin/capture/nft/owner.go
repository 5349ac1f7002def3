package nft

import (
	"encoding/binary"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"github.com/weirmesh/weir/plugin/capture"
	"golang.org/x/sys/unix"
)

// byteorder notes that what is loaded is turned into network byte order, whole.
// The library (0.3.0) writes this expression and does not read it.
func (d *decoder) byteorder(raw rawExpr) {
	if !isHton(raw.data) {
		d.foreign(raw.name)
		return
	}
	d.hton = true
}

func isHton(data []byte) bool {
	ad, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return false
	}
	ad.ByteOrder = binary.BigEndian
	var source, dest, op, length, size uint32
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_BYTEORDER_SREG:
			source = ad.Uint32()
		case unix.NFTA_BYTEORDER_DREG:
			dest = ad.Uint32()
		case unix.NFTA_BYTEORDER_OP:
			op = ad.Uint32()
		case unix.NFTA_BYTEORDER_LEN:
			length = ad.Uint32()
		case unix.NFTA_BYTEORDER_SIZE:
			size = ad.Uint32()
		}
	}
	return ad.Err() == nil && source == dest && op == unix.NFT_BYTEORDER_HTON && length == 4 && size == 4
}

// owner decodes a lookup of the socket's user or group. A set of intervals has its
// keys in network byte order; nft makes others too, in the machine's.
func (d *decoder) owner(l *expr.Lookup, meta *expr.Meta) {
	in, known := d.sets[l.SetName]
	group := meta.Key == expr.MetaKeySKGID
	if !known || l.Invert || d.masked != nil || !group && meta.Key != expr.MetaKeySKUID || in.intervals != d.hton {
		d.foreign("lookup")
		return
	}
	if !in.intervals {
		in.elements = slices.Clone(in.elements)
		for i, e := range in.elements {
			if len(e.Key) != 4 {
				d.foreign("lookup")
				return
			}
			key := binary.BigEndian.AppendUint32(nil, binary.NativeEndian.Uint32(e.Key))
			in.elements[i] = nftables.SetElement{Key: key, IntervalEnd: e.IntervalEnd}
		}
	}
	var ids []capture.IDRange
	for _, i := range decodeSet(in) {
		ids = append(ids, capture.IDRange{First: binary.BigEndian.Uint32(i.first), Last: binary.BigEndian.Uint32(i.last)})
	}
	d.match(capture.SocketOwner{Group: group, IDs: ids})
}
