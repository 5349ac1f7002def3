package manifests

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"github.com/weirmesh/weir/agent/cluster"
)

var update = flag.Bool("update", false, "write the tables of POLICIES.md anew")

const trafficPolicyCRD = "base/crds/policy.weirmesh.io_trafficpolicies.yaml"

// crdSchema is what is read of a CRD's.
type crdSchema struct {
	Type, Description, Pattern string
	Properties                 map[string]crdSchema
	Required                   []string
	Enum                       []string
	Minimum, Maximum           *float64
	MinItems, MaxItems         *int
	MaxLength                  *int
	Items                      *crdSchema
}

// TestPoliciesDocument holds the table of fields in POLICIES.md to the CRD: each has
// what it is for, and what it may be.
func TestPoliciesDocument(t *testing.T) {
	var crd struct {
		Spec struct {
			Versions []struct {
				Schema struct{ OpenAPIV3Schema crdSchema }
			}
		}
	}
	if err := yaml.Unmarshal(read(t, trafficPolicyCRD), &crd); err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	table.WriteString("| Field | Value | What it is for |\n|---|---|---|\n")
	rows(t, &table, "", crd.Spec.Versions[0].Schema.OpenAPIV3Schema.Properties["spec"])

	const heading = "\n## Fields\n"
	have := string(read(t, "POLICIES.md"))
	byHand, fields, _ := strings.Cut(have, heading)
	intro, _, _ := strings.Cut(fields, "\n|")
	want := byHand + heading + strings.TrimRight(intro, "\n") + "\n\n" + table.String()
	if *update {
		if err := os.WriteFile("POLICIES.md", []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		have = want
	}
	if diff := cmp.Diff(want, have); diff != "" {
		t.Errorf("POLICIES.md is not true any more (-CRD +document), see -update:\n%s", diff)
	}
}

// rows has a line for each field below a path.
func rows(t *testing.T, b *strings.Builder, path string, s crdSchema) {
	for _, name := range slices.Sorted(maps.Keys(s.Properties)) {
		field := s.Properties[name]
		if field.Description == "" {
			t.Errorf("%s%s: nobody says what it is for", path, name)
		}
		value := values(field)
		if slices.Contains(s.Required, name) {
			value = strings.TrimSuffix("needed; "+value, "; ")
		}
		fmt.Fprintf(b, "| `%s%s` | %s | %s |\n", path, name, value, strings.Join(strings.Fields(field.Description), " "))
		rows(t, b, path+name+".", field)
	}
}

// values is what a field may be, in words.
func values(s crdSchema) string {
	switch {
	case len(s.Enum) > 0:
		var quoted []string
		for _, e := range s.Enum {
			if e == "" {
				e = `""`
			}
			quoted = append(quoted, "`"+e+"`")
		}
		return strings.Join(quoted, ", ")
	case s.Type == "integer":
		return fmt.Sprintf("%.0f to %.0f", *s.Minimum, *s.Maximum)
	case s.Type == "boolean":
		return "`true` or `false`"
	case s.Type == "array":
		return fmt.Sprintf("%d to %d numbers, %s", *s.MinItems, *s.MaxItems, values(*s.Items))
	case strings.Contains(s.Pattern, "h|m|s|ms"):
		return "duration"
	case s.Type == "string":
		return fmt.Sprintf("1 to %d characters", *s.MaxLength)
	}
	return ""
}

// TestPolicyExamplesAreValid: an API server and a directory take each example of
// POLICIES.md.
func TestPolicyExamplesAreValid(t *testing.T) {
	var examples []string
	for _, m := range regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(string(read(t, "POLICIES.md")), -1) {
		examples = append(examples, m[1])
	}
	if len(examples) == 0 {
		t.Fatal("there is no example")
	}
	cmd := exec.Command("go", "run", ".", "../../manifests/"+trafficPolicyCRD)
	cmd.Dir, cmd.Stdin = "../tests/crds", strings.NewReader(strings.Join(examples, "---\n"))
	out, err := cmd.CombinedOutput()
	if want := strings.Repeat("\n", len(examples)); err != nil || string(out) != want {
		t.Errorf("an API server says %v\n%s", err, out)
	}
	dir := t.TempDir()
	for i, example := range examples {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%d.yaml", i)), []byte(example), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := cluster.RunDir(ctx, cluster.NewStore(), dir, slog.New(slog.DiscardHandler)); err != nil {
		t.Errorf("a directory says %v", err)
	}
}
