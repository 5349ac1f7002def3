package launch

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestCPUShares: what Kubernetes makes of the shares is the weight again.
func TestCPUShares(t *testing.T) {
	for weight, want := range map[uint32]uint64{1: 2, 100: 2597, 10000: 262144} {
		if got := cpuShares(weight); got != want {
			t.Errorf("%d: %d, want %d", weight, got, want)
		}
	}
	for weight := uint32(1); weight <= 10000; weight++ {
		shares := cpuShares(weight)
		if back := 1 + (shares-2)*9999/262142; shares < 2 || shares > 262144 || uint64(weight)-back > 1 {
			t.Fatalf("%d: %d shares, which are %d", weight, shares, back)
		}
	}
}

// TestLimitsAreWrittenWhereTheyAre: by cgroup v2's files, v1's or both, and what
// was asked for and has no file is an error.
func TestLimitsAreWrittenWhereTheyAre(t *testing.T) {
	defaults := Limits{Memory: 128 << 20, CPUWeight: 100}
	v2 := map[string]string{"memory.max": "67108864", "memory.swap.max": "0", "cpu.weight": "10000"}
	v1 := map[string]string{"memory.limit_in_bytes": "67108864", "memory.swappiness": "0", "cpu.shares": "262144"}
	for _, c := range []struct {
		promise string
		dirs    []map[string]string
		asked   Limits
		missing string
	}{
		{"cgroup v2", []map[string]string{v2}, Limits{Memory: 64 << 20, CPUWeight: 10000}, ""},
		{"cgroup v1, in two hierarchies", []map[string]string{
			{"memory.limit_in_bytes": "67108864", "memory.swappiness": "0"}, {"cpu.shares": "262144"},
		}, Limits{Memory: 64 << 20, CPUWeight: 10000}, ""},
		{"both", []map[string]string{v2, v1}, Limits{Memory: 64 << 20, CPUWeight: 10000}, ""},
		{"no wish", []map[string]string{{"memory.max": "134217728", "cpu.shares": "2597"}}, Limits{}, ""},
		{"no wish and no controller", []map[string]string{{}}, Limits{}, ""},
		{"no controller for memory", []map[string]string{{"cpu.weight": "100"}}, Limits{Memory: 64 << 20}, memory},
		{"no controller for the CPU", []map[string]string{{"memory.max": "134217728"}}, Limits{CPUWeight: 1}, cpu},
	} {
		t.Run(c.promise, func(t *testing.T) {
			done := map[string]bool{}
			for _, files := range c.dirs {
				dir := t.TempDir()
				for name := range files {
					if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
						t.Fatal(err)
					}
				}
				// As a cgroup file system does, it lets nobody make a file.
				for _, f := range c.asked.or(defaults).files() {
					if _, there := files[f.name]; !there {
						if err := os.Symlink("no/such/file", filepath.Join(dir, f.name)); err != nil {
							t.Fatal(err)
						}
					}
				}
				if err := c.asked.or(defaults).limit(dir, done); err != nil {
					t.Fatal(err)
				}
				for name, want := range files {
					if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
						t.Errorf("%s is %q, %v; want %q", name, got, err, want)
					}
				}
			}
			err := c.asked.missing(done)
			limit, ok := errors.AsType[*LimitError](err)
			if ok != (c.missing != "") || ok && limit.Limit != c.missing || err != nil && !ok {
				t.Errorf("%v, want %q", err, c.missing)
			}
		})
	}
}

// TestProxiesTogetherWeighWhatPodsDo: on cgroup v1 and v2, unless somebody has said so.
func TestProxiesTogetherWeighWhatPodsDo(t *testing.T) {
	for _, c := range []struct {
		file, before string
		processors   int
		want         string
	}{
		{"cpu.shares", "1024\n", 1, "1024"},
		{"cpu.shares", "1024\n", 64, "65536"},
		{"cpu.shares", "1024\n", 1024, "262144"},
		{"cpu.shares", "2048\n", 64, "2048"},
		{"cpu.weight", "100\n", 1, "100"},
		{"cpu.weight", "100\n", 64, "2500"},
		{"cpu.weight", "100\n", 1024, "10000"},
		{"cpu.weight", "50\n", 64, "50"},
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, c.file)
		if err := os.WriteFile(path, []byte(c.before), 0o600); err != nil {
			t.Fatal(err)
		}
		weigh(dir, c.processors)
		have, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.TrimSpace(string(have)); got != c.want {
			t.Errorf("%s %q, %d processors: %s, not %s", c.file, c.before, c.processors, got, c.want)
		}
		if files, _ := os.ReadDir(dir); len(files) != 1 {
			t.Errorf("%s: %d files", c.file, len(files))
		}
	}
}
