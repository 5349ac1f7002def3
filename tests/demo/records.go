package main

import (
	"bytes"
	"context"
	"encoding/json"
	"slices"
	"sync"
	"time"

	"github.com/weirmesh/weir/agent/telemetry"
)

// recordTimeout is how long a record may take from its connection's end, through
// proxy and agent, to here.
const recordTimeout = time.Second

// Directions of a record.
const (
	inbound  = "inbound"
	outbound = "outbound"
)

// records is the access log of the node's proxies, as the agent writes it. It is
// an io.Writer for one writer.
type records struct {
	mu   sync.Mutex
	list []telemetry.Record
	more chan struct{} // closed when list grows, and replaced
	rest []byte        // of a line that has not ended
}

func newRecords() *records { return &records{more: make(chan struct{})} }

// Write takes the next bytes of the log.
func (r *records) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rest = append(r.rest, b...)
	for {
		line, rest, whole := bytes.Cut(r.rest, []byte("\n"))
		if !whole {
			return len(b), nil
		}
		r.rest = rest
		var record telemetry.Record
		if err := json.Unmarshal(line, &record); err != nil {
			return 0, err
		}
		r.list = append(r.list, record)
		close(r.more)
		r.more = make(chan struct{})
	}
}

// all returns the records so far.
func (r *records) all() []telemetry.Record {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.list)
}

// waitMore returns true once there are more than n records, false at the
// deadline.
func (r *records) waitMore(ctx context.Context, n int, deadline time.Time) bool {
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	for {
		r.mu.Lock()
		have, more := len(r.list), r.more
		r.mu.Unlock()
		if have > n {
			return true
		}
		select {
		case <-more:
		case <-timer.C:
			return false
		case <-ctx.Done():
			return false
		}
	}
}
