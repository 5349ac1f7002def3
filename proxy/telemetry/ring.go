// Package telemetry holds what the proxy reports until an agent reads it: records
// of requests and connections go in where they end, and the session with the agent
// takes them out (Ring); and what is counted of them (Meter). Both are bounded:
// while no agent reads, the oldest records give way and are counted, and counts are
// added to each other. It writes no file and serves no metrics: the agent does.
package telemetry

import (
	"slices"
	"sync"
	"time"

	"github.com/weirmesh/weir/agent/proxypb"
)

const (
	// Limit is how many records are kept, of some 400 bytes each.
	Limit = 4096
	// filling is how many are not to wait any longer for others: there is room for as many
	// as come in 25 ms at 40,000 requests a second.
	filling = Limit * 3 / 4
	// Batch is how many of them are sent at once. Each message wakes an agent, whose threads
	// then take turns with those that serve requests: of 256 a record costs it half of what
	// it costs of 64. Of more a request that comes by would be late.
	Batch = 256
)

// smallest is how many records there is room for at first.
const smallest = 16

// Ring is a queue of records. Make it with NewRing.
type Ring struct {
	ready   chan struct{}
	filling chan struct{}

	mu      sync.Mutex
	records []Record // a circle; a power of two
	head, n int      // the oldest, and how many there are
	lost    uint64   // that gave way before the oldest

	texting sync.Mutex // of text; taken after mu
	text    addresses
}

// NewRing returns an empty one.
func NewRing() *Ring {
	return &Ring{ready: make(chan struct{}, 1), filling: make(chan struct{}, 1)}
}

// Put takes a copy of a record.
func (r *Ring) Put(record *Record) {
	r.mu.Lock()
	if r.n == Limit {
		r.dropOldest()
	}
	r.reserve(1)
	at := &r.records[r.at(r.n)]
	*at = *record
	at.open = nil
	r.n++
	full := r.n == filling
	r.mu.Unlock()
	r.Wake()
	if full {
		wake(r.filling)
	}
}

// at is the place of the i-th oldest.
func (r *Ring) at(i int) int { return (r.head + i) & (len(r.records) - 1) }

// reserve makes room for n more, as far as the limit allows.
func (r *Ring) reserve(n int) {
	size := max(len(r.records), smallest)
	for size < r.n+n {
		size *= 2
	}
	if size == len(r.records) {
		return
	}
	larger := make([]Record, size)
	for i := range r.n {
		larger[i] = r.records[r.at(i)]
	}
	r.records, r.head = larger, 0
}

func (r *Ring) dropOldest() {
	r.lost++
	r.records[r.head] = Record{}
	r.head = r.at(1)
	r.n--
}

// Wake makes Ready have a value.
func (r *Ring) Wake() { wake(r.ready) }

func wake(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Take returns the oldest records, up to Batch of them, in into if that has room for so
// many; none if there are none, and then the ring holds no memory any more.
func (r *Ring) Take(into []Record) []Record {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.n == 0 {
		r.records, r.head = nil, 0
		r.texting.Lock()
		r.text = addresses{}
		r.texting.Unlock()
		return nil
	}
	n := min(r.n, Batch)
	out := slices.Grow(into[:0], n)[:n]
	for i := range out {
		at := &r.records[r.at(i)]
		out[i] = *at
		*at = Record{}
	}
	out[0].lost, r.lost = r.lost, 0
	r.head = r.at(len(out))
	r.n -= len(out)
	if r.n >= filling {
		wake(r.filling)
	}
	return out
}

// Return puts back what Take returned last, and could not be delivered.
func (r *Ring) Return(records []Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lost += records[0].lost
	records[0].lost = 0
	room := min(Limit-r.n, len(records))
	r.lost += uint64(len(records) - room)
	r.reserve(room)
	for i := len(records) - 1; i >= len(records)-room; i-- {
		r.head = r.at(-1)
		r.records[r.head] = records[i]
		r.n++
	}
}

// Message is records on the wire, in the memory of writer, until that is used again.
func (r *Ring) Message(records []Record, writer *proxypb.AccessLogWriter) *proxypb.AccessLogs {
	r.texting.Lock()
	defer r.texting.Unlock()
	return writer.Write(len(records), func(i int, into *proxypb.AccessLog) { records[i].fill(into, &r.text) })
}

// Len is how many records wait.
func (r *Ring) Len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.n
}

// Flush waits until all records are taken, at most for limit.
func (r *Ring) Flush(limit time.Duration) {
	for deadline := time.Now().Add(limit); r.Len() > 0 && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
}

// Ready has a value when records may wait. One reader.
func (r *Ring) Ready() <-chan struct{} { return r.ready }

// Filling has a value when so many wait that they should not for long. One reader.
func (r *Ring) Filling() <-chan struct{} { return r.filling }
