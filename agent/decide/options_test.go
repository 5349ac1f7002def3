package decide

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/plugin/capture"
)

// shipped is the file that an operator edits.
const shipped = "../../manifests/base/options.yaml"

func TestTheShippedOptionsAreTheDefaults(t *testing.T) {
	got, err := ReadOptionsFile(shipped)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Defaults(), got, prefixes); diff != "" {
		t.Errorf("-defaults +file:\n%s", diff)
	}
	if got, err = ReadOptionsFile(""); err != nil || cmp.Diff(Defaults(), got, prefixes) != "" {
		t.Errorf("without a file: %v, %v", got, err)
	}
}

func TestOptionsTakeThePlaceOfTheirDefaults(t *testing.T) {
	name := filepath.Join(t.TempDir(), "options.yaml")
	err := os.WriteFile(name, []byte(`---
exemptNamespaces: [infra]
exemptStaticPods: true
allowRuntimeClasses: [nvidia]
keepClientAddress: false
meshRanges: [10.1.2.3/16]
trustDomain: example.org
keyExchange: X25519
certificateTTL: 90m
proxyMaxProcs: 4
annotations:
  weirmesh.io/quic: reject
  weirmesh.io/exclude-outbound-ports: "3306,5432"
`), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ReadOptionsFile(name)
	if err != nil {
		t.Fatal(err)
	}
	want := Options{
		ExemptNamespaces:    []string{"infra"},
		ExemptStaticPods:    true,
		AllowRuntimeClasses: []string{"nvidia"},
		MeshRanges:          []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")},
		TrustDomain:         "example.org",
		KeyExchange:         Classic,
		CertificateTTL:      Duration{90 * time.Minute},
		ProxyMaxProcs:       4,
		Annotations:         map[string]string{"weirmesh.io/quic": "reject", "weirmesh.io/exclude-outbound-ports": "3306,5432"},
	}
	if diff := cmp.Diff(want, got, prefixes); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestAPodsAnnotationTakesThePlaceOfTheMeshs(t *testing.T) {
	opts := Defaults()
	opts.KeepClientAddress = false
	opts.Annotations = map[string]string{"weirmesh.io/quic": "reject", "weirmesh.io/exclude-outbound-ports": "3306"}
	pod := model.Pod{Namespace: "shop", Name: "front", Labels: label("enabled"), Annotations: map[string]string{
		"weirmesh.io/exclude-outbound-ports": "5432", "other.example.com/quic": "?"}}
	got, err := Capture(pod, shop(nil), opts)
	if err != nil {
		t.Fatal(err)
	}
	want := capture.Spec{RefuseQUIC: true, ExcludeOutboundPorts: []capture.PortRange{{First: 5432, Last: 5432}}}
	if diff := cmp.Diff(want, got.Spec, prefixes); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestOptionsThatCannotBeMeant(t *testing.T) {
	for document, want := range map[string]string{
		"exemptNamespaces: [a, '']":                       "exemptNamespaces: an entry is empty",
		"allowRuntimeClasses: ['']":                       "allowRuntimeClasses: an entry is empty; pods without a class are always allowed",
		"certificateTTL: 1s":                              "certificateTTL: 1s is none of 10s to 24h0m0s",
		"certificateTTL: 48h":                             "certificateTTL: 48h0m0s is none of 10s to 24h0m0s",
		"certificateTTL: soon":                            `time: invalid duration "soon"`,
		"proxyMaxProcs: 0":                                "proxyMaxProcs: 0 is none of 1 to 64",
		"keyExchange: P256":                               `keyExchange: "P256" is neither X25519MLKEM768 nor X25519`,
		"keyExchange: ''":                                 `keyExchange: "" is neither X25519MLKEM768 nor X25519`,
		"trustDomain: ''":                                 `trustDomain: trust domain "": trust domain is missing`,
		"trustDomain: spiffe://example.org":               `trustDomain: trust domain "spiffe://example.org": its name alone is wanted, "example.org"`,
		"trustDomain: Example.org":                        `trustDomain: trust domain "Example.org"`,
		"meshRanges: ['']":                                "meshRanges: an entry is empty",
		"meshRanges: [10.0.0.1]":                          `netip.ParsePrefix("10.0.0.1"): no '/'`,
		"exemptNamespace: [a]":                            `unknown field "exemptNamespace"`,
		"exemptStaticPods: maybe":                         "cannot unmarshal string into Go struct field Options.exemptStaticPods of type bool",
		"exemptStaticPods: true\nexemptStaticPods: false": `key "exemptStaticPods" already set in map`,
		"annotations: {quic: reject}":                     `annotations: no annotation is called "quic"; it is one of those of ANNOTATIONS.md, with the prefix weirmesh.io/`,
		"annotations: {weirmesh.io/quik: reject}":         `annotations: no annotation is called "weirmesh.io/quik"`,
		"annotations: {weirmesh.io/quic: drop}":           `annotations: weirmesh.io/quic is "drop": `,
		"{}\n---\nexemptStaticPods: true":                 "more than one YAML document",
		"[]":                                              "cannot unmarshal array",
		"a: b: c":                                         "mapping values are not allowed",
	} {
		if _, err := ReadOptions([]byte(document)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %s", document, err, want)
		}
	}
	if _, err := ReadOptionsFile("/nowhere/options.yaml"); err == nil || !strings.Contains(err.Error(), "mesh options: open /nowhere/options.yaml") {
		t.Errorf("%v", err)
	}
}

func FuzzOptions(f *testing.F) {
	f.Add([]byte("exemptNamespaces: [a]\nannotations: {weirmesh.io/quic: reject}"))
	f.Add([]byte("meshRanges: [10.0.0.0/8, fd00::/8]"))
	f.Fuzz(func(t *testing.T, document []byte) {
		o, err := ReadOptions(document)
		if err != nil {
			return
		}
		if err := o.Validate(); err != nil {
			t.Errorf("read, but not valid: %v", err)
		}
	})
}
