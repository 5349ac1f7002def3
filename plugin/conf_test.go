package main

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/weirmesh/weir/agent/attachpb"
)

func TestConf(t *testing.T) {
	with := func(change func(*conf)) conf {
		c := defaults()
		change(&c)
		return c
	}
	for name, c := range map[string]struct {
		in   string
		want conf
	}{
		"defaults": {`{"type":"weir-cni"}`, defaults()},
		"everything": {
			`{"type":"weir-cni","socket":"/a/b","exemptNamespaces":["x"],"timeout":"750ms","backend":"iptables","lockDir":"/l"}`,
			conf{Socket: "/a/b", ExemptNamespaces: []string{"x"}, Timeout: 750 * time.Millisecond, Backend: "iptables", LockDir: "/l"},
		},
		"nothing exempt":   {`{"type":"weir-cni","exemptNamespaces":[]}`, with(func(c *conf) { c.ExemptNamespaces = []string{} })},
		"null is left out": {`{"type":"weir-cni","timeout":null,"exemptNamespaces":null}`, defaults()},
		"runtime's keys": {
			`{"type":"weir-cni","cniVersion":"1.1.0","cniVersions":["1.1.0"],"name":"x","runtimeConfig":{"a":{}},"capabilities":{"b":true},"args":{},"dns":{},"ipam":{},"cni.dev/valid-attachments":[]}`,
			defaults(),
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseConf([]byte(c.in))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, got, cmp.AllowUnexported(conf{}), cmpopts.IgnoreFields(conf{}, "cni")); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestConfErrors(t *testing.T) {
	for in, words := range map[string]string{
		`{}`:                              "type is missing",
		`{"type":""}`:                     "type is missing",
		`{"type":7}`:                      "type",
		`{"type":"weir-cni","socket":""}`: "socket",
		`{"type":"weir-cni","socket":"run/weir"}`:                          "absolute path",
		`{"type":"weir-cni","socket":"/` + strings.Repeat("x", 107) + `"}`: "107 bytes",
		`{"type":"weir-cni","exemptNamespaces":"kube-system"}`:             "exemptNamespaces",
		`{"type":"weir-cni","exemptNamespaces":[""]}`:                      "empty name",
		`{"type":"weir-cni","timeout":5}`:                                  "timeout",
		`{"type":"weir-cni","timeout":"5"}`:                                `"5" is not a duration`,
		`{"type":"weir-cni","timeout":"0s"}`:                               "between",
		`{"type":"weir-cni","timeout":"-1s"}`:                              "between",
		`{"type":"weir-cni","timeout":"2m"}`:                               "between",
		`{"type":"weir-cni","backend":""}`:                                 "backend",
		`{"type":"weir-cni","backend":"ebpf"}`:                             `"ebpf"`,
		`{"type":"weir-cni","lockDir":"x"}`:                                "lockDir",
		`{"type":"weir-cni","Timeout":"5s"}`:                               `unknown key "Timeout"`,
		`{"type":"weir-cni","exemptnamespaces":[]}`:                        "unknown key",
		`{"type":"weir-cni","":1}`:                                         `unknown key ""`,
		`{"type":"weir-cni","kubeconfig":"/x"}`:                            `unknown key "kubeconfig"`,
		`{"type":"weir-cni","disableCheck":true}`:                          "unknown key",
	} {
		_, err := parseConf([]byte(in))
		f, ok := errors.AsType[*attachpb.Failure](err)
		if !ok || f.Code != attachpb.BadConfig || !strings.Contains(f.Detail, words) {
			t.Errorf("%s: %v, want BadConfig with %q", in, err, words)
		}
	}
}

// FuzzConf: no input panics, what fails has a code, and what is accepted is
// within its bounds.
func FuzzConf(f *testing.F) {
	for _, s := range []string{
		`{"type":"weir-cni"}`, `{"type":"weir-cni","timeout":"5s","prevResult":{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.1/8"}]},"cniVersion":"1.0.0"}`,
		`[]`, `{`, `null`, `{"type":"weir-cni","exemptNamespaces":["a","b"]}`, `{"type":"weir-cni","prevResult":{"ips":[null]}}`,
		`{"type":"weir-cni","cniVersion":"0.4.0","prevResult":{"ips":[null],"routes":[null],"interfaces":[null]}}`,
		`{"type":"weir-cni","cniVersion":"0.3.1","prevResult":{"routes":[null],"dns":null}}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		c, err := parseConf(in)
		if err == nil {
			var result types.Result
			if result, err = c.prevResult(); err == nil {
				if _, err = newBegin(&skel.CmdArgs{}, podArgs{}, result); err == nil {
					// What this gives is printed; an error has skel's number.
					_, _ = result.GetAsVersion(c.cni.CNIVersion)
				}
			}
			if !json.Valid(in) || c.Socket == "" || c.Timeout < minTimeout || c.Timeout > maxTimeout {
				t.Errorf("accepted: %+v", c)
			}
		}
		if err != nil {
			if _, ok := errors.AsType[*attachpb.Failure](err); !ok {
				t.Errorf("without a code: %v", err)
			}
		}
	})
}

func TestArgs(t *testing.T) {
	got, err := parseArgs("IgnoreUnknown=1;K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;K8S_POD_UID=c;X=1=2;")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(podArgs{Namespace: "a", Name: "b", UID: "c"}, got); diff != "" {
		t.Error(diff)
	}
	for _, s := range []string{"", ";", "K8S_POD_NAME=b", "K8S_POD_NAMESPACE=a", "K8S_POD_NAMESPACE=;K8S_POD_NAME=b", "K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;x"} {
		_, err := parseArgs(s)
		if f, ok := errors.AsType[*attachpb.Failure](err); !ok || f.Code != attachpb.BadArgs {
			t.Errorf("%q: %v", s, err)
		}
	}
}
