package nft

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/weirmesh/weir/plugin/capture"
	"golang.org/x/sys/unix"
)

// One register is enough: each match loads it and compares it.
const reg = unix.NFT_REG_1

// Offsets into headers, and bits, that no package names.
const (
	offDport       = 2 // of TCP and of UDP
	offTCPFlags    = 13
	offIPv4Daddr   = 16
	offIPv6Daddr   = 24
	tcpFinSynRstAk = 0x17
	tcpSyn         = 0x02
	ipsDstNAT      = 1 << 5 // IPS_DST_NAT, linux/netfilter/nf_conntrack_common.h
	loIndex        = 1      // lo is the first interface of every namespace
)

// encoder turns one rule into expressions. Sets it needs are added to conn ahead
// of the rule.
type encoder struct {
	conn  *nftables.Conn
	table *nftables.Table
	exprs []expr.Any
	isTCP bool // a match has made sure that the packet is TCP
}

func (e *encoder) rule(r capture.Rule) ([]expr.Any, error) {
	for _, m := range r.Matches {
		if err := e.match(m); err != nil {
			return nil, err
		}
	}
	if r.Counter != "" {
		e.add(&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: r.Counter})
	}
	switch r.Verdict.Kind {
	case capture.Return:
		e.add(&expr.Verdict{Kind: expr.VerdictReturn})
	case capture.Redirect:
		e.add(&expr.Immediate{Register: reg, Data: binaryutil.BigEndian.PutUint16(r.Verdict.Port)},
			&expr.Redir{RegisterProtoMin: reg})
	case capture.Reject:
		e.add(&expr.Reject{Type: unix.NFT_REJECT_TCP_RST})
	case capture.Unreachable:
		e.add(&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_PORT_UNREACH})
	case capture.MarkClient:
		e.add(markClient()...)
	case capture.Untrack:
		e.add(&expr.Notrack{})
	default:
		return nil, fmt.Errorf("no encoding for %v", r.Verdict)
	}
	return e.exprs, nil
}

func (e *encoder) add(x ...expr.Any) { e.exprs = append(e.exprs, x...) }

func (e *encoder) match(m capture.Match) error {
	switch m := m.(type) {
	case capture.Loopback:
		key := expr.MetaKeyIIF
		if m.Out {
			key = expr.MetaKeyOIF
		}
		e.add(&expr.Meta{Key: key, Register: reg}, compare(m.Not, binaryutil.NativeEndian.PutUint32(loIndex)))
	case capture.LocalDest:
		e.add(&expr.Fib{Register: reg, ResultADDRTYPE: true, FlagDADDR: true},
			compare(m.Not, binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)))
	case capture.TransparentSocket, capture.ClientMarked:
		e.add(matchClient(m)...)
	case capture.TCP:
		e.tcp()
	case capture.FirstPacket:
		e.tcp()
		e.add(payload(expr.PayloadBaseTransportHeader, offTCPFlags, 1), mask([]byte{tcpFinSynRstAk}),
			compare(m.Not, []byte{tcpSyn}))
	case capture.DestPort:
		e.tcp()
		e.add(payload(expr.PayloadBaseTransportHeader, offDport, 2))
		return e.lookup(nftables.TypeInetService, portIntervals(m.Ports), false)
	case capture.UDPDestPort:
		e.add(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg}, compare(false, []byte{unix.IPPROTO_UDP}),
			payload(expr.PayloadBaseTransportHeader, offDport, 2))
		return e.lookup(nftables.TypeInetService, portIntervals(m.Ports), false)
	case capture.Interface:
		key := expr.MetaKeyIIFNAME
		if m.Out {
			key = expr.MetaKeyOIFNAME
		}
		e.add(&expr.Meta{Key: key, Register: reg}, compare(false, ifName(m.Name)))
	case capture.SocketOwner:
		key, kind := expr.MetaKeySKUID, nftables.TypeUID
		if m.Group {
			key, kind = expr.MetaKeySKGID, nftables.TypeGID
		}
		// The kernel loads these in its own byte order; intervals have an order only
		// in the network's.
		e.add(&expr.Meta{Key: key, Register: reg},
			&expr.Byteorder{SourceRegister: reg, DestRegister: reg, Op: expr.ByteorderHton, Len: 4, Size: 4})
		return e.lookup(kind, idIntervals(m.IDs), true)
	case capture.DestAddr:
		family, offset, kind := byte(unix.NFPROTO_IPV4), uint32(offIPv4Daddr), nftables.TypeIPAddr
		if m.Prefixes[0].Addr().Is6() {
			family, offset, kind = unix.NFPROTO_IPV6, offIPv6Daddr, nftables.TypeIP6Addr
		}
		e.add(&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg}, compare(false, []byte{family}),
			payload(expr.PayloadBaseNetworkHeader, offset, kind.Bytes))
		return e.lookup(kind, prefixIntervals(m.Prefixes), false)
	case capture.OwnSocket:
		e.add(&expr.Socket{Key: expr.SocketKeyCgroupv2, Level: uint32(m.Cgroup.Level), Register: reg},
			compare(false, binaryutil.NativeEndian.PutUint64(m.Cgroup.ID)))
	case capture.AnySocket:
		// The expression breaks off where there is no socket; its result, 0 or 1,
		// does not matter.
		e.add(&expr.Socket{Key: expr.SocketKeyTransparent, Register: reg},
			&expr.Cmp{Op: expr.CmpOpLte, Register: reg, Data: []byte{1}})
	case capture.Untranslated:
		e.add(&expr.Ct{Key: expr.CtKeySTATUS, Register: reg}, mask(binaryutil.NativeEndian.PutUint32(ipsDstNAT)),
			compare(false, make([]byte, 4)))
	default:
		return fmt.Errorf("no encoding for %v", m)
	}
	return nil
}

