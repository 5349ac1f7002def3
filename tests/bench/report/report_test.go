package report

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestQuantileIsTheNearestRank(t *testing.T) {
	hundred := Series{}
	for i := 100; i > 0; i-- {
		hundred.Samples = append(hundred.Samples, float64(i))
	}
	for _, test := range []struct {
		series  Series
		q, want float64
	}{
		{hundred, 0.5, 50},
		{hundred, 0.99, 99},
		{hundred, 0, 1},
		{hundred, 1, 100},
		{Series{Samples: []float64{3}}, 0.99, 3},
		{Series{Samples: []float64{3, 1}}, 0.5, 1},
	} {
		if got := test.series.Quantile(test.q); got != test.want {
			t.Errorf("quantile %v: %v, want %v", test.q, got, test.want)
		}
	}
}

func TestAReportIsATableAndAFile(t *testing.T) {
	r := &Report{
		Name: "x", Title: "Things", Machine: Machine{CPUs: 2, Kernel: "6.18", Go: "go1.26", Arch: "amd64"},
		Series: []Series{
			{Name: "thing", Unit: "ms", Samples: []float64{1, 2.346, 300}, CPU: []float64{1, 2}},
			{Name: "a longer thing", Unit: "MB", Samples: []float64{12.34}},
		},
		Notes: []string{"A note."},
	}
	r.AtMost("thing, p50", 2.346, 3, "ms")
	r.AtLeast("ratio", 19.9, 20, "×")
	r.Beside("another", 3, "×")
	var out bytes.Buffer
	dir := filepath.Join(t.TempDir(), "new")
	if err := r.Publish(&out, dir); !errors.Is(err, ErrNotHeld) {
		t.Errorf("error %v", err)
	}
	want := strings.TrimPrefix(`
### Things

2 CPUs, Linux 6.18, go1.26, amd64

| what           | n | p50     | p99     | CPU, mean |
|----------------|---|---------|---------|-----------|
| thing          | 3 | 2.35 ms | 300 ms  | 1.5 ms    |
| a longer thing | 1 | 12.3 MB | 12.3 MB | –         |

| target     | wanted | measured | held   |
|------------|--------|----------|--------|
| thing, p50 | ≤ 3 ms | 2.35 ms  | yes    |
| ratio      | ≥ 20 × | 19.9 ×   | **no** |
| another    | –      | 3 ×      | –      |

A note.
`, "\n")
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	content, err := os.ReadFile(filepath.Join(dir, "x.json"))
	if err != nil {
		t.Fatal(err)
	}
	var read Report
	if err := json.Unmarshal(content, &read); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(*r, read); diff != "" {
		t.Errorf("-written +read:\n%s", diff)
	}
}
