package proxypb

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
)

// sent is rows as they arrive.
func sent(t *testing.T, w *AccessLogWriter, rows ...AccessLog) []AccessLog {
	t.Helper()
	wire, err := proto.Marshal(w.Write(len(rows), func(i int, into *AccessLog) { *into = rows[i] }))
	if err != nil {
		t.Fatal(err)
	}
	var read AccessLogs
	if err := proto.Unmarshal(wire, &read); err != nil {
		t.Fatal(err)
	}
	out := make([]AccessLog, read.Rows())
	for i := range out {
		out[i] = read.Row(i)
	}
	return out
}

func TestRecordsAreReadAsTheyWereWritten(t *testing.T) {
	full := AccessLog{
		StartUnixNanos: 1, Direction: Direction_INBOUND, ClientAddress: "a", ServerAddress: "b", Service: "c", UpstreamAddress: "d",
		UpstreamLocalAddress: "e", UpstreamPod: "f", Reason: "g", Error: "h", SentBytes: 2, ReceivedBytes: 3, TotalNanos: 4, RouteNanos: 5,
		ConnectNanos: 6, DroppedBefore: 7, Protocol: "i", Method: "j", Path: "k", Status: 8, Route: "l", Attempts: 9, FirstByteNanos: 10,
		GRPCStatus: "m", TraceID: [16]byte{15: 11}, SpanID: [8]byte{7: 12}, RequestBodyBytes: 13, ResponseBodyBytes: 14,
		Policy: "n", Audited: "o", PeerIdentity: "p", TLSNanos: 15,
	}
	later := full
	later.DroppedBefore = 0
	var w AccessLogWriter
	for _, rows := range [][]AccessLog{
		{full},
		{{}, full, {Service: "a", Path: "c"}, {}, later}, // what was there before is forgotten
		{{}, {}},
		{full, later, {}},
	} {
		want := append([]AccessLog(nil), rows...)
		for i := range want[1:] {
			want[i+1].DroppedBefore = 0
		}
		if diff := cmp.Diff(want, sent(t, &w, rows...)); diff != "" {
			t.Errorf("(-written, +read):\n%s", diff)
		}
	}
}

func TestTextsAreCutAndMended(t *testing.T) {
	long := strings.Repeat("é", MaxText)
	var w AccessLogWriter
	got := sent(t, &w, AccessLog{Path: long, Error: "a\xffb"}, AccessLog{Path: long, Error: "a\xffb"})
	for i, r := range got {
		if r.Path != long[:MaxText] || r.Error != "a\uFFFDb" {
			t.Errorf("record %d: %d bytes of path, error %q", i, len(r.Path), r.Error)
		}
	}
	if len(w.logs.Texts) != 2 {
		t.Errorf("%d texts", len(w.logs.Texts))
	}
}

// FuzzRecordsOfAnyMessage: whatever a proxy sends, it has no more rows and no longer
// texts than it may.
func FuzzRecordsOfAnyMessage(f *testing.F) {
	wire, err := proto.Marshal(&AccessLogs{
		StartUnixNanos: make([]int64, 3), Texts: []string{"a", strings.Repeat("b", MaxText+1)}, Service: []uint32{1, 2, 3}, Path: []uint32{1 << 31},
		TraceId: make([]byte, 40), SpanId: []byte{1}, Status: []uint32{200},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(wire)
	f.Fuzz(func(t *testing.T, wire []byte) {
		var x AccessLogs
		if proto.Unmarshal(wire, &x) != nil {
			return
		}
		if x.Rows() > MaxRows {
			t.Fatalf("%d rows", x.Rows())
		}
		for i := range x.Rows() {
			if r := x.Row(i); len(r.Service) > MaxText*3 || len(r.Path) > MaxText*3 {
				t.Fatalf("texts of %d and %d bytes", len(r.Service), len(r.Path))
			}
		}
	})
}
