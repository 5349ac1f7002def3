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

// maxSpec bounds what apply reads, in bytes.
const maxSpec = 1 << 20

// applyRules puts the rules of a capture.Spec, read as JSON, into a namespace. It
// is for the agent, which itself touches no rules: the plugin does, in the
// namespaces of the host, whether the runtime runs it or the agent.
func applyRules(args []string, stdin io.Reader, stderr io.Writer) error {
	flags := flag.NewFlagSet("weir-cni apply", flag.ContinueOnError)
	flags.SetOutput(stderr)
	path := flags.String("netns", "", "`path` of the network namespace")
	lockDir := flags.String("lock-dir", os.TempDir(), "`folder` for the lock file of iptables")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return nil
	case err != nil:
		return errors.New("weir: apply: see the usage above")
	case *path == "" || flags.NArg() > 0:
		flags.Usage()
		return errors.New("weir: apply: --netns PATH is needed, and the rules' Spec on standard input")
	}
	decoder := json.NewDecoder(io.LimitReader(stdin, maxSpec))
	decoder.DisallowUnknownFields()
	var spec capture.Spec
	if err := decoder.Decode(&spec); err != nil {
		return fmt.Errorf("weir: apply: the Spec on standard input: %w", err)
	}
	if err := spec.Validate(); err != nil {
		return fmt.Errorf("weir: apply: %w", err)
	}
	ns, err := os.Open(*path)
	if err != nil {
		return fmt.Errorf("weir: apply: %w", err)
	}
	defer ns.Close()
	t := newTarget(conf{LockDir: *lockDir, Backend: backendAuto}, "apply", ns)
	if _, err := t.apply(capture.Rules(spec)); err != nil {
		return fmt.Errorf("weir: apply: %w", err)
	}
	return nil
}
