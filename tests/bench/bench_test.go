package main

import (
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/tests/bench/report"
	"github.com/weirmesh/weir/tests/cluster"
)

// smoke runs a benchmark for a moment and returns what it writes, and prints.
func smoke(t *testing.T, name string) (report.Report, string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("the benchmark needs root")
	}
	dir := t.TempDir()
	binary := filepath.Join(dir, "bench")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	cmd := exec.CommandContext(t.Context(), binary, name, "-smoke")
	cmd.Env = append(os.Environ(), "OUT="+dir)
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(filepath.Join(dir, name+".json"))
	if err != nil {
		t.Fatal(err)
	}
	var r report.Report
	if err := json.Unmarshal(content, &r); err != nil {
		t.Fatal(err)
	}
	return r, string(out)
}

// TestTheBenchmarkOfTheDataPlaneRuns: every lane has a sample of everything.
func TestTheBenchmarkOfTheDataPlaneRuns(t *testing.T) {
	r, _ := smoke(t, "dataplane")
	const (
		requests = 14*2 + 13*2     // throughput of each lane, CPU of those with proxies
		latency  = 2 * (14*2 + 13) // two quantiles, and CPU
		five     = 5 * (2*2 + 2)   // Weir, HAProxy, both with mTLS, and HAProxy captured: HTTP/2 with CPU, TCP both ways
	)
	if want := requests + latency + five; len(r.Series) != want {
		t.Errorf("%d series, want %d", len(r.Series), want)
	}
	for _, s := range r.Series {
		if len(s.Samples) != 1 {
			t.Errorf("%s has %d samples", s.Name, len(s.Samples))
		}
	}
}

func TestTheBenchmarkOfADDRuns(t *testing.T) {
	if err := checkIPTables(); err != nil {
		t.Skip(err)
	}
	r, out := smoke(t, "add")
	want := []string{nameADD, nameDEL, nameExempt, nameVersion, nameRules, nameEach("nft"), nameEach("legacy"), nameRestore("nft"), nameRestore("legacy"),
		namePeer("iptables"), namePeer("nftables"), nameChain, nameLaunch, nameBurst, nameBurstDEL}
	if len(r.Series) != len(want) {
		t.Fatalf("%d series, want %d", len(r.Series), len(want))
	}
	for i, s := range r.Series {
		if s.Name != want[i] || len(s.Samples) != smokeRuns || !strings.Contains(out, s.Name) {
			t.Errorf("series %d is %q with %d samples", i, s.Name, len(s.Samples))
		}
	}
}

// TestTheBenchmarkOfConfigurationRuns: every proxy has a sample of every change.
func TestTheBenchmarkOfConfigurationRuns(t *testing.T) {
	if _, err := cluster.FindBinaries(""); err != nil {
		t.Skip(err)
	}
	r, _ := smoke(t, "config")
	want := map[string]int{
		nameSlices: smokeRuns * smokeChanges, nameRoutes: smokeRuns * smokeChanges,
		namePolicies: smokeRuns * smokeChanges, namePeerings: 2 * smokeRuns * smokeChanges,
		nameStormSlices: smokeRuns * smokeChanges, nameStormRoutes: smokeRuns * smokeChanges,
		nameStormPolicies: smokeRuns * smokeChanges, nameStormPeerings: 2 * smokeRuns * smokeChanges,
		nameAgentCPURest: 5 * smokeChanges, nameAgentCPU: 1, nameAgentPeak: 1, nameGrownRSS: 1,
		nameProxy(used, smokeServices): 1, nameProxy(used, smokeGrown): 1, nameProxy(smokeGrown, smokeGrown): 1,
	}
	for _, s := range r.Series {
		n, fixed := want[s.Name]
		if fixed && len(s.Samples) != n || len(s.Samples) == 0 {
			t.Errorf("%s has %d samples", s.Name, len(s.Samples))
		}
		delete(want, s.Name)
	}
	if len(want) > 0 {
		t.Errorf("there is none of %v", slices.Collect(maps.Keys(want)))
	}
}

func TestTheBenchmarkOfMemoryRuns(t *testing.T) {
	r, _ := smoke(t, "memory")
	want := []string{nameIdle(smokeRuns)}
	for _, d := range []string{outbound, inbound} {
		want = append(want, nameKept(d), nameKernel(d))
	}
	if len(r.Series) != len(want) {
		t.Fatalf("%d series, want %d", len(r.Series), len(want))
	}
	for i, s := range r.Series {
		if s.Name != want[i] || len(s.Samples) == 0 {
			t.Errorf("series %d is %q with %d samples, want %q", i, s.Name, len(s.Samples), want[i])
		}
	}
}

// TestTheBenchmarkOfOverloadRuns: some is served, and the rest refused by the policy.
func TestTheBenchmarkOfOverloadRuns(t *testing.T) {
	r, out := smoke(t, "overload")
	want := []string{namePeak, nameOffered, nameGoodput, nameShare, nameServed, nameRefused,
		nameSteady("p50"), nameSteady("p99"), nameBeside("p50", 10*smokeRuns), nameBeside("p99", 10*smokeRuns)}
	if len(r.Series) != len(want) {
		t.Fatalf("%d series, want %d", len(r.Series), len(want))
	}
	for i, s := range r.Series {
		if s.Name != want[i] || len(s.Samples) == 0 {
			t.Errorf("series %d is %q with %d samples, want %q", i, s.Name, len(s.Samples), want[i])
		}
	}
	if !strings.Contains(out, "Refused as circuit_open: ") {
		t.Error("nothing was refused by the policy")
	}
}

func TestTheBaselineIsThirtyRules(t *testing.T) {
	if n := len(baseline) * len(families); n != 30 {
		t.Errorf("%d rules", n)
	}
	input := restoreInput(families[1])
	for _, line := range []string{"*nat\n", ":MESH_OUTPUT - [0:0]\n", "-A MESH_OUTPUT -d ::1/128 -j RETURN\n", "COMMIT\n"} {
		if !strings.Contains(input, line) {
			t.Errorf("iptables-restore is not told %q:\n%s", line, input)
		}
	}
}

func TestLaunchTimesAreReadFromTheLog(t *testing.T) {
	log := `time=x level=INFO msg="pod captured" pod=bench/pod container=add-1 reason="label" proxy_uid=1 proxy_ms=12.5 backend=nftables rules_ms=2 total_ms=15
time=x level=INFO msg="pod captured" pod=bench/idle container=idle-1 reason="label" proxy_uid=1 proxy_ms=99 backend=nftables rules_ms=2 total_ms=15
time=x level=INFO msg=ready`
	got, err := launchTimes(log, "add-")
	if err != nil || len(got) != 1 || got[0] != 12.5 {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := launchTimes("nothing", "add-"); err == nil {
		t.Error("no error without any")
	}
}
