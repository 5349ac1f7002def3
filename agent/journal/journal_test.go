package journal

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/agent/proxypb"
)

var compareAddresses = cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })

func create(t testing.TB) *Writer {
	t.Helper()
	w, err := Create()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Close)
	return w
}

// follow is an agent that comes.
func follow(t testing.TB, w *Writer) *Reader {
	t.Helper()
	r, err := Open(duplicate(t, w.File()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

func duplicate(t testing.TB, fd int) *os.File {
	t.Helper()
	fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), "journal")
}

// read is all that waits.
func read(t testing.TB, r *Reader) []Record {
	t.Helper()
	var out []Record
	buf := make([]byte, MinBuffer)
	for r.Waiting() > 0 {
		if _, err := r.Read(buf, func(record *Record) { out = append(out, record.Clone()) }); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

// numbered is a record that is larger than others now and then.
func numbered(n int) *Record {
	return &Record{TotalNanos: int64(n), Path: strings.Repeat("x", n%700)}
}

func TestRecordsAreReadAsTheyWereWritten(t *testing.T) {
	full := Record{
		StartUnixNanos: 1, Direction: proxypb.Direction_INBOUND,
		ClientAddress: netip.MustParseAddrPort("[fe80::1%eth0]:1"), ServerAddress: netip.MustParseAddrPort("10.0.0.1:2"),
		UpstreamAddress: netip.MustParseAddrPort("[2001:db8::1]:3"), UpstreamLocalAddress: netip.MustParseAddrPort("[::ffff:10.0.0.2]:4"),
		Service: "c", UpstreamPod: "f", Reason: "g", Error: "h", SentBytes: 2, ReceivedBytes: 3, TotalNanos: 4, RouteNanos: 5,
		ConnectNanos: 6, Protocol: "i", Method: "j", Path: "k", Status: 8, Route: "l", Attempts: 9, FirstByteNanos: 10,
		GRPCStatus: "m", TraceID: [16]byte{15: 11}, SpanID: [8]byte{7: 12}, RequestBodyBytes: 13, ResponseBodyBytes: 14,
		Policy: "n", Audited: "o", PeerIdentity: "p", TLSNanos: 15,
	}
	long := Record{Path: strings.Repeat("a", 100<<10), Error: strings.Repeat("b", MaxText)}
	cut := long
	cut.Path = long.Path[:MaxText]
	w := create(t)
	for _, r := range []Record{full, {}, long, full} {
		w.Put(&r)
	}
	if diff := cmp.Diff([]Record{full, {}, cut, full}, read(t, follow(t, w)), compareAddresses); diff != "" {
		t.Error(diff)
	}
}

// TestTheNextAgentGoesOnWhereTheLastOneWas: and what a proxy wrote before it was gone is
// there.
func TestTheNextAgentGoesOnWhereTheLastOneWas(t *testing.T) {
	w := create(t)
	for n := range 3 {
		w.Put(numbered(n))
	}
	if got := read(t, follow(t, w)); len(got) != 3 {
		t.Fatalf("%d records", len(got))
	}
	w.Put(numbered(3))
	next := follow(t, w)
	w.Put(numbered(4))
	w.Close()
	got := read(t, next)
	if len(got) != 2 || got[0].TotalNanos != 3 || got[1].TotalNanos != 4 || got[0].DroppedBefore != 0 {
		t.Errorf("then %v", got)
	}
}

// TestTheOldestGiveWayAndAreCounted: to an agent that reads, and to one that was away.
func TestTheOldestGiveWayAndAreCounted(t *testing.T) {
	w := create(t)
	r := follow(t, w)
	put, seen := 0, uint64(0)
	check := func(r *Reader, lossy bool) {
		got := read(t, r)
		for i, record := range got {
			seen += record.DroppedBefore
			if record.TotalNanos != int64(seen) || (record.DroppedBefore > 0) != (lossy && i == 0) {
				t.Fatalf("record %d of %d is %d after %d, %d lost before", i, len(got), record.TotalNanos, seen, record.DroppedBefore)
			}
			seen++
		}
		if seen != uint64(put) {
			t.Fatalf("%d of %d are accounted for", seen, put)
		}
	}
	for round := range 20 {
		many := round%2 == 1
		for range 500 + 15_000*(round%2) { // many are more than there is room for
			w.Put(numbered(put))
			put++
		}
		if round%4 == 3 { // the agent is another one
			r = follow(t, w)
		}
		check(r, many)
	}
}

// TestRecordsAreWholeWhileTheyAreWrittenOver: whatever the agent reads while the proxy
// writes without a pause.
func TestRecordsAreWholeWhileTheyAreWrittenOver(t *testing.T) {
	w := create(t)
	const total = 300_000
	var writing sync.WaitGroup
	writing.Go(func() {
		for n := range total {
			r := numbered(n)
			r.Status, r.Error = uint32(n), fmt.Sprint(n)
			w.Put(r)
		}
	})
	r, seen, buf := follow(t, w), uint64(0), make([]byte, MinBuffer)
	each := func(record *Record) {
		seen += record.DroppedBefore
		if n := record.TotalNanos; uint64(n) != seen || record.Status != uint32(n) || record.Error != fmt.Sprint(n) || len(record.Path) != int(n%700) {
			t.Errorf("record %d is %v", seen, *record)
		}
		seen++
	}
	for seen < total && !t.Failed() {
		if _, err := r.Read(buf, each); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rand.IntN(300)) * time.Microsecond)
	}
	writing.Wait()
}

// TestAJournalThatFillsUpSaysSo, once.
func TestAJournalThatFillsUpSaysSo(t *testing.T) {
	w := create(t)
	says := func() bool {
		select {
		case <-w.Waiting():
			return true
		default:
			return false
		}
	}
	r := follow(t, w)
	for range 3 {
		read(t, r)
		w.Put(&Record{})
		read(t, r)
		began := w.head
		for n := 0; !says(); n++ {
			if w.head > began+Capacity {
				t.Fatal("not a word")
			}
			w.Put(numbered(n))
		}
		if unread := w.head - began; unread < Capacity/2 || unread > Capacity/2+block {
			t.Errorf("it says so at %d bytes", unread)
		}
		w.Put(&Record{})
		if says() {
			t.Error("it says so again")
		}
	}
}

// TestAnIdleJournalHoldsNoMemory: nor does one with few records take more of it with time.
func TestAnIdleJournalHoldsNoMemory(t *testing.T) {
	w := create(t)
	r := follow(t, w)
	blocks := func() int64 {
		var st unix.Stat_t
		if err := unix.Fstat(w.File(), &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	for n := range 20_000 {
		w.Put(numbered(n))
		if waiting := r.Waiting(); waiting > 2*restartAt {
			t.Fatalf("%d bytes wait of few records", waiting)
		}
		if n%50 == 0 {
			read(t, r)
		}
	}
	select {
	case <-w.Waiting():
		t.Error("an agent was called that reads")
	default:
	}
	if got := blocks(); got > restartAt+100<<10 {
		t.Errorf("%d bytes for few records at a time", got)
	}
	w.Trim()
	if blocks() <= headerSize {
		t.Error("trimmed before all was read")
	}
	read(t, r)
	w.Trim()
	if got := blocks(); got > headerSize {
		t.Errorf("%d bytes for none", got)
	}
	w.Put(numbered(7))
	if got := read(t, r); len(got) != 1 || got[0].TotalNanos != 7 || got[0].DroppedBefore != 0 {
		t.Errorf("after that %v", got)
	}
}

// TestFlushWaitsForTheAgent, and no longer than it is told.
func TestFlushWaitsForTheAgent(t *testing.T) {
	w := create(t)
	w.Flush(time.Hour) // there is nothing
	r := follow(t, w)
	w.Put(&Record{})
	w.Flush(time.Millisecond)
	if !w.Unread() {
		t.Error("nobody has read it")
	}
	flushed := make(chan struct{})
	go func() {
		w.Flush(time.Hour)
		close(flushed)
	}()
	<-w.Waiting()
	read(t, r)
	<-flushed
}

// TestWhatIsNoJournalIsNotFollowed: it could keep the agent waiting, or end it.
func TestWhatIsNoJournalIsNotFollowed(t *testing.T) {
	plain, err := os.Create(t.TempDir() + "/plain")
	if err != nil {
		t.Fatal(err)
	}
	memory := func(size int64, seals int) *os.File {
		fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Ftruncate(fd, size); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
			t.Fatal(err)
		}
		return os.NewFile(uintptr(fd), "test")
	}
	for _, c := range []struct {
		file *os.File
		want string
	}{
		{plain, "not a memory file"},
		{memory(fileSize, unix.F_SEAL_GROW), "other seals"},
		{memory(fileSize, seals|unix.F_SEAL_WRITE), "other seals"},
		{memory(100, seals), "100 bytes"},
		{memory(fileSize, seals), "another version"},
	} {
		if _, err := Open(c.file); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v, want %q", err, c.want)
		}
	}
}

// FuzzRead: whatever is in a journal is read or refused, and ends.
func FuzzRead(f *testing.F) {
	w := create(f)
	for n := range 3 {
		w.Put(numbered(n))
	}
	f.Add(w.memory[headerSize:headerSize+1024], w.head, uint64(0), uint64(0))
	f.Add(w.memory[headerSize:headerSize+1024], w.head, uint64(0), uint64(100))
	f.Add(w.memory[headerSize:headerSize+1024], uint64(Capacity+block), uint64(block), uint64(Capacity))
	f.Add([]byte{}, ^uint64(7), ^uint64(7), uint64(0))
	f.Fuzz(func(t *testing.T, ring []byte, head, tail, at uint64) {
		w := create(t)
		copy(w.ring()[at%Capacity:], ring)
		word(w.memory, atRead).Store(at)
		word(w.memory, atHead).Store(head)
		word(w.memory, atTail).Store(tail)
		r := follow(t, w)
		buf := make([]byte, MinBuffer)
		for times := 0; ; times++ {
			n, err := r.Read(buf, func(*Record) {})
			if err != nil || n == 0 {
				break
			}
			if times > Capacity {
				t.Fatal("it does not end")
			}
		}
	})
}

// BenchmarkPut is what a record costs the proxy.
func BenchmarkPut(b *testing.B) {
	w := create(b)
	record := ordinary()
	b.ReportAllocs()
	for b.Loop() {
		w.Put(&record)
	}
}

// BenchmarkRead is what it costs the agent to have it, in the same memory.
func BenchmarkRead(b *testing.B) {
	w := create(b)
	r, buf, record := follow(b, w), make([]byte, MinBuffer), ordinary()
	n := 0
	for b.Loop() {
		b.StopTimer()
		for range 100 {
			w.Put(&record)
		}
		b.StartTimer()
		for r.Waiting() > 0 {
			if _, err := r.Read(buf, func(*Record) { n++ }); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n), "ns/record")
}

// ordinary is a request's.
func ordinary() Record {
	return Record{
		StartUnixNanos: 1_700_000_000_123_456_789, Direction: proxypb.Direction_OUTBOUND,
		ClientAddress: netip.MustParseAddrPort("10.244.0.5:40000"), ServerAddress: netip.MustParseAddrPort("10.96.0.1:80"), Service: "shop/back",
		UpstreamAddress: netip.MustParseAddrPort("10.244.0.7:8080"), UpstreamLocalAddress: netip.MustParseAddrPort("10.244.0.5:40001"), UpstreamPod: "shop/back-7d4b9c6f5d-abcde",
		SentBytes: 300, ReceivedBytes: 2000, TotalNanos: 2_345_678, RouteNanos: 12_345, FirstByteNanos: 1_987_654,
		Protocol: "HTTP/1.1", Method: "GET", Path: "/a/path/of/some/length", Route: "HTTPRoute/shop/back", Status: 200, Attempts: 1,
		TraceID: [16]byte{1}, SpanID: [8]byte{2}, ResponseBodyBytes: 1800,
	}
}
