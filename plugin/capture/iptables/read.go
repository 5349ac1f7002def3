package iptables

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/plugin/capture"
)

// Read returns the rules as iptables lists them and what they counted, both
// families together.
func (b Backend) Read() (capture.State, error) {
	var out capture.State
	err := b.locked(func() error {
		families, err := b.families()
		if err != nil {
			return err
		}
		var text strings.Builder
		counters := make(map[string]capture.Counter)
		for _, f := range families {
			if err := f.read(&text, counters); err != nil {
				return err
			}
		}
		if text.Len() > 0 {
			out = capture.State{Text: text.String(), Counters: counters}
		}
		return nil
	})
	return out, err
}

func (f family) read(text *strings.Builder, counters map[string]capture.Counter) error {
	for _, c := range ours {
		exists, err := f.ipt.ChainExists(c.table, c.name)
		if err != nil {
			return fmt.Errorf("iptables: %w", err)
		}
		if !exists {
			continue
		}
		builtin, err := f.ipt.List(c.table, c.builtin)
		if err != nil {
			return fmt.Errorf("iptables: %w", err)
		}
		for _, r := range rulesOf(builtin, c.builtin) {
			if jumpsTo(r) == c.name {
				f.line(text, c, r)
			}
		}
		listing, err := f.ipt.ListWithCounters(c.table, c.name)
		if err != nil {
			return fmt.Errorf("iptables: %w", err)
		}
		for _, r := range rulesOf(listing, c.name) {
			plain, n := splitCounter(r)
			f.line(text, c, plain)
			if name := comment(r); name != "" {
				counters[name] = capture.Counter{Packets: counters[name].Packets + n.Packets, Bytes: counters[name].Bytes + n.Bytes}
			}
		}
	}
	return nil
}

func (f family) line(text *strings.Builder, c chain, rule string) {
	command := "iptables"
	if f.v6 {
		command = "ip6tables"
	}
	fmt.Fprintf(text, "%s -t %s %s\n", command, c.table, rule)
}

var counted = regexp.MustCompile(` -c (\d+) (\d+)`)

// splitCounter takes " -c PACKETS BYTES" out of a listed rule.
func splitCounter(rule string) (string, capture.Counter) {
	m := counted.FindStringSubmatch(rule)
	if m == nil {
		return rule, capture.Counter{}
	}
	// What matched are digits; a number that is too large is the largest.
	packets, _ := strconv.ParseUint(m[1], 10, 64)
	bytes, _ := strconv.ParseUint(m[2], 10, 64)
	return strings.Replace(rule, m[0], "", 1), capture.Counter{Packets: packets, Bytes: bytes}
}
