package model

import (
	"net/netip"
	"time"
)

// Protocol is the transport protocol of a port.
type Protocol string

// Protocols of a port.
const (
	TCP  Protocol = "TCP"
	UDP  Protocol = "UDP"
	SCTP Protocol = "SCTP"
)

// Service is a Kubernetes Service.
type Service struct {
	Namespace, Name string
	ClusterIPs      []netip.Addr // at most one of each family; none: headless or External
	Ports           []ServicePort

	External bool          // of type ExternalName: another name for something elsewhere
	Local    bool          // internalTrafficPolicy Local: only endpoints on the client's node
	Affinity time.Duration // sessionAffinity ClientIP: how long it lasts; 0: none
}

// ID is "namespace/name".
func (s Service) ID() string { return s.Namespace + "/" + s.Name }

// ServicePort is one port of a Service. EndpointSlices refer to it by Name.
type ServicePort struct {
	Name        string // empty on a Service with a single port
	Port        uint16
	Protocol    Protocol
	AppProtocol string // what it carries, as KEP-3726 and IANA name it; empty: nobody says
}

// EndpointSlice is some of the endpoints behind a Service, all of one family.
type EndpointSlice struct {
	Namespace, Name string
	Service         string // name of the Service, in the same namespace
	Ports           []EndpointPort
	Endpoints       []Endpoint
}

// EndpointPort is where the endpoints of a slice serve the Service's port of
// that name: the target port, resolved.
type EndpointPort struct {
	Name     string
	Port     uint16
	Protocol Protocol
}

// Endpoint is one address of a slice. A slice may list several for an endpoint,
// but discovery.k8s.io/v1 gives no meaning to those after the first.
type Endpoint struct {
	Address netip.Addr
	Ready   bool
	// Draining endpoints are terminating but still serve: of use only while no
	// endpoint of the Service is ready.
	Draining bool
	Pod      string // "namespace/name"; empty if it is not a pod
	Node     string // empty if unknown
	Hints    *Hints // nil: none
}

// Hints say which clients an endpoint should serve: those on one of the nodes, or
// in one of the zones (KEP-2433, KEP-3015). Many endpoints have the same.
type Hints struct {
	Zones, Nodes []string
}
