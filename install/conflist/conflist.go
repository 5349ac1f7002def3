package conflist

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
)

// Add returns conf with weir-cni in its chain. What already is as wanted comes
// back as the same bytes, so that a caller writes only what changed.
//
// A new entry goes last: what is before it has made the interfaces. One that is
// there is updated in its place, and stays there if another program has put
// itself behind us: two that each want to be last would rewrite the file for
// ever. An entry that comes first, with no primary before it, is moved.
//
// Of a Single a Chain is made, with its name and cniVersion. Multus' delegates lose
// what they have of ours: it stands behind Multus.
func Add(conf []byte, entry Entry) ([]byte, error) {
	doc, err := parse(conf)
	if err != nil {
		return nil, err
	}
	if bare := doc.undelegated(); len(bare) != len(conf) {
		return Add(bare, entry)
	}
	if err := doc.checkVersion(); err != nil {
		return nil, err
	}
	wanted, err := entry.encode()
	if err != nil {
		return nil, err
	}
	if doc.form == Single {
		return fromSingle(doc, wanted)
	}
	ours := doc.ours()
	switch {
	case len(doc.plugins) == 0:
		return nil, fmt.Errorf("%w: it has a name and neither plugins nor a type", ErrDropIns)
	case len(ours) == len(doc.plugins):
		return nil, ErrAlone
	case len(ours) == 0:
		return appended(doc, wanted)
	case len(ours) == 1 && ours[0] > 0:
		return replaced(doc, ours[0], wanted)
	}
	bare, err := Remove(conf)
	if err != nil {
		return nil, err
	}
	return Add(bare, entry)
}

// Remove returns conf without weir-cni, also in Multus' delegates: the same bytes
// if it is not in there, and what Add was given if Add put it there.
func Remove(conf []byte) ([]byte, error) {
	doc, err := parse(conf)
	if err != nil {
		return nil, err
	}
	if bare := doc.undelegated(); len(bare) != len(conf) {
		return Remove(bare)
	}
	ours := doc.ours()
	if len(ours) == 0 {
		return conf, nil
	}
	if len(ours) == len(doc.plugins) {
		return nil, ErrAlone
	}
	return cut(conf, doc.gapsWithout(ours)), nil
}

// gapsWithout are the bytes to take out, in order, for the chain to lack the
// plugins at ours, which must not be all. With each goes the comma before it; if
// the chain begins with them, the comma behind the last of those.
func (d document) gapsWithout(ours []int) []element {
	first := 0 // that stays
	for slices.Contains(ours, first) {
		first++
	}
	var gaps []element
	if first > 0 {
		gaps = append(gaps, element{start: d.plugins[0].start, end: d.plugins[first].start})
	}
	for _, i := range ours {
		if i > first {
			gaps = append(gaps, element{start: d.plugins[i-1].end, end: d.plugins[i].end})
		}
	}
	return gaps
}

// Has says whether weir-cni is in the chain.
func Has(conf []byte) (bool, error) {
	doc, err := parse(conf)
	if err != nil {
		return false, err
	}
	return len(doc.ours()) > 0, nil
}

// DropIn returns the entry as a file of its own.
func DropIn(entry Entry) ([]byte, error) {
	compact, err := entry.encode()
	if err != nil {
		return nil, err
	}
	text, err := layout{"\n  ", "\n"}.write(compact)
	if err != nil {
		return nil, err
	}
	return append(text, '\n'), nil
}

// fromSingle makes a chain of a single plugin's configuration.
func fromSingle(doc document, wanted []byte) ([]byte, error) {
	members, err := membersOf(doc.src)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	out.WriteByte('{')
	for _, m := range members {
		switch m.key {
		case "cniVersion", "cniVersions", "name":
			fmt.Fprintf(&out, "%q:%s,", m.key, doc.src[m.start:m.end])
		}
	}
	fmt.Fprintf(&out, `"plugins":[%s,%s]}`, doc.src, wanted)
	var indented bytes.Buffer
	if err := json.Indent(&indented, out.Bytes(), "", "  "); err != nil {
		return nil, fmt.Errorf("make a list of a single plugin: %w", err)
	}
	indented.WriteByte('\n')
	return indented.Bytes(), nil
}

// appended puts wanted behind the last plugin, as that one stands behind what is
// before it.
func appended(doc document, wanted []byte) ([]byte, error) {
	last := doc.plugins[len(doc.plugins)-1]
	text, err := layoutOf(doc.src[last.start:last.end]).write(wanted)
	if err != nil {
		return nil, err
	}
	before := doc.src[:last.start]
	gap := before[len(bytes.TrimRight(before, space)):]
	return slices.Concat(doc.src[:last.end], []byte{','}, gap, text, doc.src[last.end:]), nil
}

// replaced puts wanted in the place of the plugin at i, unless they mean the same.
func replaced(doc document, i int, wanted []byte) ([]byte, error) {
	old := doc.plugins[i]
	if same(doc.src[old.start:old.end], wanted) {
		return doc.src, nil
	}
	text, err := layoutOf(doc.src[old.start:old.end]).write(wanted)
	if err != nil {
		return nil, err
	}
	return slices.Concat(doc.src[:old.start], text, doc.src[old.end:]), nil
}

// IsDropIn says whether a plugin's file is ours.
func IsDropIn(conf []byte) bool {
	var plugin struct {
		Type string `json:"type"`
	}
	return json.Unmarshal(conf, &plugin) == nil && plugin.Type == PluginType
}
