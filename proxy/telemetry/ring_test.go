package telemetry

import (
	"testing"

	"github.com/weirmesh/weir/agent/proxypb"
)

func record(n int) *proxypb.AccessLog { return &proxypb.AccessLog{StartUnixNanos: int64(n)} }

func TestRingDropsTheOldest(t *testing.T) {
	r := NewRing()
	const lost = 3000
	for i := range Limit + lost {
		r.Put(record(i))
	}
	select {
	case <-r.Ready():
	default:
		t.Error("not ready")
	}
	if r.Len() != Limit {
		t.Fatalf("%d records kept, want %d", r.Len(), Limit)
	}
	first := r.Take()
	if first.GetStartUnixNanos() != lost || first.GetDroppedBefore() != lost {
		t.Errorf("the first is %v, want number %d after %d dropped", first, lost, lost)
	}
	r.Return(first) // the stream broke
	for i := range Limit {
		got := r.Take()
		if got.GetStartUnixNanos() != int64(lost+i) || i > 0 && got.GetDroppedBefore() != 0 {
			t.Fatalf("number %d is %v", i, got)
		}
	}
	if r.Take() != nil || r.Len() != 0 {
		t.Error("not empty")
	}
}

// TestRingCountsEveryRecord: whatever happens, taken and dropped add up.
func TestRingCountsEveryRecord(t *testing.T) {
	r := NewRing()
	put, got := 0, uint64(0)
	for round := range 50 {
		for range 100 * (round % 30) {
			r.Put(record(put))
			put++
		}
		for range 70 * (round % 7) {
			x := r.Take()
			if x == nil {
				break
			}
			if round%5 == 0 {
				for range round {
					r.Put(record(put))
					put++
				}
				r.Return(x)
				continue
			}
			got += 1 + x.GetDroppedBefore()
		}
		if cap(r.records) > 4*Limit {
			t.Fatalf("room for %d records", cap(r.records))
		}
	}
	for x := r.Take(); x != nil; x = r.Take() {
		got += 1 + x.GetDroppedBefore()
	}
	if got != uint64(put) {
		t.Errorf("%d of %d accounted for", got, put)
	}
}