// tcp makes sure of the protocol once per rule, before its header is read.
func (e *encoder) tcp() {
	if e.isTCP {
		return
	}
	e.isTCP = true
	e.add(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg}, compare(false, []byte{unix.IPPROTO_TCP}))
}

// lookup compares the register with a set of its own, anonymous, so that it goes
// with the rule. It is a set of intervals if it must be, or if tree says so.
func (e *encoder) lookup(kind nftables.SetDatatype, in []interval, tree bool) error {
	set := &nftables.Set{Table: e.table, Anonymous: true, Constant: true, KeyType: kind, Interval: tree || ranged(in)}
	var elements []nftables.SetElement
	for _, i := range in {
		elements = append(elements, nftables.SetElement{Key: i.first})
		// The end of an interval is the first key past it; past the last key of
		// all there is none.
		if end, more := next(i.last); set.Interval && more {
			elements = append(elements, nftables.SetElement{Key: end, IntervalEnd: true})
		}
	}
	if err := e.conn.AddSet(set, elements); err != nil {
		return err
	}
	e.add(&expr.Lookup{SourceRegister: reg, SetID: set.ID, SetName: set.Name})
	return nil
}

func compare(not bool, data []byte) *expr.Cmp {
	op := expr.CmpOpEq
	if not {
		op = expr.CmpOpNeq
	}
	return &expr.Cmp{Op: op, Register: reg, Data: data}
}

func payload(base expr.PayloadBase, offset, length uint32) *expr.Payload {
	return &expr.Payload{DestRegister: reg, Base: base, Offset: offset, Len: length}
}

func mask(bits []byte) *expr.Bitwise {
	return &expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: uint32(len(bits)), Mask: bits, Xor: make([]byte, len(bits))}
}

// interval is a range of keys, both ends included, in network byte order.
type interval struct{ first, last []byte }

func portIntervals(ports []capture.PortRange) []interval {
	var out []interval
	for _, p := range ports {
		out = append(out, interval{binary.BigEndian.AppendUint16(nil, p.First), binary.BigEndian.AppendUint16(nil, p.Last)})
	}
	return out
}

func idIntervals(ids []capture.IDRange) []interval {
	var out []interval
	for _, r := range ids {
		out = append(out, interval{binary.BigEndian.AppendUint32(nil, r.First), binary.BigEndian.AppendUint32(nil, r.Last)})
	}
	return out
}

// ifName is an interface's name as the kernel keeps it: IFNAMSIZ bytes.
func ifName(name string) []byte {
	out := make([]byte, unix.IFNAMSIZ)
	copy(out, name)
	return out
}

func prefixIntervals(prefixes []netip.Prefix) []interval {
	var out []interval
	for _, p := range prefixes {
		first := p.Addr().AsSlice()
		last := p.Addr().AsSlice()
		for bit := p.Bits(); bit < len(last)*8; bit++ {
			last[bit/8] |= 0x80 >> (bit % 8)
		}
		out = append(out, interval{first, last})
	}
	return out
}

// ranged says whether any interval is more than one key. A set of single keys is
// a hash or a bitmap, and no tree.
func ranged(in []interval) bool {
	for _, i := range in {
		if string(i.first) != string(i.last) {
			return true
		}
	}
	return false
}

// next is the key after k, and whether there is one.
func next(k []byte) ([]byte, bool) {
	out := append([]byte(nil), k...)
	for i := len(out) - 1; i >= 0; i-- {
		out[i]++
		if out[i] != 0 {
			return out, true
		}
	}
	return nil, false
}
