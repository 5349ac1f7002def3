package upstream

import (
	"net/netip"
	"testing"
	"time"
)

type fakeConn struct{ ended, closed bool }

func (f *fakeConn) Close() error { f.closed = true; return nil }
func (f *fakeConn) Quiet() bool  { return !f.ended }

func TestAPoolGivesOutWhatIsGood(t *testing.T) {
	addr, other := netip.MustParseAddrPort("10.0.0.1:80"), netip.MustParseAddrPort("10.0.0.2:80")
	var p Pool[*fakeConn]
	defer p.Close()
	now := time.Now()
	first, second, ended := &fakeConn{}, &fakeConn{}, &fakeConn{}
	for _, c := range []*fakeConn{first, second, ended} {
		p.Put(addr, c, now)
	}
	if _, ok := p.Get(other, now); ok {
		t.Error("a connection to another endpoint")
	}
	ended.ended = true
	later := now.Add(time.Second)
	if got, ok := p.Get(addr, later); !ok || got != second || !ended.closed {
		t.Errorf("not the last one that is good, or the bad one is open: %v", ended.closed)
	}
	if got, ok := p.Get(addr, later); !ok || got != first {
		t.Error("not the first one")
	}
	if _, ok := p.Get(addr, later); ok {
		t.Error("one too many")
	}
}

func TestAPoolIsBoundedAndForgets(t *testing.T) {
	addr := netip.MustParseAddrPort("10.0.0.1:80")
	var p Pool[*fakeConn]
	now := time.Now()
	var conns []*fakeConn
	for range maxIdle + 1 {
		c := &fakeConn{}
		conns = append(conns, c)
		p.Put(addr, c, now.Add(-2*idleTimeout))
	}
	if !conns[maxIdle].closed || conns[0].closed {
		t.Error("not bounded")
	}
	recent := &fakeConn{}
	p.Put(netip.MustParseAddrPort("10.0.0.2:80"), recent, now)
	p.clean()
	if !conns[0].closed || recent.closed || len(p.idle) != 1 {
		t.Errorf("old one closed %v, recent one closed %v, of %d endpoints", conns[0].closed, recent.closed, len(p.idle))
	}
	p.Close()
	late := &fakeConn{}
	p.Put(addr, late, now)
	if !recent.closed || !late.closed {
		t.Error("open after Close")
	}
}
