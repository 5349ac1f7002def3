package nft

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/weirmesh/weir/plugin/capture"
	"golang.org/x/sys/unix"
)

// foreign stands for what this package would not have written. It is not a match
// of package capture, so a rule with one equals none of ours.
type foreign struct {
	capture.Match
	text string
}

func (f foreign) String() string { return "<" + f.text + ">" }

// decoder reads expressions back into matches. Each match was written as load,
// maybe mask, compare; the load waits in loaded until the compare is seen.
type decoder struct {
	sets   map[string]rawSet
	rule   capture.Rule
	loaded expr.Any
	masked []byte
	imm    []byte
	proto  bool // "l4proto tcp" was seen and no match has used it yet
	udp    bool // "l4proto udp" was seen and no match has used it yet
	hton   bool // what is loaded was turned into network byte order
	family byte // "nfproto" was seen and no match has used it yet
}

func decodeRule(r rawRule, sets map[string]rawSet) capture.Rule {
	d := decoder{sets: sets}
	for _, raw := range r.exprs {
		if raw.name == "byteorder" {
			d.byteorder(raw)
			continue
		}
		e := newExpr(raw.name)
		if e == nil || expr.Unmarshal(unix.NFPROTO_INET, raw.data, e) != nil {
			d.foreign(raw.name)
			continue
		}
		d.step(e, raw)
	}
	d.keepTCP()
	d.keepUDP()
	return d.rule
}

// newExpr makes the expressions that encode writes.
func newExpr(name string) expr.Any {
	switch name {
	case "meta":
		return new(expr.Meta)
	case "fib":
		return new(expr.Fib)
	case "payload":
		return new(expr.Payload)
	case "bitwise":
		return new(expr.Bitwise)
	case "cmp":
		return new(expr.Cmp)
	case "lookup":
		return new(expr.Lookup)
	case "socket":
		return new(expr.Socket)
	case "ct":
		return new(expr.Ct)
	case "objref":
		return new(expr.Objref)
	case "immediate":
		return new(expr.Immediate)
	case "redir":
		return new(expr.Redir)
	case "reject":
		return new(expr.Reject)
	case "notrack":
		return new(expr.Notrack)
	}
	return nil
}

func (d *decoder) foreign(text string) { d.match(foreign{text: text}) }

func (d *decoder) match(m capture.Match) {
	switch m.(type) {
	case capture.FirstPacket, capture.DestPort:
		d.proto = false // these imply it
	default:
		d.keepTCP()
	}
	if _, ok := m.(capture.UDPDestPort); ok {
		d.udp = false
	}
	d.keepUDP()
	d.rule.Matches = append(d.rule.Matches, m)
	d.loaded, d.masked, d.hton = nil, nil, false
}

// keepTCP writes down an "l4proto tcp" that the next match does not imply.
func (d *decoder) keepTCP() {
	if d.proto {
		d.proto = false
		d.rule.Matches = append(d.rule.Matches, capture.TCP{})
	}
}

// keepUDP writes down an "l4proto udp" that is no part of another match. Weir
// writes none.
func (d *decoder) keepUDP() {
	if d.udp {
		d.udp = false
		d.rule.Matches = append(d.rule.Matches, foreign{text: "meta l4proto udp"})
	}
}

func (d *decoder) step(e expr.Any, raw rawExpr) {
	switch e := e.(type) {
	case *expr.Bitwise:
		d.masked = e.Mask
	case *expr.Cmp:
		d.compare(e)
	case *expr.Lookup:
		d.lookup(e)
	case *expr.Objref:
		d.rule.Counter = e.Name
	case *expr.Immediate:
		d.immediate(e, raw)
	case *expr.Meta, *expr.Ct:
		if sets(e) {
			d.set(e)
			return
		}
		d.loaded, d.masked, d.hton = e, nil, false
	case *expr.Redir:
		if len(d.imm) != 2 {
			d.foreign("redir")
			return
		}
		d.rule.Verdict = capture.Verdict{Kind: capture.Redirect, Port: binary.BigEndian.Uint16(d.imm)}
	case *expr.Notrack:
		d.rule.Verdict = capture.Verdict{Kind: capture.Untrack}
	case *expr.Reject:
		switch {
		case e.Type == unix.NFT_REJECT_TCP_RST:
			d.rule.Verdict = capture.Verdict{Kind: capture.Reject}
		case e.Type == unix.NFT_REJECT_ICMPX_UNREACH && e.Code == unix.NFT_REJECT_ICMPX_PORT_UNREACH:
			d.rule.Verdict = capture.Verdict{Kind: capture.Unreachable}
		default:
			d.foreign("reject")
		}
	default:
		d.loaded, d.masked, d.hton = e, nil, false
	}
}

