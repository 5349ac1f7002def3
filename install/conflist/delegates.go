package conflist

import "slices"

// Multus runs whole configurations of other plugins, its "delegates". It copies
// one from the primary's file, and with it an entry of ours that is there. Our
// place is behind Multus and not among its delegates: a pod may choose another
// delegate for its first interface (the annotation v1.multus-cni.io/default-network),
// and would start uncaptured. In both places, weir-cni would run twice for a pod.

// delegatedGaps are the bytes to take out for no delegate of a plugin to have
// weir-cni in its chain, in order. A delegate that is nothing else stays.
func delegatedGaps(src []byte, plugin element) []element {
	var gaps []element
	for _, delegate := range delegatesOf(src, plugin) {
		doc, err := parse(src[delegate.start:delegate.end])
		if err != nil {
			continue // Multus' to complain about
		}
		ours := doc.ours()
		if len(ours) == 0 || len(ours) == len(doc.plugins) {
			continue
		}
		for _, gap := range doc.gapsWithout(ours) {
			gaps = append(gaps, element{start: delegate.start + gap.start, end: delegate.start + gap.end})
		}
	}
	return gaps
}

func delegatesOf(src []byte, plugin element) []element {
	members, err := membersOf(src[plugin.start:plugin.end])
	if err != nil {
		return nil
	}
	var out []element
	for _, m := range members {
		if m.key != "delegates" {
			continue
		}
		values, err := arrayOf(src, member{m.key, plugin.start + m.start, plugin.start + m.end})
		if err != nil {
			continue
		}
		out = append(out, values...)
	}
	return out
}

// delegates says whether a plugin runs others' configurations: from the file, or
// by a name in it.
func (d document) delegates() bool {
	for _, p := range d.elements() {
		members, err := membersOf(d.src[p.start:p.end])
		if err != nil {
			continue
		}
		if slices.ContainsFunc(members, func(m member) bool { return m.key == "delegates" || m.key == "clusterNetwork" }) {
			return true
		}
	}
	return false
}

// elements are the plugins of either form.
func (d document) elements() []element {
	if d.form == Single {
		return []element{{start: 0, end: len(d.src)}}
	}
	return d.plugins
}

// undelegated returns the source without weir-cni in any delegate.
func (d document) undelegated() []byte {
	var gaps []element
	for _, p := range d.elements() {
		if p.kind != PluginType {
			gaps = append(gaps, delegatedGaps(d.src, p)...)
		}
	}
	return cut(d.src, gaps)
}

// cut returns src without the gaps, which are in order; src itself if there are
// none.
func cut(src []byte, gaps []element) []byte {
	if len(gaps) == 0 {
		return src
	}
	out := slices.Clone(src)
	for _, gap := range slices.Backward(gaps) {
		out = slices.Delete(out, gap.start, gap.end)
	}
	return out
}
