package balance

import (
	"encoding/binary"
	"net/netip"

	"github.com/cespare/xxhash/v2"

	"github.com/weirmesh/weir/proxy/route"
)

// places is the size of a table, a prime (Maglev, NSDI 2016, section 5.3). It is the
// same for any number of endpoints: in a table of another size every key has
// another place. Up to 655 endpoints have 100 places or more, so that their shares
// differ by 1 % at most.
const places = 65_537

// hashOf is the hash of what the policy looks at; 0: the request has none.
func hashOf(policy *route.Policy, key Key) uint64 {
	if policy.HashOn != route.HashClient {
		return key.Hash
	}
	if !key.Client.IsValid() {
		return 0
	}
	a := key.Client.As16()
	return HashOf(a[:])
}

// hashed is the endpoint that has the hash's place in the table or, if that one
// must not be chosen, the next.
func (c *choice) hashed(hash uint64) int {
	l := c.list
	if l.table == nil {
		l.table = maglev(l)
	}
	start := int(hash % places)
	for k := range places {
		if i := int(l.order[l.table[(start+k)%places]]); c.able(i) {
			return i
		}
	}
	return -1
}

// maglev fills a table with a list's places in byAddress (Maglev, NSDI 2016, section
// 3.4): each endpoint in turn takes the first free place of its own order of places.
// So all have the same number of places, and few change hands when endpoints come
// and go. It depends on the addresses alone: all proxies have the same table. Of
// more than 65,536 endpoints the last ones have no place, and the first has the one
// left over.
func maglev(l *endpointList) []uint16 {
	order := l.byAddress()
	type walk struct{ at, step uint64 }
	walks := make([]walk, len(order))
	for k, i := range order {
		offset, step := hashesOf(l.endpoints[i].addr)
		walks[k] = walk{offset % places, step%(places-1) + 1}
	}
	table := make([]uint16, places)
	taken := make([]bool, places)
	for filled := 0; ; {
		for k := range walks {
			w := &walks[k]
			for taken[w.at] {
				w.at = (w.at + w.step) % places
			}
			table[w.at], taken[w.at] = uint16(k), true
			if filled++; filled == places {
				return table
			}
		}
	}
}

// hashesOf are two hashes of an address that have nothing to do with each other.
func hashesOf(addr netip.AddrPort) (uint64, uint64) {
	a := addr.Addr().As16()
	text := binary.BigEndian.AppendUint16(a[:], addr.Port())
	return xxhash.Sum64(text), xxhash.Sum64(append(text, 1))
}
