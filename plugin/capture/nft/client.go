package nft

import (
	"bytes"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/weirmesh/weir/plugin/capture"
)

// What keeps the caller's address.
var clientMark = binaryutil.NativeEndian.PutUint32(capture.ClientMark)

func matchClient(m capture.Match) []expr.Any {
	if _, ok := m.(capture.TransparentSocket); ok {
		return []expr.Any{&expr.Socket{Key: expr.SocketKeyTransparent, Register: reg}, compare(false, []byte{1})}
	}
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyMARK, Register: reg}, compare(false, clientMark)}
}

func markClient() []expr.Any {
	return []expr.Any{&expr.Immediate{Register: reg, Data: clientMark},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg}}
}

// decodeClient reads what matchClient writes; nil is something else.
func decodeClient(loaded expr.Any, c *expr.Cmp) capture.Match {
	if c.Op != expr.CmpOpEq {
		return nil
	}
	switch l := loaded.(type) {
	case *expr.Socket:
		if l.Key == expr.SocketKeyTransparent && bytes.Equal(c.Data, []byte{1}) {
			return capture.TransparentSocket{}
		}
	case *expr.Meta:
		if l.Key == expr.MetaKeyMARK && bytes.Equal(c.Data, clientMark) {
			return capture.ClientMarked{}
		}
	}
	return nil
}

// sets says whether an expression writes to the packet instead of reading it.
func sets(e expr.Any) bool {
	switch e := e.(type) {
	case *expr.Meta:
		return e.SourceRegister
	case *expr.Ct:
		// The library (0.3.0) does not read the register that is written from.
		return e.Register == 0
	}
	return false
}

// set reads what markClient writes, of which the immediate has been seen.
func (d *decoder) set(e expr.Any) {
	if meta, ok := e.(*expr.Meta); ok && meta.Key == expr.MetaKeyMARK && bytes.Equal(d.imm, clientMark) {
		d.rule.Verdict = capture.Verdict{Kind: capture.MarkClient}
		return
	}
	d.foreign("set")
}
