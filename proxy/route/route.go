// Package route says where a connection may go: what the agent knows of one
// original destination. Pure; it neither picks an endpoint (balance) nor dials.
package route

import "net/netip"

// Destination is what an original destination stands for. The zero value is
// "not a Service": the connection goes where it was going.
type Destination struct {
	Service   string     // "namespace/name"; empty: not a Service
	Endpoints []Endpoint // ready ones; none on a Service: no_endpoints
}

// Endpoint is one ready pod behind a Service port.
type Endpoint struct {
	Addr netip.AddrPort
	Pod  string // "namespace/name", empty if unknown
}
