package main

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/attachpb"
)

var update = flag.Bool("update", false, "write CODES.md anew")

// TestCodesDocument holds CODES.md to the codes that there are.
func TestCodesDocument(t *testing.T) {
	want := codesDocument()
	if *update {
		if err := os.WriteFile("CODES.md", []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile("CODES.md")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("CODES.md is not as the codes are (-codes +document), see -update:\n%s", diff)
	}
}

func codesDocument() string {
	var b strings.Builder
	b.WriteString(`# Why a pod does not start: weir-cni's codes

The message of every error of weir-cni is one line: the cause, what happens next,
what to do, and a code. Kubelet shows it in the pod's event
FailedCreatePodSandBox. The number is the one of the CNI specification (1.1.0,
section “Error”); 100 is our own, for what is refused for good.

| Code | CNI | Cause | What happens next | What to do |
|---|---|---|---|---|
`)
	for _, c := range attachpb.Codes() {
		fmt.Fprintf(&b, "| %s | %d | %s | %s | %s |\n", c.ID, c.CNI, c.Cause, c.Next, c.Remedy)
	}
	b.WriteString(`
A configuration of a CNI version that weir-cni does not know is WEIR-C001 under
the specification's own number for it, 1.
`)
	return b.String()
}

func TestCodesAreDistinct(t *testing.T) {
	seen := make(map[string]bool)
	for _, c := range attachpb.Codes() {
		if seen[c.ID] || c.CNI == 0 || c.Cause == "" || c.Next == "" || c.Remedy == "" {
			t.Errorf("%+v", c)
		}
		seen[c.ID] = true
	}
}
