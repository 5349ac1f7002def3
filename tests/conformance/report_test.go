package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// log is the end of one of the suite, shortened.
const log = `    conformance.go:151: Conformance report:
--- PASS: TestConformance (114.20s)
    --- SKIP: TestConformance/GatewayInfrastructure (0.00s)
    --- PASS: TestConformance/MeshBasic (1.52s)
        --- PASS: TestConformance/MeshBasic/Send_to_service (1.40s)
    --- PASS: TestConformance/MeshPorts (2.00s)
PASS
`

func TestOutcomeCountsMeshTestsNotSubtests(t *testing.T) {
	o := outcomeOf(log+"    --- SKIP: TestConformance/MeshSkipped (0.00s)\n    --- FAIL: TestConformance/MeshFailed (9.00s)\n", "")
	want := outcome{passed: []string{"MeshBasic", "MeshPorts"}, failed: []string{"MeshFailed"}, skipped: []string{"MeshSkipped"}}
	want.lines = o.lines
	if diff := cmp.Diff(want, o, cmp.AllowUnexported(outcome{})); diff != "" {
		t.Error(diff)
	}
	if len(o.lines) != 5 {
		t.Errorf("%d lines, not one for each test and subtest of the mesh: %q", len(o.lines), o.lines)
	}
}

func TestOnlyAllTestsPassedIsPassed(t *testing.T) {
	for name, c := range map[string]struct {
		log      string
		suiteErr error
		want     string
	}{
		"all pass":          {log: log},
		"one is skipped":    {log: log + "    --- SKIP: TestConformance/MeshSplit (0.00s)\n", want: "1 mesh tests were skipped: MeshSplit"},
		"one fails":         {log: log + "    --- FAIL: TestConformance/MeshSplit (0.00s)\n", want: "1 mesh tests failed: MeshSplit"},
		"the suite crashes": {log: log, suiteErr: errors.New("exit status 2"), want: "the suite: exit status 2"},
		"nothing runs":      {log: "", want: "no mesh test ran"},
	} {
		got := ""
		if err := outcomeOf(c.log, "").judge(c.suiteErr); err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func TestOfOneTestOnlyItCounts(t *testing.T) {
	log := log + "    --- SKIP: TestConformance/MeshSplit (0.00s)\n    --- FAIL: TestConformance/MeshFailed (9.00s)\n"
	if err := outcomeOf(log, "MeshPorts").judge(nil); err != nil {
		t.Errorf("it passed: %v", err)
	}
	for _, name := range []string{"MeshSplit", "MeshFailed", "MeshUnknown"} {
		if outcomeOf(log, name).judge(nil) == nil {
			t.Errorf("%s did not pass", name)
		}
	}
}

func TestReportIsLaidOutAsAsked(t *testing.T) {
	const report = `apiVersion: gateway.networking.k8s.io/v1
gatewayAPIChannel: standard
gatewayAPIVersion: v1.6.3
implementation:
  organization: weirmesh
  project: weir
  url: https://github.com/weirmesh/weir
  version: v0.0.0-20261125193332-464628e0a1b2
mode: default
`
	reports := t.TempDir()
	folder := filepath.Join(reports, "v1.6", "weirmesh-weir")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	before := filepath.Join(folder, "standard-v0.0.1-default-report.yaml")
	if err := os.WriteFile(before, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	o := outcomeOf(log, "")
	o.began, o.took = time.Unix(1764000000, 0), 2*time.Minute
	if err := keep(reports, []byte(report), o.summary()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(before); err == nil {
		t.Error("the report of another version is still there, and not in the README")
	}
	const name = "standard-v0.0.0-20261125193332-464628e0a1b2-default"
	for file, want := range map[string]string{
		name + "-report.yaml": report, // to the byte
		name + "-summary.txt": "2025-11-24T16:00:00Z, in 2m0s\nmesh tests: 2 passed, 0 failed, 0 skipped\n",
		"README.md": "| standard | [v0.0.0-20261125193332-464628e0a1b2](https://github.com/weirmesh/weir/tree/464628e0a1b2) | default |" +
			" [v0.0.0-20261125193332-464628e0a1b2 report](./" + name + "-report.yaml) |\n",
	} {
		content, err := os.ReadFile(filepath.Join(folder, file))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(content), want) {
			t.Errorf("%s has no %q:\n%s", file, want, content)
		}
		if file == name+"-report.yaml" && string(content) != report {
			t.Errorf("the report is not as the suite wrote it:\n%s", content)
		}
	}
}

func TestRevisionIsWhatGitKnows(t *testing.T) {
	for version, want := range map[string]string{
		"v0.1.0":                             "v0.1.0",
		"v0.1.0-rc.1":                        "v0.1.0-rc.1",
		"v0.1.0+dirty":                       "v0.1.0",
		"v0.0.0-20261125193332-464628e0a1b2": "464628e0a1b2",
		"v0.0.0-20261125193332-464628e0a1b2+dirty": "464628e0a1b2",
	} {
		if got := revision(version); got != want {
			t.Errorf("%s is %s to git, want %s", version, got, want)
		}
	}
}
