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
	addr, other := Key{Addr: netip.MustParseAddrPort("10.0.0.1:80")}, Key{Addr: netip.MustParseAddrPort("10.0.0.2:80")}
	mine := Key{Addr: addr.Addr, Owner: Owner{"shop/back", 80}}
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
	if _, ok := p.Get(mine, now); ok {
		t.Error("a connection of another owner's")
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
	addr := Key{Addr: netip.MustParseAddrPort("10.0.0.1:80")}
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
	p.Put(Key{Addr: netip.MustParseAddrPort("10.0.0.2:80")}, recent, now)
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

// TestAnOwnersOldestConnectionIsClosed, and no other's.
func TestAnOwnersOldestConnectionIsClosed(t *testing.T) {
	var p Pool[*fakeConn]
	defer p.Close()
	now := time.Now()
	owner := Owner{"shop/back", 80}
	var conns []*fakeConn
	for i, key := range []Key{
		{Addr: netip.MustParseAddrPort("10.0.0.1:80")},
		{Addr: netip.MustParseAddrPort("10.0.0.1:80"), Owner: owner},
		{Addr: netip.MustParseAddrPort("10.0.0.2:80"), Owner: owner},
		{Addr: netip.MustParseAddrPort("10.0.0.1:80"), Owner: owner},
	} {
		conns = append(conns, &fakeConn{})
		p.Put(key, conns[i], now.Add(time.Duration(i)*time.Second))
	}
	for i := 1; i < len(conns); i++ {
		if !p.CloseOne(owner) || !conns[i].closed {
			t.Errorf("it is not number %d that is closed", i)
		}
	}
	if p.CloseOne(owner) || conns[0].closed {
		t.Error("another's is closed")
	}
}

func TestTheConnectionsOfSomeKeysAreClosed(t *testing.T) {
	p := Pool[*fakeConn]{}
	defer p.Close()
	now := time.Now()
	var conns [4]*fakeConn
	for i := range conns {
		conns[i] = &fakeConn{}
		p.Put(Key{Trust: uint64(i / 2)}, conns[i], now)
	}
	p.CloseAll(func(k Key) bool { return k.Trust == 1 })
	for i, c := range conns {
		if c.closed != (i >= 2) {
			t.Errorf("number %d: closed %v", i, c.closed)
		}
	}
	if c, ok := p.Get(Key{Trust: 0}, now); !ok || c != conns[1] {
		t.Error("the others are not there any more")
	}
	if _, ok := p.Get(Key{Trust: 1}, now); ok {
		t.Error("a closed one is given out")
	}
}
