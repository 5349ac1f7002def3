// Package telemetry holds what the proxy reports until an agent reads it: records
// of connections go in where they end, and the session with the agent takes them
// out. It is bounded; while no agent reads, the oldest records give way and are
// counted. It computes no metrics and writes no file: the agent does.
package telemetry

import (
	"slices"
	"sync"
	"time"

	"github.com/weirmesh/weir/agent/proxypb"
)

// Limit is how many records are kept, a few hundred bytes each.
const Limit = 1024

// Ring is a queue of access log records. Make it with NewRing.
type Ring struct {
	ready chan struct{}

	mu      sync.Mutex
	records []*proxypb.AccessLog // oldest first, from head on
	head    int
}

// NewRing returns an empty one.
func NewRing() *Ring { return &Ring{ready: make(chan struct{}, 1)} }

// Put takes a record over.
func (r *Ring) Put(record *proxypb.AccessLog) {
	r.mu.Lock()
	if len(r.records)-r.head >= Limit {
		lost := r.pop()
		r.records[r.head].DroppedBefore += lost.GetDroppedBefore() + 1
	}
	if r.head > 0 && len(r.records) == cap(r.records) {
		n := copy(r.records, r.records[r.head:])
		clear(r.records[n:])
		r.records, r.head = r.records[:n], 0
	}
	r.records = append(r.records, record)
	r.mu.Unlock()
	r.Wake()
}

// Wake makes Ready have a value.
func (r *Ring) Wake() {
	select {
	case r.ready <- struct{}{}:
	default:
	}
}

// Take returns the oldest record, or nil.
func (r *Ring) Take() *proxypb.AccessLog {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.head == len(r.records) {
		return nil
	}
	record := r.pop()
	if r.head == len(r.records) {
		r.records, r.head = nil, 0 // an idle proxy keeps no memory for this
	}
	return record
}

// Return puts back a record that could not be delivered.
func (r *Ring) Return(record *proxypb.AccessLog) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case len(r.records)-r.head >= Limit:
		r.records[r.head].DroppedBefore += record.GetDroppedBefore() + 1
	case r.head > 0:
		r.head--
		r.records[r.head] = record
	default:
		r.records = slices.Insert(r.records, 0, record)
	}
}

func (r *Ring) pop() *proxypb.AccessLog {
	record := r.records[r.head]
	r.records[r.head] = nil
	r.head++
	return record
}

// Len is how many records wait.
func (r *Ring) Len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.records) - r.head
}

// Flush waits until all records are taken, at most for limit.
func (r *Ring) Flush(limit time.Duration) {
	for deadline := time.Now().Add(limit); r.Len() > 0 && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
}

// Ready has a value when records may wait. One reader.
func (r *Ring) Ready() <-chan struct{} { return r.ready }