func (d *decoder) immediate(e *expr.Immediate, raw rawExpr) {
	if e.Register != unix.NFT_REG_VERDICT {
		d.imm = e.Data
		return
	}
	var v expr.Verdict
	if err := expr.Unmarshal(unix.NFPROTO_INET, raw.data, &v); err != nil || v.Kind != expr.VerdictReturn {
		d.foreign("verdict")
		return
	}
	d.rule.Verdict = capture.Verdict{Kind: capture.Return}
}

func (d *decoder) compare(c *expr.Cmp) {
	not := c.Op == expr.CmpOpNeq
	plain := not || c.Op == expr.CmpOpEq
	is := func(want []byte) bool { return plain && bytes.Equal(c.Data, want) }
	native32 := binaryutil.NativeEndian.PutUint32
	if d.hton {
		d.foreign("byteorder")
		return
	}
	if m := decodeClient(d.loaded, c); m != nil && d.masked == nil {
		d.match(m)
		return
	}
	switch l := d.loaded.(type) {
	case *expr.Meta:
		switch {
		case (l.Key == expr.MetaKeyIIF || l.Key == expr.MetaKeyOIF) && is(native32(loIndex)):
			d.match(capture.Loopback{Out: l.Key == expr.MetaKeyOIF, Not: not})
			return
		case l.Key == expr.MetaKeyL4PROTO && !not && is([]byte{unix.IPPROTO_TCP}):
			d.proto = true
			return
		case l.Key == expr.MetaKeyL4PROTO && !not && is([]byte{unix.IPPROTO_UDP}):
			d.udp = true
			return
		case (l.Key == expr.MetaKeyIIFNAME || l.Key == expr.MetaKeyOIFNAME) && c.Op == expr.CmpOpEq && len(c.Data) == unix.IFNAMSIZ:
			d.match(capture.Interface{Out: l.Key == expr.MetaKeyOIFNAME, Name: strings.TrimRight(string(c.Data), "\x00")})
			return
		case l.Key == expr.MetaKeyNFPROTO && !not && plain && len(c.Data) == 1:
			d.family = c.Data[0]
			return
		}
	case *expr.Fib:
		if l.ResultADDRTYPE && l.FlagDADDR && !l.FlagIIF && is(native32(unix.RTN_LOCAL)) {
			d.match(capture.LocalDest{Not: not})
			return
		}
	case *expr.Payload:
		if l.Base == expr.PayloadBaseTransportHeader && l.Offset == offTCPFlags && d.proto0() &&
			bytes.Equal(d.masked, []byte{tcpFinSynRstAk}) && is([]byte{tcpSyn}) {
			d.match(capture.FirstPacket{Not: not})
			return
		}
	case *expr.Socket:
		switch {
		case l.Key == expr.SocketKeyCgroupv2 && c.Op == expr.CmpOpEq && len(c.Data) == 8:
			d.match(capture.OwnSocket{Cgroup: capture.Bypass{
				ID: binaryutil.NativeEndian.Uint64(c.Data), Level: int(l.Level)}})
			return
		case l.Key == expr.SocketKeyTransparent && c.Op == expr.CmpOpLte && bytes.Equal(c.Data, []byte{1}):
			d.match(capture.AnySocket{})
			return
		}
	case *expr.Ct:
		if l.Key == expr.CtKeySTATUS && bytes.Equal(d.masked, native32(ipsDstNAT)) && c.Op == expr.CmpOpEq && is(native32(0)) {
			d.match(capture.Untranslated{})
			return
		}
	}
	d.foreign(fmt.Sprintf("cmp %T", d.loaded))
}

