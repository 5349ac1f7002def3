package decide

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/plugin/capture/iptables"
)

var update = flag.Bool("update", false, "write ANNOTATIONS.md anew")

const document = "../../manifests/ANNOTATIONS.md"

// TestDocument holds ANNOTATIONS.md to the annotations that there are.
func TestDocument(t *testing.T) {
	want := annotationsDocument()
	if *update {
		if err := os.WriteFile(document, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("ANNOTATIONS.md is not as the annotations are (-annotations +document), see -update:\n%s", diff)
	}
}

func annotationsDocument() string {
	var b strings.Builder
	fmt.Fprintf(&b, `# What a pod may ask for: annotations

On a pod that is captured (label %[1]s=%[2]s on it or its namespace), all with
the prefix %[3]s. Lists are separated by commas. What any exclude list names is
left alone, also where an include list names it. A value that means nothing, and
an annotation that Weir does not know, fail the pod's ADD with WEIR-C006
([CODES.md](../plugin/CODES.md)), which names it: the pod waits, and its events say
so. On a pod that runs, annotations about its traffic take effect when they change;
opaque-ports and those about the proxy hold as they were when it was captured.

Rules are put in by nftables or, where a node's kernel cannot, by iptables; both do
the same, but for the second table.

| Annotation | Value | Without it | What it does | Backends |
|---|---|---|---|---|
`, "`"+CaptureLabel, Enabled+"`", "`"+model.Prefix+"`")
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
