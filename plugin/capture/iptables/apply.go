package iptables

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/weirmesh/weir/plugin/capture"
)

// ours are all chains that there may be.
var ours = []chain{
	{table: "filter", builtin: "OUTPUT", name: "WEIR_GUARD_OUT"},
	{table: "nat", builtin: "PREROUTING", name: "WEIR_IN"},
	{table: "nat", builtin: "OUTPUT", name: "WEIR_OUT"},
	{table: "filter", builtin: "INPUT", name: "WEIR_GUARD"},
}

// without are those of ours that chains have not.
func without(chains []chain) []chain {
	return slices.DeleteFunc(slices.Clone(ours), func(c chain) bool {
		return slices.ContainsFunc(chains, func(have chain) bool { return have.name == c.name })
	})
}

// allEqual says whether the rules are there already, by the digest in the jumps
// and by how many rules there are: iptables prints rules in other words than it
// takes, differently from version to version.
func allEqual(families []family, want capture.Ruleset) (bool, error) {
	d := digest(want)
	for _, f := range families {
		chains, err := render(want, f.v6)
		if err != nil {
			return false, err
		}
		for _, c := range chains {
			if equal, err := f.equal(c, d); err != nil || !equal {
				return false, err
			}
		}
		for _, c := range without(chains) {
			if exists, err := f.ipt.ChainExists(c.table, c.name); err != nil || exists {
				return false, err
			}
		}
	}
	return true, nil
}

func (f family) equal(c chain, digest string) (bool, error) {
	builtin, err := f.ipt.List(c.table, c.builtin)
	if err != nil {
		return false, fmt.Errorf("iptables: %w", err)
	}
	rules := rulesOf(builtin, c.builtin)
	if len(rules) == 0 || jumpsTo(rules[0]) != c.name || comment(rules[0]) != digest {
		return false, nil
	}
	for _, r := range rules[1:] {
		if to := jumpsTo(r); to == c.name || to == c.fresh() {
			return false, nil
		}
	}
	own, err := f.ipt.List(c.table, c.name)
	if err != nil {
		return false, fmt.Errorf("iptables: %w", err)
	}
	return len(rulesOf(own, c.name)) == len(c.rules), nil
}

// replace builds all new chains, then jumps to them, then drops the old ones.
func replace(families []family, want capture.Ruleset) error {
	d := digest(want)
	built := make([][]chain, len(families))
	undo := func(cause error) error {
		failed := []error{cause}
		for i, f := range families {
			for _, c := range built[i] {
				failed = append(failed, f.drop(c, c.fresh()))
			}
		}
		return errors.Join(failed...)
	}
	for i, f := range families {
		chains, err := render(want, f.v6)
		if err != nil {
			return undo(err)
		}
		for _, c := range chains {
			built[i] = append(built[i], c)
			if err := f.build(c); err != nil {
				return undo(err)
			}
		}
	}
	for i, f := range families {
		// The guard first: what in and out turn aside passes it.
		for _, c := range slices.Backward(built[i]) {
			if err := f.ipt.Insert(c.table, c.builtin, 1, jump(c.fresh(), d)...); err != nil {
				return undo(fmt.Errorf("iptables: %w", err))
			}
		}
	}
	for i, f := range families {
		for _, c := range built[i] {
			if err := f.drop(c, c.name); err != nil {
				return err
			}
			// The jump follows its chain to the new name.
			if err := f.ipt.RenameChain(c.table, c.fresh(), c.name); err != nil {
				return fmt.Errorf("iptables: %w", err)
			}
		}
		for _, c := range without(built[i]) {
			if err := f.dropIfThere(c); err != nil {
				return err
			}
		}
	}
	return nil
}

// build fills a chain that nothing jumps to yet.
func (f family) build(c chain) error {
	if err := f.drop(c, c.fresh()); err != nil { // of an apply that was killed
		return err
	}
	if err := f.ipt.NewChain(c.table, c.fresh()); err != nil {
		return fmt.Errorf("iptables: %w", err)
	}
	for _, r := range c.rules {
		if err := f.ipt.Append(c.table, c.fresh(), r...); err != nil {
			return fmt.Errorf("iptables: %w", err)
		}
	}
	return nil
}

// drop takes away a chain and the jumps to it, if they are there.
func (f family) drop(c chain, name string) error {
	builtin, err := f.ipt.List(c.table, c.builtin)
	if err != nil {
		return fmt.Errorf("iptables: %w", err)
	}
	rules := rulesOf(builtin, c.builtin)
	for i, r := range slices.Backward(rules) {
		if jumpsTo(r) == name {
			if err := f.ipt.DeleteById(c.table, c.builtin, i+1); err != nil {
				return fmt.Errorf("iptables: %w", err)
			}
		}
	}
	if err := f.ipt.ClearAndDeleteChain(c.table, name); err != nil {
		return fmt.Errorf("iptables: %w", err)
	}
	return nil
}

// dropIfThere is drop for a chain that is most likely not there.
func (f family) dropIfThere(c chain) error {
	exists, err := f.ipt.ChainExists(c.table, c.name)
	if err != nil {
		return fmt.Errorf("iptables: %w", err)
	}
	if !exists {
		return nil
	}
	return f.drop(c, c.name)
}

// rulesOf picks a chain's rules out of a listing, which begins with the chain.
func rulesOf(listing []string, chain string) []string {
	return slices.DeleteFunc(slices.Clone(listing), func(l string) bool {
		return !strings.HasPrefix(l, "-A "+chain+" ")
	})
}

// after is the word after another in a listed rule.
func after(rule, word string) string {
	fields := strings.Fields(rule)
	if i := slices.Index(fields, word); i >= 0 && i+1 < len(fields) {
		return strings.Trim(fields[i+1], `"`)
	}
	return ""
}

func jumpsTo(rule string) string { return after(rule, "-j") }

// comment is what a rule's comment says after the marker.
func comment(rule string) string {
	c, ok := strings.CutPrefix(after(rule, "--comment"), marker)
	if !ok {
		return ""
	}
	return c
}
