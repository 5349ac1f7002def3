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

var update = flag.Bool("update", false, "write the tables of POLICIES.md, AUTHORIZATION.md and PEERS.md anew")

// policyDocuments are the documents of our kinds, each with its CRD.
var policyDocuments = map[string]string{
	"POLICIES.md":      "base/crds/policy.weirmesh.io_trafficpolicies.yaml",
	"AUTHORIZATION.md": "base/crds/policy.weirmesh.io_authorizationpolicies.yaml",
	"PEERS.md":         "base/crds/policy.weirmesh.io_peerauthentications.yaml",
}

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

// TestPolicyDocuments holds the table of fields in each document to the CRD: each has
// what it is for, and what it may be.
func TestPolicyDocuments(t *testing.T) {
	for document, crd := range policyDocuments {
		t.Run(document, func(t *testing.T) { holdToCRD(t, document, crd) })
	}
}

func holdToCRD(t *testing.T, document, file string) {
	var crd struct {
		Spec struct {
			Versions []struct {
				Schema struct{ OpenAPIV3Schema crdSchema }
			}
		}
	}
	if err := yaml.Unmarshal(read(t, file), &crd); err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	table.WriteString("| Field | Value | What it is for |\n|---|---|---|\n")
	rows(t, &table, "", crd.Spec.Versions[0].Schema.OpenAPIV3Schema.Properties["spec"])

	const heading = "\n## Fields\n"
	have := string(read(t, document))
	byHand, fields, _ := strings.Cut(have, heading)
	intro, _, _ := strings.Cut(fields, "\n|")
	want := byHand + heading + strings.TrimRight(intro, "\n") + "\n\n" + table.String()
	if *update {
		if err := os.WriteFile(document, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		have = want
	}
	if diff := cmp.Diff(want, have); diff != "" {
		t.Errorf("%s is not true any more (-CRD +document), see -update:\n%s", document, diff)
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
		if field.Items != nil {
			name, field = name+"[]", *field.Items
		}
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
		return entries(s)
	case strings.Contains(s.Pattern, "h|m|s|ms"):
		return "duration"
	case s.Type == "string":
		return fmt.Sprintf("1 to %d characters", *s.MaxLength)
	}
	return ""
}

// entries is what a list may have, in words.
func entries(s crdSchema) string {
	count := fmt.Sprintf("up to %d", *s.MaxItems)
	if s.MinItems != nil {
		count = fmt.Sprintf("%d to %d", *s.MinItems, *s.MaxItems)
	}
	switch s.Items.Type {
	case "integer":
		return count + " numbers, " + values(*s.Items)
	case "string":
		return fmt.Sprintf("%s texts of up to %d characters", count, *s.Items.MaxLength)
	}
	return count + " entries"
}

// TestPolicyExamplesAreValid: an API server and a directory take each example of the
// documents.
func TestPolicyExamplesAreValid(t *testing.T) {
	for document, crd := range policyDocuments {
		t.Run(document, func(t *testing.T) { examplesAreValid(t, document, crd) })
	}
}

func examplesAreValid(t *testing.T, document, crd string) {
	examples := examplesOf(t, document)
	serverTakes(t, examples, crd)
	fromDirectory(t, examples)
}

// examplesOf are the objects of a document's YAML.
func examplesOf(t *testing.T, document string) []string {
	var examples []string
	for _, m := range regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(string(read(t, document)), -1) {
		examples = append(examples, strings.Split(m[1], "---\n")...)
	}
	if len(examples) == 0 {
		t.Fatal("there is no example")
	}
	return examples
}

// serverTakes holds objects to their CRDs, as an API server does.
func serverTakes(t *testing.T, examples []string, crds ...string) {
	args := []string{"run", "."}
	for _, crd := range crds {
		args = append(args, "../../manifests/"+crd)
	}
	cmd := exec.Command("go", args...)
	cmd.Dir, cmd.Stdin = "../tests/crds", strings.NewReader(strings.Join(examples, "---\n"))
	out, err := cmd.CombinedOutput()
	if want := strings.Repeat("\n", len(examples)); err != nil || string(out) != want {
		t.Errorf("an API server says %v\n%s", err, out)
	}
}

// fromDirectory is what the agent makes of objects in a directory.
func fromDirectory(t *testing.T, examples []string) *cluster.Store {
	dir := t.TempDir()
	for i, example := range examples {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%d.yaml", i)), []byte(example), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	store := cluster.NewStore()
	if err := cluster.RunDir(ctx, store, dir, slog.New(slog.DiscardHandler)); err != nil {
		t.Errorf("a directory says %v", err)
	}
	return store
}
