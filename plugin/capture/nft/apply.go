package nft

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/weirmesh/weir/plugin/capture"
)

// Apply makes the namespace hold the rules, in one transaction for both address
// families, and says whether it had to change anything. Where the same rules are
// there already, nothing is sent: a replacement waits for RCU (20 ms) and starts
// the counters anew. After an error what was there before is there still.
//
// Replacing is safe under live connections only because deletion and addition
// are one transaction: conntrack, and with it the translation of what was turned
// aside, ends with the last rule that needs it.
func (b Backend) Apply(want capture.Ruleset) (bool, error) {
	conn, err := b.open()
	if err != nil {
		return false, err
	}
	defer conn.CloseLasting()

	old, err := find(conn)
	if err != nil {
		return false, err
	}
	if old != nil {
		have, err := b.rules(conn, old)
		if err != nil {
			return false, err
		}
		if capture.Difference(have, want) == "" {
			return false, nil
		}
	}
	err = b.transact(func(conn *nftables.Conn) error {
		if old != nil {
			conn.DelTable(table())
		}
		return add(conn, want)
	})
	if err != nil {
		return false, fmt.Errorf("nft: load rules: %w", err)
	}
	return true, nil
}

// Difference names the first thing in which the namespace's rules are not as
// want. Empty: there is none.
func (b Backend) Difference(want capture.Ruleset) (string, error) {
	conn, err := b.open()
	if err != nil {
		return "", err
	}
	defer conn.CloseLasting()
	t, err := find(conn)
	if err != nil {
		return "", err
	}
	if t == nil {
		return capture.NoRules, nil
	}
	have, err := b.rules(conn, t)
	if err != nil {
		return "", err
	}
	return capture.Difference(have, want), nil
}

// add buffers the whole table.
func add(conn *nftables.Conn, want capture.Ruleset) error {
	t := conn.AddTable(table())
	for _, name := range want.Counters {
		conn.AddObj(&nftables.CounterObj{Table: t, Name: name})
	}
	for _, c := range want.Chains {
		hook, ok := hooks[c.Hook]
		if !ok {
			return fmt.Errorf("chain %s: no hook %q", c.Name, c.Hook)
		}
		policy := nftables.ChainPolicyAccept
		chain := conn.AddChain(&nftables.Chain{
			Table: t, Name: c.Name, Type: nftables.ChainType(c.Type),
			Hooknum: hook, Priority: nftables.ChainPriorityRef(nftables.ChainPriority(c.Priority)), Policy: &policy,
		})
		for _, r := range c.Rules {
			e := encoder{conn: conn, table: t}
			exprs, err := e.rule(r)
			if err != nil {
				return fmt.Errorf("chain %s: %w", c.Name, err)
			}
			conn.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: exprs})
		}
	}
	return nil
}

var hooks = map[string]*nftables.ChainHook{
	"prerouting": nftables.ChainHookPrerouting,
	"input":      nftables.ChainHookInput,
	"output":     nftables.ChainHookOutput,
}

// Delete takes the rules away, if there are any. Connections that were turned
// aside lose their translation and are reset: it is for undoing an ADD.
func (b Backend) Delete() error {
	conn, err := b.open()
	if err != nil {
		return err
	}
	defer conn.CloseLasting()
	if old, err := find(conn); err != nil || old == nil {
		return err
	}
	err = b.transact(func(conn *nftables.Conn) error {
		conn.DelTable(table())
		return nil
	})
	if err != nil {
		return fmt.Errorf("nft: delete rules: %w", err)
	}
	return nil
}
