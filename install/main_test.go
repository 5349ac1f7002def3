package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/testscript"
	"sigs.k8s.io/yaml"

	"github.com/weirmesh/weir/install/place"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"weir-install": main})
}

// TestScripts runs the program against folders that stand for a node's.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("GORACE", "atexit_sleep_ms=10") // by default each exec ends 1 s later
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"waitgrep": waitGrep,
			"sameas":   sameFile,
		},
	})
}

// patience is how long the program may take for what it does at once: FAULTS.md
// gives a rewritten chain a second.
const patience = time.Second

// waitGrep waits until a file matches, or with ! until it does not or is gone:
// waitgrep regexp file.
func waitGrep(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: waitgrep regexp file")
	}
	re, err := regexp.Compile("(?m)" + args[0])
	ts.Check(err)
	var content []byte
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		content, err = os.ReadFile(ts.MkAbs(args[1]))
		if found := err == nil && re.Match(content); found != neg {
			return
		}
	}
	ts.Fatalf("%s within %s: match of %q is %v; %v\n%s", args[1], patience, args[0], neg, err, content)
}

// sameFile checks that a file was not replaced since the last call: sameas file.
func sameFile(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: sameas file")
	}
	var st syscall.Stat_t
	ts.Check(syscall.Stat(ts.MkAbs(args[0]), &st))
	now, key := fmt.Sprint(st.Ino, st.Mtim), "sameas "+args[0]
	old := ts.Getenv(key)
	ts.Setenv(key, now)
	if old != "" && (old == now) == neg {
		ts.Fatalf("%s: replaced is %v", args[0], !neg)
	}
}

// TestManifests holds the flags in the manifests to the program's, and what
// installs and uninstalls to the same folders.
func TestManifests(t *testing.T) {
	installed := container(t, "../manifests/base/daemonset.yaml", "install")
	removed := container(t, "../manifests/uninstall/daemonset.yaml", "uninstall")
	if diff := cmp.Diff([]string{"/weir-install", "run"}, installed.Command); diff != "" {
		t.Errorf("command (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"/weir-install", "uninstall"}, removed.Command); diff != "" {
		t.Errorf("command (-want +got):\n%s", diff)
	}
	run := parsed(t, "run", installed.Args)
	probe := installed.ReadinessProbe.Exec.Command
	if !slices.Equal(probe[:2], []string{"/weir-install", "ready"}) {
		t.Errorf("readiness probe runs %q", probe[:2])
	}
	for command, args := range map[string][]string{"ready": probe[2:], "uninstall": removed.Args} {
		o := parsed(t, command, args)
		if o.confDir != run.confDir || o.binDir != run.binDir {
			t.Errorf("%s has other folders than run: %q %q", command, o.confDir, o.binDir)
		}
	}
	defaults := parsed(t, "run", nil)
	if diff := cmp.Diff(defaults.entry, run.entry); diff != "" {
		t.Errorf("the manifests' entry is not the default (-default +manifest):\n%s", diff)
	}
}

func parsed(t *testing.T, command string, args []string) options {
	t.Helper()
	o, err := parseFlags(command, args, t.Output())
	if err != nil {
		t.Fatalf("%s %q: %v", command, args, err)
	}
	return o
}

type containerSpec struct {
	Name           string
	Command, Args  []string
	ReadinessProbe struct{ Exec struct{ Command []string } }
}

func container(t *testing.T, file, name string) containerSpec {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var set struct {
		Spec struct {
			Template struct {
				Spec struct{ Containers, InitContainers []containerSpec }
			}
		}
	}
	if err := yaml.Unmarshal(content, &set); err != nil {
		t.Fatal(err)
	}
	pod := set.Spec.Template.Spec
	for _, c := range slices.Concat(pod.Containers, pod.InitContainers) {
		if c.Name == name {
			return c
		}
	}
	t.Fatal(fmt.Errorf("%s has no container %s", file, name))
	return containerSpec{}
}

// TestProven: a drop-in counts when the runtime has loaded it, and is not asked
// about for ever.
func TestProven(t *testing.T) {
	now := time.Now()
	for _, tt := range []struct {
		name    string
		chained place.Chained
		types   []string
		err     error
		want    bool
	}{
		{"an entry", place.Chained{}, nil, nil, true},
		{"a new drop-in, loaded", place.Chained{DropIn: true, Since: now}, []string{"bridge", "weir-cni"}, nil, true},
		{"a new drop-in, not loaded", place.Chained{DropIn: true, Since: now}, []string{"bridge"}, nil, false},
		{"a new drop-in, no answer", place.Chained{DropIn: true, Since: now}, nil, errors.New("no answer"), false},
		{"an old drop-in, no answer", place.Chained{DropIn: true, Since: now.Add(-time.Hour)}, nil, errors.New("no answer"), true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := proven(t.Context(), tt.chained, func(context.Context) ([]string, error) { return tt.types, tt.err })
			if (err == nil) != tt.want {
				t.Errorf("got %v, want ready %v", err, tt.want)
			}
		})
	}
}
