package upstream

import (
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Idle connections are few: what is more than that was a peak.
const (
	maxIdle = 64 // of one key
	// idleTimeout is less than servers commonly wait before they close.
	idleTimeout = 60 * time.Second
	sweepEvery  = 15 * time.Second
)

// Reusable is a connection that may be used again.
type Reusable interface {
	Close() error
	// Quiet reports whether nothing has come since it became idle, its end
	// included.
	Quiet() bool
}

// Key is where a connection leads, and whose it is. Identity is the SPIFFE ID that its
// endpoint has shown, under the trust of that number; empty: none, it is plain.
type Key struct {
	Addr     netip.AddrPort
	Owner    Owner
	Identity string
	Trust    uint64
}

// Owner is a backend whose connections are counted, and so nobody else's: its
// Service, and its endpoints' port. The zero value is everybody else.
type Owner struct {
	Service string
	Port    uint16
}

// Pool keeps connections between requests, by the endpoint they lead to. The last
// one put in is the first one out: what is not needed ages, and is closed. The zero
// value is ready for use; Close it.
type Pool[C Reusable] struct {
	mu     sync.Mutex
	idle   map[Key][]pooled[C]
	sweep  *time.Timer
	closed bool
}

type pooled[C Reusable] struct {
	conn  C
	since time.Time
}

// Fresh is how long after it became idle a connection is taken without a look: a
// server that closed it so soon would have said so before.
const Fresh = 5 * time.Millisecond

// Get takes a connection of that key out, if there is one that is still good.
func (p *Pool[C]) Get(key Key, now time.Time) (C, bool) {
	for {
		c, since, ok := p.pop(key)
		if !ok || now.Sub(since) < Fresh || c.Quiet() {
			return c, ok
		}
		c.Close()
	}
}

func (p *Pool[C]) pop(key Key) (C, time.Time, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := p.idle[key]
	if len(list) == 0 {
		var none C
		return none, time.Time{}, false
	}
	last := list[len(list)-1]
	list[len(list)-1] = pooled[C]{}
	p.idle[key] = list[:len(list)-1]
	return last.conn, last.since, true
}

// Put takes a connection over, which it closes if there are too many.
func (p *Pool[C]) Put(key Key, c C, now time.Time) {
	p.mu.Lock()
	if p.closed || len(p.idle[key]) >= maxIdle {
		p.mu.Unlock()
		c.Close()
		return
	}
	if p.idle == nil {
		p.idle = map[Key][]pooled[C]{}
	}
	p.idle[key] = append(p.idle[key], pooled[C]{c, now})
	if p.sweep == nil {
		p.sweep = time.AfterFunc(sweepEvery, p.clean)
	}
	p.mu.Unlock()
}

// CloseOne closes the connection of an owner's that has been idle for longest, and
// reports whether there was one.
func (p *Pool[C]) CloseOne(owner Owner) bool {
	p.mu.Lock()
	var oldest Key
	found := false
	for key, list := range p.idle {
		if key.Owner == owner && len(list) > 0 && (!found || list[0].since.Before(p.idle[oldest][0].since)) {
			oldest, found = key, true
		}
	}
	if !found {
		p.mu.Unlock()
		return false
	}
	list := p.idle[oldest]
	c := list[0].conn
	p.idle[oldest] = slices.Delete(list, 0, 1)
	p.mu.Unlock()
	c.Close()
	return true
}

// CloseAll closes the connections of those keys.
func (p *Pool[C]) CloseAll(those func(Key) bool) {
	p.mu.Lock()
	var found []pooled[C]
	for key, list := range p.idle {
		if those(key) {
			found = append(found, list...)
			delete(p.idle, key)
		}
	}
	p.mu.Unlock()
	for _, c := range found {
		c.conn.Close()
	}
}

// clean closes what has been idle for too long, or is of no use any more, and comes
// again while anything is left.
func (p *Pool[C]) clean() {
	now := time.Now()
	p.mu.Lock()
	var old []C
	p.sweep = nil
	for key, list := range p.idle {
		kept := list[:0]
		for _, c := range list {
			if now.Sub(c.since) < idleTimeout && c.conn.Quiet() {
				kept = append(kept, c)
			} else {
				old = append(old, c.conn)
			}
		}
		clear(list[len(kept):])
		if p.idle[key] = kept; len(kept) == 0 {
			delete(p.idle, key)
		}
	}
	if len(p.idle) > 0 && !p.closed {
		p.sweep = time.AfterFunc(sweepEvery, p.clean)
	}
	p.mu.Unlock()
	for _, c := range old {
		c.Close()
	}
}

// Close closes all idle connections, and those that are put in later.
func (p *Pool[C]) Close() {
	p.mu.Lock()
	idle := p.idle
	p.idle, p.closed = nil, true
	if p.sweep != nil {
		p.sweep.Stop()
	}
	p.mu.Unlock()
	for _, list := range idle {
		for _, c := range list {
			c.conn.Close()
		}
	}
}
