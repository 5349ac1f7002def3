// Package netns tests capture rules by what they do to connections, in network
// namespaces of its own, and breaks them on purpose for tests and for the demo.
package netns

import (
	"fmt"
	"os"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/weirmesh/weir/plugin/capture"
)

// DeleteRule deletes the rules that step a counter (capture.InTurned, …) from the
// nftables rules in the namespace at path. That there is none is an error.
func DeleteRule(path, counter string) error {
	ns, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("delete rule: %w", err)
	}
	defer ns.Close()
	conn, err := nftables.New(nftables.WithNetNSFd(int(ns.Fd())))
	if err != nil {
		return fmt.Errorf("delete rule: %w", err)
	}
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("delete rule: %w", err)
	}
	found := false
	for _, chain := range chains {
		if chain.Table.Name != capture.TableName {
			continue
		}
		rules, err := conn.GetRules(chain.Table, chain)
		if err != nil {
			return fmt.Errorf("delete rule: %w", err)
		}
		for _, r := range rules {
			if !counts(r, counter) {
				continue
			}
			found = true
			if err := conn.DelRule(r); err != nil {
				return fmt.Errorf("delete rule: %w", err)
			}
		}
	}
	if !found {
		return fmt.Errorf("delete rule: none in %s steps counter %q", path, counter)
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("delete rule: %w", err)
	}
	return nil
}

func counts(r *nftables.Rule, counter string) bool {
	for _, e := range r.Exprs {
		if ref, ok := e.(*expr.Objref); ok && ref.Name == counter {
			return true
		}
	}
	return false
}
