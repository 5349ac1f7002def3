package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/weirmesh/weir/agent/attachpb"
	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/plugin/capture/iptables"
	"github.com/weirmesh/weir/plugin/capture/nft"
)

// backend puts rules into the calling thread's network namespace. A failed Apply
// leaves what was there before; Apply of what is there changes nothing.
type backend interface {
	Name() string
	Apply(capture.Ruleset) (bool, error)
	Delete() error
	Read() (capture.State, error)
	Difference(capture.Ruleset) (string, error)
}

// target is a pod's namespace and the backends it may be given rules by, in the
// order in which they are tried.
type target struct {
	ns       *os.File
	backends []backend
	used     backend
	client   clientChanges
}

func newTarget(c conf, container string, ns *os.File) *target {
	byName := map[string][]backend{
		backendNFTables: {nft.Backend{}},
		backendIPTables: {newIPTables(c.LockDir, container)},
	}
	byName[backendAuto] = append(byName[backendNFTables], byName[backendIPTables]...)
	return &target{ns: ns, backends: byName[c.Backend]}
}

func newIPTables(lockDir, container string) iptables.Backend {
	return iptables.Backend{LockFile: filepath.Join(lockDir, container+".lock")}
}

// apply prepares the namespace and puts the rules into it.
func (t *target) apply(rules capture.Ruleset) (*attachpb.Applied, error) {
	start := time.Now()
	err := inNamespace(t.ns, func() error {
		if err := prepare(); err != nil {
			return err
		}
		if err := t.prepareClient(rules); err != nil {
			return err
		}
		if _, err := t.probe(rules); err != nil {
			return errors.Join(err, t.client.revert())
		}
		return keepHalfClosed()
	})
	if err != nil {
		return nil, err
	}
	return &attachpb.Applied{
		Backend:    t.used.Name(),
		Rules:      rules.String(),
		TookMicros: time.Since(start).Microseconds(),
	}, nil
}

// prepareClient prepares for rules that keep the caller's address, if these do.
// Where earlier ones did, what they needed stays: nothing is marked any more.
func (t *target) prepareClient(rules capture.Ruleset) error {
	if !rules.KeepsClient() {
		return nil
	}
	var err error
	if t.client, err = prepareClient(); err != nil {
		return errors.Join(err, t.client.revert())
	}
	return nil
}

// probe applies the rules by the first backend that this kernel supports. The
// attempt is the probe: it is one transaction, and what a kernel has differs from
// what its version says.
func (t *target) probe(rules capture.Ruleset) (bool, error) {
	var tried []error
	for _, b := range t.backends {
		changed, err := b.Apply(rules)
		if err == nil {
			t.used = b
			return changed, nil
		}
		tried = append(tried, err)
		if !nft.IsUnsupported(err) {
			break
		}
	}
	return false, errors.Join(tried...)
}

// settle keeps to the backend whose rules are in the namespace, if there are any:
// another one may be preferred by now, but a pod never has two sets of rules.
func (t *target) settle() error {
	return inNamespace(t.ns, func() error {
		for _, b := range t.backends {
			if st, err := b.Read(); err == nil && st.Text != "" {
				t.backends = []backend{b}
				break
			}
		}
		return nil
	})
}

// compare names the first thing in which the namespace is not as apply leaves it.
func (t *target) compare(rules capture.Ruleset) (done, error) {
	var out done
	err := inNamespace(t.ns, func() error {
		var err error
		if out.Difference, err = unprepared(); err != nil || out.Difference != "" {
			return err
		}
		for i, b := range t.backends {
			difference, err := b.Difference(rules)
			switch {
			case err != nil && (i > 0 || nft.IsUnsupported(err)):
				continue // this node has no such backend
			case err != nil:
				return err
			case difference != capture.NoRules:
				out.Backend, out.Difference = b.Name(), difference
				if difference == "" && rules.KeepsClient() {
					out.Difference, err = unpreparedClient()
				}
				return err
			}
		}
		out.Difference = capture.NoRules
		return nil
	})
	return out, err
}

// deleteAll takes out the rules of every backend, and the routes that only their
// mark led to. The sysctls stay: what they were before is not known, and without
// marks they do nothing.
func (t *target) deleteAll() error {
	return inNamespace(t.ns, func() error {
		var failed []error
		for _, b := range t.backends {
			if st, err := b.Read(); err == nil && st.Text != "" {
				failed = append(failed, b.Delete())
			}
		}
		return errors.Join(append(failed, removeClientRoutes())...)
	})
}

// undo takes the rules out again, then what they needed.
func (t *target) undo() error {
	if t.used == nil {
		return nil
	}
	return inNamespace(t.ns, func() error {
		err := t.used.Delete()
		if err != nil {
			err = fmt.Errorf("%s: %w", t.used.Name(), err)
		}
		return errors.Join(err, t.client.revert())
	})
}
