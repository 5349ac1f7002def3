package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"sigs.k8s.io/yaml"
)

// outcome is what the suite's log says of the mesh's tests. Each is called Mesh…;
// the suite has the Gateways' tests, too, which it skips for want of the feature.
type outcome struct {
	lines                   []string // of results, subtests included, as they are in the log
	passed, failed, skipped []string // short names

	letters int    // of what byTheLetter looks at, what is as it must be
	version string // Weir's
	began   time.Time
	took    time.Duration // the suite
}

// result is a line of the testing package's about a test of the mesh.
var result = regexp.MustCompile(`(?m)^ *--- (PASS|FAIL|SKIP): TestConformance/(Mesh[^/\s]*)(/\S+)? \(.*\)$`)

// outcomeOf reads the suite's log; only, unless it is empty, is the one test that was
// asked for: the suite skips the others.
func outcomeOf(log, only string) outcome {
	var o outcome
	for _, match := range result.FindAllStringSubmatch(log, -1) {
		if only != "" && match[2] != only {
			continue
		}
		o.lines = append(o.lines, match[0])
		if match[3] != "" {
			continue
		}
		switch match[1] {
		case "PASS":
			o.passed = append(o.passed, match[2])
		case "FAIL":
			o.failed = append(o.failed, match[2])
		case "SKIP":
			o.skipped = append(o.skipped, match[2])
		}
	}
	return o
}

// judge says why the suite was not passed.
func (o outcome) judge(suiteErr error) error {
	switch {
	case len(o.failed) > 0:
		return fmt.Errorf("%d mesh tests failed: %s", len(o.failed), strings.Join(o.failed, ", "))
	case suiteErr != nil:
		return fmt.Errorf("the suite: %w", suiteErr)
	case len(o.skipped) > 0:
		return fmt.Errorf("%d mesh tests were skipped: %s", len(o.skipped), strings.Join(o.skipped, ", "))
	case len(o.passed) == 0:
		return errors.New("no mesh test ran")
	}
	return nil
}

// summary is what the log says in short, and when.
func (o outcome) summary() string {
	var all strings.Builder
	fmt.Fprintf(&all, "weir %s, %s, in %s\n", o.version, o.began.UTC().Format(time.RFC3339), o.took.Round(time.Second))
	fmt.Fprintf(&all, "mesh tests: %d passed, %d failed, %d skipped\n", len(o.passed), len(o.failed), len(o.skipped))
	fmt.Fprintf(&all, "Location, rewritten paths and status of routes, which the suite does not compare: %d as they must be\n", o.letters)
	for _, line := range o.lines {
		fmt.Fprintln(&all, line)
	}
	return all.String()
}

// weirVersion is that of the commit: its tag, or else what Go calls a commit that
// has none. A work tree that is not as committed adds "+dirty".
func weirVersion(ctx context.Context) (string, error) {
	dirty, err := command(ctx, "git", "status", "--porcelain", "--", ".", ":!"+home+"/reports")
	if err != nil {
		return "", err
	}
	suffix := ""
	if dirty != "" {
		suffix = "+dirty"
	}
	if tag, err := command(ctx, "git", "describe", "--tags", "--exact-match", "--match=v*"); err == nil {
		return strings.TrimSpace(tag) + suffix, nil
	}
	commit, err := command(ctx, "git", "log", "-1", "--abbrev=12", "--format=%ct %h")
	if err != nil {
		return "", err
	}
	var seconds int64
	var hash string
	if _, err := fmt.Sscan(commit, &seconds, &hash); err != nil {
		return "", fmt.Errorf("git log: %q: %w", commit, err)
	}
	return untagged + time.Unix(seconds, 0).UTC().Format("20060102150405") + "-" + hash + suffix, nil
}

// untagged begins the version of a commit without a tag.
const untagged = "v0.0.0-"

// document is what the layout of reports depends on.
type document struct {
	GatewayAPIVersion string `json:"gatewayAPIVersion"`
	GatewayAPIChannel string `json:"gatewayAPIChannel"`
	Mode              string `json:"mode"`
	Implementation    struct {
		Organization string `json:"organization"`
		Project      string `json:"project"`
		URL          string `json:"url"`
		Version      string `json:"version"`
	} `json:"implementation"`
}

// keep puts a report, as the suite wrote it, its README and the summary of its log
// where the Gateway API's conformance/reports/README.md wants a report:
// v1.6/weirmesh-weir/. It takes the place of the one before.
func keep(reports string, report []byte, summary string) error {
	var d document
	if err := yaml.Unmarshal(report, &d); err != nil {
		return err
	}
	release := strings.SplitN(d.GatewayAPIVersion, ".", 3)
	if len(release) != 3 || d.Implementation.Version == "" || d.Mode == "" {
		return fmt.Errorf("of version %q, mode %q, for Gateway API %q", d.Implementation.Version, d.Mode, d.GatewayAPIVersion)
	}
	folder := filepath.Join(reports, release[0]+"."+release[1], d.Implementation.Organization+"-"+d.Implementation.Project)
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	for _, pattern := range []string{"*-report.yaml", "*-summary.txt"} {
		before, err := filepath.Glob(filepath.Join(folder, pattern))
		if err != nil {
			return err
		}
		for _, file := range before {
			if err := os.Remove(file); err != nil {
				return err
			}
		}
	}
	name := fmt.Sprintf("%s-%s-%s", d.GatewayAPIChannel, d.Implementation.Version, d.Mode)
	for file, content := range map[string]string{
		name + "-report.yaml": string(report),
		name + "-summary.txt": summary,
		"README.md":           readme(d, name),
	} {
		if err := os.WriteFile(filepath.Join(folder, file), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// readme is the README that must be beside a report.
func readme(d document, name string) string {
	r := revision(d.Implementation.Version)
	return fmt.Sprintf(`# Weir

[Weir](%[1]s) is a service mesh: it captures pods with a chained CNI plugin and runs one small proxy per pod.

## Table of contents

| API channel | Implementation version | Mode | Report |
|-------------|------------------------|------|--------|
| %[2]s | [%[3]s](%[1]s/tree/%[4]s) | %[5]s | [%[3]s report](./%[6]s-report.yaml) |

Which tests ran, and for how long: [summary of the log](./%[6]s-summary.txt).

## Reproduce

As root on a Debian machine with Go, git and make:

`+"```"+`
git clone %[1]s && cd weir && git checkout %[4]s
make packages
make conformance
`+"```"+`

It brings up a Kubernetes of two nodes, installs the CRDs of the Gateway API's %[2]s channel and Weir from its manifests, runs the suite of `+"`sigs.k8s.io/gateway-api/conformance`"+` %[7]s unchanged, and writes this folder. What is claimed is in `+"`tests/conformance/options.yaml`"+`.
`, d.Implementation.URL, d.GatewayAPIChannel, d.Implementation.Version, r, d.Mode, name, d.GatewayAPIVersion)
}

// revision is what git calls a version: its tag, or its commit.
func revision(version string) string {
	version = strings.TrimSuffix(version, "+dirty")
	if commit, ok := strings.CutPrefix(version, untagged); ok {
		return commit[strings.LastIndexByte(commit, '-')+1:]
	}
	return version
}
