package decide

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/plugin/capture/iptables"
)

var update = flag.Bool("update", false, "write the documents anew")

// TestDocuments holds ANNOTATIONS.md and OPTIONS.md to what there is.
func TestDocuments(t *testing.T) {
	for name, want := range map[string]string{"ANNOTATIONS.md": annotationsDocument(), "OPTIONS.md": optionsDocument(t)} {
		path := filepath.Join("../../manifests", name)
		if *update {
			if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, string(got)); diff != "" {
			t.Errorf("%s is not true any more (-code +document), see -update:\n%s", name, diff)
		}
	}
}

// optionsDocument has every field of Options, in their order, with its default.
func optionsDocument(t *testing.T) string {
	var b strings.Builder
	b.WriteString(`# Mesh options

One YAML file for the whole mesh: [base/options.yaml](base/options.yaml), which
` + "`kubectl apply -k`" + ` makes a ConfigMap of, or ` + "`--options FILE`" + ` of weir-agent
and weir-install. It is read at their start; a change restarts the DaemonSet's pods
node by node, which touches no pod that runs. A field that is not in this table, or
a value that means nothing, keeps them from starting, with an error that names it;
pods that run go on.

| Option | Default | What it is for |
|---|---|---|
`)
	defaults := reflect.ValueOf(Defaults())
	for i := range defaults.NumField() {
		name := defaults.Type().Field(i).Tag.Get("json")
		j := slices.IndexFunc(options, func(o option) bool { return o.name == name })
		if j != i {
			t.Errorf("field %s of Options is option %d", name, j)
			continue
		}
		value, err := json.Marshal(defaults.Field(i).Interface())
		if err != nil {
			t.Fatal(err)
		}
		if string(value) == "null" {
			value = []byte("none")
		}
		fmt.Fprintf(&b, "| `%s` | `%s` | %s |\n", name, strings.ReplaceAll(string(value), `","`, `", "`), options[j].does)
	}
	if len(options) != defaults.NumField() {
		t.Errorf("%d options for %d fields", len(options), defaults.NumField())
	}
	return b.String()
}

func annotationsDocument() string {
	var b strings.Builder
	fmt.Fprintf(&b, `# What a pod may ask for: annotations

On a pod that is captured (label %[1]s=%[2]s on it or its namespace), all with
the prefix %[3]s. Lists are separated by commas and have at most %[4]d items. What any exclude list names is
left alone, also where an include list names it. A value that means nothing, and
an annotation that Weir does not know, fail the pod's ADD with WEIR-C006
([CODES.md](../plugin/CODES.md)), which names it: the pod waits, and its events say
so. On a pod that runs, annotations about its traffic take effect when they change;
opaque-ports and those about the proxy hold as they were when it was captured. The
mesh option [annotations](OPTIONS.md) has what holds for pods without them.

Rules are put in by nftables or, where a node's kernel cannot, by iptables; both do
the same, but for the second table.

| Annotation | Value | Without it | What it does | Backends |
|---|---|---|---|---|
`, "`"+CaptureLabel, Enabled+"`", "`"+model.Prefix+"`", capture.MaxItems)
	for _, a := range annotations {
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", a.name, a.value, a.absent, a.does, backends(a.name))
	}
	b.WriteString(`
Who may change user or group in a pod may choose to be excluded: what a pod may
not do is for its peers' policy to say, not for these. Refused QUIC is seen by its
sender as EPERM or ECONNREFUSED.

TCP is what is captured; UDP, SCTP, ICMP and raw sockets are not. The proxy's own
ports, lo, and the proxy's own connections are never captured.

## What iptables cannot do

A pod that asks for it on a node without nf_tables fails its ADD with WEIR-C010.

| Annotation | What is refused | Why |
|---|---|---|
`)
	for _, r := range iptables.Refusals() {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", r.Option, r.What, r.Why)
	}
	return b.String()
}

// backends says which backends do an annotation.
func backends(name string) string {
	if strings.HasPrefix(name, "proxy-") || name == "opaque-ports" {
		return "not a matter of rules"
	}
	for _, r := range iptables.Refusals() {
		if r.Option == name {
			return "nftables; iptables but for " + r.What
		}
	}
	return "both"
}

// TestRefusalsAreOfAnnotations: what iptables refuses is called as its owner calls
// it.
func TestRefusalsAreOfAnnotations(t *testing.T) {
	for _, r := range iptables.Refusals() {
		if !slices.ContainsFunc(annotations, func(a annotation) bool { return a.name == r.Option }) {
			t.Errorf("no annotation %s", r.Option)
		}
	}
}
