package capture

import (
	"cmp"
	"net/netip"
	"slices"
)

// normal returns the Spec with each list sorted and without overlaps: the
// kernel refuses sets whose intervals overlap, and equal Specs are to give equal
// rules.
func normal(s Spec) Spec {
	s.ExcludeInboundPorts = mergeRanges(s.ExcludeInboundPorts)
	s.IncludeInboundPorts = mergeRanges(s.IncludeInboundPorts)
	s.ExcludeOutboundPorts = mergeRanges(s.ExcludeOutboundPorts)
	s.IncludeOutboundPorts = mergeRanges(s.IncludeOutboundPorts)
	s.ExcludeOutboundCIDRs = mergePrefixes(s.ExcludeOutboundCIDRs)
	s.IncludeOutboundCIDRs = mergePrefixes(s.IncludeOutboundCIDRs)
	s.ExcludeOutboundUIDs = mergeRanges(s.ExcludeOutboundUIDs)
	s.ExcludeOutboundGIDs = mergeRanges(s.ExcludeOutboundGIDs)
	s.ExcludeInterfaces = slices.Compact(slices.Sorted(slices.Values(s.ExcludeInterfaces)))
	return s
}

// mergeRanges sorts ranges and joins those that overlap. Neighbours stay apart:
// 80, 81 was asked for and is shown.
func mergeRanges[N uint16 | uint32](in []Range[N]) []Range[N] {
	sorted := slices.Clone(in)
	slices.SortFunc(sorted, func(a, b Range[N]) int {
		return cmp.Or(cmp.Compare(a.First, b.First), cmp.Compare(a.Last, b.Last))
	})
	var out []Range[N]
	for _, r := range sorted {
		if n := len(out); n > 0 && r.First <= out[n-1].Last {
			out[n-1].Last = max(out[n-1].Last, r.Last)
			continue
		}
		out = append(out, r)
	}
	return out
}

// mergePrefixes masks prefixes, sorts them and drops those inside another. Two
// prefixes either nest or are apart; shorter ones sort first.
func mergePrefixes(in []netip.Prefix) []netip.Prefix {
	var masked []netip.Prefix
	for _, p := range in {
		masked = append(masked, unmapped(p).Masked())
	}
	slices.SortFunc(masked, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	var out []netip.Prefix
	for _, p := range masked {
		if n := len(out); n > 0 && out[n-1].Overlaps(p) {
			continue
		}
		out = append(out, p)
	}
	return out
}

// unmapped turns ::ffff:10.0.0.0/104 into 10.0.0.0/8: on the wire such
// addresses are IPv4.
func unmapped(p netip.Prefix) netip.Prefix {
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		return netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p
}
