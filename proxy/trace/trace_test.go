package trace

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

type fields map[string]string

func (f fields) Header(name string) ([]byte, bool) {
	value, ok := f[name]
	return []byte(value), ok
}

const (
	id   = "0af7651916cd43dd8448eb211c80319c"
	half = "8448eb211c80319c"
	span = "b7ad6b7169203331"
)

func TestWhichTraceARequestIsOf(t *testing.T) {
	for _, test := range []struct {
		promise string
		fields  fields
		want    string // the traceparent; empty: none
		w3c     bool
	}{
		{"nothing said", fields{}, "", false},
		{"W3C", fields{"traceparent": "00-" + id + "-" + span + "-01"}, "00-" + id + "-" + span + "-01", true},
		{"W3C, not sampled, a flag of the future", fields{"traceparent": "00-" + id + "-" + span + "-fe"}, "00-" + id + "-" + span + "-00", true},
		{"W3C of a later version goes on", fields{"traceparent": "cc-" + id + "-" + span + "-01-what"}, "00-" + id + "-" + span + "-01", true},
		{"W3C counts before B3", fields{"traceparent": "00-" + id + "-" + span + "-01", "b3": half + "-" + half}, "00-" + id + "-" + span + "-01", true},
		{"B3 where W3C is broken", fields{"traceparent": "00-x", "b3": half + "-" + span}, "00-0000000000000000" + half + "-" + span + "-00", false},
		{"B3", fields{"b3": id + "-" + span + "-1-" + half}, "00-" + id + "-" + span + "-01", false},
		{"B3, debug", fields{"b3": id + "-" + span + "-d"}, "00-" + id + "-" + span + "-01", false},
		{"B3, not sampled", fields{"b3": id + "-" + span + "-0"}, "00-" + id + "-" + span + "-00", false},
		{"B3 in many fields", fields{"x-b3-traceid": half, "x-b3-spanid": span, "x-b3-sampled": "1"}, "00-0000000000000000" + half + "-" + span + "-01", false},
		{"B3 in many fields, debug", fields{"x-b3-traceid": id, "x-b3-spanid": span, "x-b3-flags": "1"}, "00-" + id + "-" + span + "-01", false},
		{"many fields where the single one is broken", fields{"b3": "0", "x-b3-traceid": id, "x-b3-spanid": span}, "00-" + id + "-" + span + "-00", false},
	} {
		c := Of(test.fields)
		got := ""
		if c.Known() {
			got = c.Traceparent()
		}
		if got != test.want || c.W3C != test.w3c {
			t.Errorf("%s: %q, W3C %v", test.promise, got, c.W3C)
		}
	}
}

func TestWhatIsNotWellFormedIsOfNoTrace(t *testing.T) {
	zero, zeros := "0000000000000000", "00000000000000000000000000000000"
	for _, f := range []fields{
		{"traceparent": ""},
		{"traceparent": "ff-" + id + "-" + span + "-01"},
		{"traceparent": "00-" + id + "-" + span + "-01-"},
		{"traceparent": "01-" + id + "-" + span + "-01x"},
		{"traceparent": "00-" + zeros + "-" + span + "-01"},
		{"traceparent": "00-" + id + "-" + zero + "-01"},
		{"traceparent": "00-0AF7651916CD43DD8448EB211C80319C-" + span + "-01"},
		{"traceparent": "00_" + id + "-" + span + "-01"},
		{"traceparent": "0x-" + id + "-" + span + "-01"},
		{"traceparent": "00-" + id + "-" + span + "-0"},
		{"b3": "0"}, {"b3": "d"}, {"b3": ""}, {"b3": id}, {"b3": id + "-"},
		{"b3": id + "-" + span + "-2"}, {"b3": id + "-" + span + "-"}, {"b3": id + "-" + span + "-1-x"},
		{"b3": id + "-" + span + "-1-" + half + "-"}, {"b3": zeros + "-" + span}, {"b3": id + "-" + zero}, {"b3": "abc-" + span},
		{"x-b3-traceid": id}, {"x-b3-spanid": span}, {"x-b3-traceid": zero, "x-b3-spanid": span},
	} {
		if c := Of(f); c != (Context{}) {
			t.Errorf("%v: %v", f, c)
		}
	}
}

// FuzzOf: whatever is sent, what is read is nothing or a context that says the same
// when it is read again.
func FuzzOf(f *testing.F) {
	f.Add("00-"+id+"-"+span+"-01", "", "", "")
	f.Add("", id+"-"+span+"-1-"+half, "", "")
	f.Add("cc-"+id+"-"+span+"-01-", half+"-"+span+"-d", half, span)
	f.Fuzz(func(t *testing.T, w3c, b3, trace, parent string) {
		c := Of(fields{"traceparent": w3c, "b3": b3, "x-b3-traceid": trace, "x-b3-spanid": parent})
		if !c.Known() {
			if c != (Context{}) {
				t.Fatalf("of no trace, but %v", c)
			}
			return
		}
		again := Of(fields{"traceparent": c.Traceparent()})
		c.W3C = true
		if diff := cmp.Diff(c, again); diff != "" {
			t.Fatal(diff)
		}
	})
}

func BenchmarkOf(b *testing.B) {
	f := fields{"traceparent": "00-" + id + "-" + span + "-01"}
	b.ReportAllocs()
	for b.Loop() {
		Of(f)
	}
}
