package model

import (
	"time"

	"github.com/weirmesh/weir/proxy/route"
)

// TrafficPolicy is what somebody wants of the clients of a Service in the same
// namespace.
type TrafficPolicy struct {
	Namespace, Name string
	Created         time.Time // in UTC, to the second; zero: unknown, older than any
	Generation      int64     // that of the spec; 0: unknown
	Service         string    // name of the Service
	Policy          route.Policy
}

// ID is "namespace/name".
func (p TrafficPolicy) ID() string { return p.Namespace + "/" + p.Name }

// FullName is "TrafficPolicy/namespace/name".
func (p TrafficPolicy) FullName() string { return "TrafficPolicy/" + p.ID() }
