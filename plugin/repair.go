package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/weirmesh/weir/plugin/capture"
)

// maxTasks bounds what repair reads, in bytes.
const maxTasks = 16 << 20

// task is one namespace and what is to become of its rules.
type task struct {
	Netns string       // path of the network namespace
	Do    string       // one of the names below
	Spec  capture.Spec // what the namespace is to capture, or did
}

// What a task does.
const (
	doCompare = "compare" // look only
	doApply   = "apply"   // put the rules in, where they differ
	doRelease = "release" // turn nothing new aside, keep what was turned aside going
	doDelete  = "delete"  // take everything out
)

// done is what a task came to.
type done struct {
	Netns      string `json:"netns"`
	Difference string `json:"difference,omitempty"` // what was found to be other than the Spec says
	Changed    bool   `json:"changed,omitempty"`
	Backend    string `json:"backend,omitempty"`
	Error      string `json:"error,omitempty"`
}

// repair does a list of tasks, read as JSON, and prints what they came to in the
// same order. It is for the agent, which touches no rules itself: the plugin does,
// in the namespaces of the host, whether the runtime runs it or the agent. The
// exit code says only whether the list could be read.
func repair(args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("weir-cni repair", flag.ContinueOnError)
	flags.SetOutput(stderr)
	backend := flags.String("backend", backendAuto, "auto, nftables or iptables")
	lockDir := flags.String("lock-dir", os.TempDir(), "`folder` for lock files of iptables")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return nil
	case err != nil:
		return errors.New("weir: repair: see the usage above")
	case flags.NArg() > 0:
		flags.Usage()
		return errors.New("weir: repair: the tasks come on standard input")
	}
	decoder := json.NewDecoder(io.LimitReader(stdin, maxTasks))
	decoder.DisallowUnknownFields()
	var tasks []task
	if err := decoder.Decode(&tasks); err != nil {
		return fmt.Errorf("weir: repair: the tasks on standard input: %w", err)
	}
	c := conf{LockDir: *lockDir, Backend: *backend}
	if newTarget(c, "", nil).backends == nil {
		return fmt.Errorf("weir: repair: no backend %q", *backend)
	}
	results := make([]done, 0, len(tasks))
	for i, t := range tasks {
		result, err := t.run(c, fmt.Sprintf("repair-%d-%d", os.Getpid(), i))
		if err != nil {
			result.Error = err.Error()
		}
		result.Netns = t.Netns
		results = append(results, result)
	}
	return json.NewEncoder(stdout).Encode(results)
}

func (t task) run(c conf, lock string) (done, error) {
	if err := t.Spec.Validate(); err != nil {
		return done{}, err
	}
	ns, err := os.Open(t.Netns)
	if err != nil {
		return done{}, err
	}
	defer ns.Close()
	target := newTarget(c, lock, ns)
	switch t.Do {
	case doCompare:
		return target.compare(capture.Rules(t.Spec))
	case doApply:
		out, err := target.compare(capture.Rules(t.Spec))
		if err != nil || out.Difference == "" {
			return out, err
		}
		if out.Difference != capture.NoRules { // or there is nothing to keep to
			if err := target.settle(); err != nil {
				return out, err
			}
		}
		if _, err := target.apply(capture.Rules(t.Spec)); err != nil {
			return out, err
		}
		out.Changed, out.Backend = true, target.used.Name()
		return out, nil
	case doRelease:
		if err := target.settle(); err != nil {
			return done{}, err
		}
		var changed bool
		err := inNamespace(ns, func() error {
			var err error
			changed, err = target.probe(capture.Released(t.Spec))
			return err
		})
		if err != nil {
			return done{}, err
		}
		return done{Changed: changed, Backend: target.used.Name()}, nil
	case doDelete:
		return done{Changed: true}, target.deleteAll()
	}
	return done{}, fmt.Errorf("nothing is called %q; compare, apply, release and delete are", t.Do)
}
