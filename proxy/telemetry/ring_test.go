package telemetry

import (
	"net/netip"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/listen"
)

func record(n int) *Record { return &Record{Total: time.Duration(n)} }

// number is what record was called with.
func number(r Record) int { return int(r.Total) }

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
	first := r.Take(nil)
	if len(first) != Batch || number(first[0]) != lost || first[0].lost != lost {
		t.Errorf("%d records, the first is %v, want number %d after %d dropped", len(first), first[0], lost, lost)
	}
	r.Return(first) // the stream broke
	next := lost
	for batch := r.Take(nil); batch != nil; batch = r.Take(nil) {
		for _, got := range batch {
			if number(got) != next || next > lost && got.lost != 0 {
				t.Fatalf("number %d is %v", next, got)
			}
			next++
		}
	}
	if next != lost+Limit || r.Len() != 0 {
		t.Errorf("the last is number %d", next)
	}
}

// TestRingSaysThatItFillsUp: before any is lost, and as long as that is so.
func TestRingSaysThatItFillsUp(t *testing.T) {
	r := NewRing()
	says := func() bool {
		select {
		case <-r.Filling():
			return true
		default:
			return false
		}
	}
	for i := range Limit {
		r.Put(record(i))
		if n := i + 1; says() != (n == filling) {
			t.Errorf("at %d of %d", n, Limit)
		}
	}
	for range (Limit - filling) / Batch {
		r.Take(nil)
		if !says() {
			t.Errorf("not a word at %d of %d", r.Len(), Limit)
		}
	}
	if r.Take(nil); says() {
		t.Errorf("at %d of %d", r.Len(), Limit)
	}
}

// TestRingCountsEveryRecord: whatever happens, taken and dropped add up.
func TestRingCountsEveryRecord(t *testing.T) {
	r := NewRing()
	put, got := 0, uint64(0)
	count := func(batch []Record) {
		for _, x := range batch {
			got += 1 + x.lost
		}
	}
	for round := range 50 {
		for range 100 * (round % 30) {
			r.Put(record(put))
			put++
		}
		for range round % 7 {
			batch := r.Take(nil)
			if batch == nil {
				break
			}
			if round%5 == 0 {
				for range 20 * round {
					r.Put(record(put))
					put++
				}
				r.Return(batch)
				continue
			}
			count(batch)
		}
		if len(r.records) > Limit {
			t.Fatalf("room for %d records", len(r.records))
		}
	}
	for batch := r.Take(nil); batch != nil; batch = r.Take(nil) {
		count(batch)
	}
	if got != uint64(put) {
		t.Errorf("%d of %d accounted for", got, put)
	}
}

func TestAnIdleRingHoldsNoMemory(t *testing.T) {
	r := NewRing()
	r.Put(full())
	if r.Message(r.Take(nil), new(proxypb.AccessLogWriter)).Rows() != 1 || r.records == nil {
		t.Fatal("it is not known yet that it is idle")
	}
	if r.Take(nil) != nil || r.records != nil || r.text.texts != nil {
		t.Errorf("room for %d records and %d texts", len(r.records), len(r.text.texts))
	}
}

// full is the record of an ordinary request.
func full() *Record {
	return &Record{
		Start: time.Now(), Direction: listen.Outbound,
		Client: netip.MustParseAddrPort("10.244.0.5:40000"), Server: netip.MustParseAddrPort("10.96.0.1:80"),
		Service: "shop/back", Upstream: netip.MustParseAddrPort("10.244.0.7:8080"), UpstreamLocal: netip.MustParseAddrPort("10.244.0.5:40001"),
		Pod: "shop/back-7d4b9c6f5d-abcde", Workload: "shop/back", Sent: 300, Received: 2000,
		Total: 2 * time.Millisecond, Route: 10 * time.Microsecond,
		Protocol: "HTTP/1.1", Method: "GET", Path: "/a/path/of/some/length", RouteName: "HTTPRoute/shop/back", Status: 200, Attempts: 1,
		FirstByte: time.Millisecond, Overhead: 50 * time.Microsecond, Trace: [16]byte{1}, Span: [8]byte{2}, ResponseBody: 1800,
	}
}

// BenchmarkRecord is what telemetry costs of a request, from its end to bytes on the
// wire.
func BenchmarkRecord(b *testing.B) {
	ring, meter := NewRing(), NewMeter(nil)
	r := full()
	b.ReportAllocs()
	bytes, n := 0, 0
	var batch []Record
	var wire proxypb.AccessLogWriter
	for b.Loop() {
		meter.Begin(r)
		meter.End(r)
		ring.Put(r)
		if n++; n%Batch == 0 {
			batch = ring.Take(batch)
			out, err := proto.Marshal(&proxypb.FromProxy{Message: &proxypb.FromProxy_AccessLogs{AccessLogs: ring.Message(batch, &wire)}})
			if err != nil {
				b.Fatal(err)
			}
			bytes += len(out)
		}
	}
	b.ReportMetric(float64(bytes)/float64(n), "wire-B/op")
}
