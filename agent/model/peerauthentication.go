package model

import (
	"time"

	"github.com/weirmesh/weir/proxy/route"
)

// PeerAuthentication is what somebody demands of the callers of pods in the same
// namespace, or, without a selector in Weir's own namespace, of all.
type PeerAuthentication struct {
	Namespace, Name string
	Created         time.Time // in UTC, to the second; zero: unknown, older than any
	Generation      int64     // that of the spec; 0: unknown
	Selector        Selector  // of pods

	Mode   *route.PeerMode           // of all ports; nil: what one of wider reach says
	Ports  map[uint16]route.PeerMode // where it is another
	Closed bool                      // it could not be read: Strict, whatever others say
}

// ID is "namespace/name".
func (p PeerAuthentication) ID() string { return p.Namespace + "/" + p.Name }

// FullName is "PeerAuthentication/namespace/name".
func (p PeerAuthentication) FullName() string { return "PeerAuthentication/" + p.ID() }

// ExpectsPlaintext reports whether it says Disable anywhere.
func (p PeerAuthentication) ExpectsPlaintext() bool {
	if p.Mode != nil && *p.Mode == route.Disable {
		return true
	}
	for _, mode := range p.Ports {
		if mode == route.Disable {
			return true
		}
	}
	return false
}
