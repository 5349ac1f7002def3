package nft

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"github.com/weirmesh/weir/plugin/capture"
	"golang.org/x/sys/unix"
)

// Read returns the rules as they are in the kernel, in nft's syntax, and what
// they counted. What was put in by somebody else is shown as well as it can be.
func (b Backend) Read() (capture.State, error) {
	conn, err := b.open()
	if err != nil {
		return capture.State{}, err
	}
	defer conn.CloseLasting()
	t, err := find(conn)
	if err != nil || t == nil {
		return capture.State{}, err
	}
	rules, err := b.rules(conn, t)
	if err != nil {
		return capture.State{}, err
	}
	counters, err := counters(conn)
	if err != nil {
		return capture.State{}, err
	}
	return capture.State{Text: named(rules).String(), Counters: counters, KeepsClient: rules.KeepsClient()}, nil
}

func counters(conn *nftables.Conn) (map[string]capture.Counter, error) {
	objs, err := conn.GetObjects(table())
	if err != nil {
		return nil, fmt.Errorf("nft: read counters: %w", err)
	}
	out := make(map[string]capture.Counter)
	for _, o := range objs {
		if c, ok := o.(*nftables.CounterObj); ok {
			out[c.Name] = capture.Counter{Packets: c.Packets, Bytes: c.Bytes}
		}
	}
	return out, nil
}

// rules decodes the table t.
func (b Backend) rules(conn *nftables.Conn, t *nftables.Table) (capture.Ruleset, error) {
	counters, err := conn.GetObjects(table())
	if err != nil {
		return capture.Ruleset{}, fmt.Errorf("nft: read counters: %w", err)
	}
	// The kernel knows two more flags than dormant; Weir sets none of them.
	out := capture.Ruleset{Dormant: t.Flags != 0}
	for _, o := range counters {
		if c, ok := o.(*nftables.CounterObj); ok {
			out.Counters = append(out.Counters, c.Name)
		}
	}
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return capture.Ruleset{}, fmt.Errorf("nft: read chains: %w", err)
	}
	sets, err := readSets(conn)
	if err != nil {
		return capture.Ruleset{}, err
	}
	raw, err := b.dumpRules()
	if err != nil {
		return capture.Ruleset{}, err
	}
	for _, c := range chains {
		if c.Table.Name != capture.TableName {
			continue
		}
		chain := decodeChain(c)
		for _, r := range raw {
			if r.chain == c.Name {
				chain.Rules = append(chain.Rules, decodeRule(r, sets))
			}
		}
		out.Chains = append(out.Chains, chain)
	}
	return out, nil
}

func decodeChain(c *nftables.Chain) capture.Chain {
	out := capture.Chain{Name: c.Name, Type: string(c.Type)}
	if c.Hooknum != nil {
		for name, hook := range hooks {
			if *hook == *c.Hooknum {
				out.Hook = name
			}
		}
	}
	if c.Priority != nil {
		out.Priority = int(*c.Priority)
	}
	out.Drop = c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop
	return out
}

// rawSet is a set's elements, and whether they are the ends of intervals.
type rawSet struct {
	intervals bool
	elements  []nftables.SetElement
}

// readSets reads every set of the table, by name.
func readSets(conn *nftables.Conn) (map[string]rawSet, error) {
	sets, err := conn.GetSets(table())
	if err != nil {
		return nil, fmt.Errorf("nft: read sets: %w", err)
	}
	out := make(map[string]rawSet)
	for _, s := range sets {
		elements, err := conn.GetSetElements(s)
		if err != nil {
			return nil, fmt.Errorf("nft: read set %s: %w", s.Name, err)
		}
		out[s.Name] = rawSet{s.Interval, elements}
	}
	return out, nil
}

// rawRule is a rule as the kernel dumps it: its expressions by name and payload.
type rawRule struct {
	chain string
	exprs []rawExpr
}

type rawExpr struct {
	name string
	data []byte
}

// dumpRules reads the table's rules without the library, whose reader (0.3.0)
// leaves out expressions it has no name for, socket among them: a rule that lost
// its bypass would look like one that has it.
func (b Backend) dumpRules() ([]rawRule, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: b.NS})
	if err != nil {
		return nil, fmt.Errorf("nft: open netlink: %w", err)
	}
	defer conn.Close()
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_RULE_TABLE, Data: []byte(capture.TableName + "\x00")},
	})
	if err != nil {
		return nil, fmt.Errorf("nft: read rules: %w", err)
	}
	replies, err := conn.Execute(netlink.Message{
		Header: netlink.Header{
			Type:  netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETRULE),
			Flags: netlink.Request | netlink.Dump,
		},
		Data: append([]byte{unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0}, attrs...), // struct nfgenmsg
	})
	if err != nil {
		return nil, fmt.Errorf("nft: read rules: %w", err)
	}
	var out []rawRule
	for _, m := range replies {
		r, err := parseRule(m.Data)
		if err != nil {
			return nil, fmt.Errorf("nft: read rules: %w", err)
		}
		out = append(out, r)
	}
	return out, nil
}

const nfgenmsgLen = 4

func parseRule(msg []byte) (rawRule, error) {
	if len(msg) < nfgenmsgLen {
		return rawRule{}, fmt.Errorf("short message of %d bytes", len(msg))
	}
	ad, err := netlink.NewAttributeDecoder(msg[nfgenmsgLen:])
	if err != nil {
		return rawRule{}, err
	}
	ad.ByteOrder = binary.BigEndian
	var r rawRule
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_RULE_CHAIN:
			r.chain = ad.String()
		case unix.NFTA_RULE_EXPRESSIONS:
			ad.Nested(func(list *netlink.AttributeDecoder) error {
				for list.Next() {
					list.Nested(func(one *netlink.AttributeDecoder) error {
						var e rawExpr
						for one.Next() {
							switch one.Type() {
							case unix.NFTA_EXPR_NAME:
								e.name = one.String()
							case unix.NFTA_EXPR_DATA:
								e.data = slices.Clone(one.Bytes())
							}
						}
						r.exprs = append(r.exprs, e)
						return nil
					})
				}
				return nil
			})
		}
	}
	return r, ad.Err()
}