// proto0 says whether the rule has made sure of TCP before this payload.
func (d *decoder) proto0() bool {
	if d.proto {
		return true
	}
	for _, m := range d.rule.Matches {
		switch m.(type) {
		case capture.TCP, capture.FirstPacket, capture.DestPort:
			return true
		}
	}
	return false
}

func (d *decoder) lookup(l *expr.Lookup) {
	if meta, ok := d.loaded.(*expr.Meta); ok {
		d.owner(l, meta)
		return
	}
	p, ok := d.loaded.(*expr.Payload)
	in, known := d.sets[l.SetName]
	if !ok || !known || l.Invert || d.masked != nil || d.hton {
		d.foreign("lookup")
		return
	}
	intervals := decodeSet(in)
	switch {
	case p.Base == expr.PayloadBaseTransportHeader && p.Offset == offDport && p.Len == 2 && d.udp:
		d.match(capture.UDPDestPort{Ports: toPorts(intervals)})
	case p.Base == expr.PayloadBaseTransportHeader && p.Offset == offDport && p.Len == 2 && d.proto0():
		d.match(capture.DestPort{Ports: toPorts(intervals)})
	case p.Base == expr.PayloadBaseNetworkHeader &&
		(d.family == unix.NFPROTO_IPV4 && p.Offset == offIPv4Daddr && p.Len == 4 ||
			d.family == unix.NFPROTO_IPV6 && p.Offset == offIPv6Daddr && p.Len == 16):
		prefixes, ok := toPrefixes(intervals)
		if !ok {
			d.foreign("lookup daddr")
			return
		}
		d.match(capture.DestAddr{Prefixes: prefixes})
	default:
		d.foreign("lookup")
	}
}

func toPorts(in []interval) []capture.PortRange {
	var out []capture.PortRange
	for _, i := range in {
		out = append(out, capture.PortRange{First: binary.BigEndian.Uint16(i.first), Last: binary.BigEndian.Uint16(i.last)})
	}
	return out
}

// decodeSet sorts a set's elements and pairs starts with ends.
func decodeSet(set rawSet) []interval {
	sorted := slices.Clone(set.elements)
	slices.SortFunc(sorted, func(a, b nftables.SetElement) int {
		if c := bytes.Compare(a.Key, b.Key); c != 0 || a.IntervalEnd == b.IntervalEnd {
			return c
		}
		// Where one interval ends as the next starts, the end is first.
		if a.IntervalEnd {
			return -1
		}
		return 1
	})
	var out []interval
	for i, e := range sorted {
		if e.IntervalEnd {
			continue
		}
		one := interval{first: e.Key, last: e.Key}
		switch {
		case !set.intervals:
		case i+1 < len(sorted) && sorted[i+1].IntervalEnd:
			one.last = previous(sorted[i+1].Key)
		case i+1 == len(sorted):
			one.last = bytes.Repeat([]byte{0xff}, len(e.Key)) // no end: up to the last key of all
		}
		out = append(out, one)
	}
	return out
}

func previous(k []byte) []byte {
	out := slices.Clone(k)
	for i := len(out) - 1; i >= 0; i-- {
		out[i]--
		if out[i] != 0xff {
			break
		}
	}
	return out
}

// toPrefixes reads intervals that are prefixes; others are nobody's of ours.
func toPrefixes(in []interval) ([]netip.Prefix, bool) {
	var out []netip.Prefix
	for _, i := range in {
		first, ok := netip.AddrFromSlice(i.first)
		if !ok {
			return nil, false
		}
		length := 0
		for b := range i.first {
			same := bits.LeadingZeros8(i.first[b] ^ i.last[b])
			length += same
			if same < 8 {
				break
			}
		}
		p := netip.PrefixFrom(first, length)
		if back := prefixIntervals([]netip.Prefix{p.Masked()})[0]; !bytes.Equal(back.first, i.first) || !bytes.Equal(back.last, i.last) {
			return nil, false
		}
		out = append(out, p)
	}
	return out, true
}
