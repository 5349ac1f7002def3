// Package route says where a connection or a request may go: what the agent knows
// of one original destination, the rules that govern it, and which of them a
// request meets. Pure: it neither picks an endpoint (balance) nor dials
// (upstream), and reads no byte from anywhere.
//
// The words and their meaning are the Gateway API's (v1.6, GAMMA). The agent
// orders the matches (package agent/decide); here the first that is met counts.
package route

import (
	"net/netip"
	"slices"
	"time"
)

// Destination is what an original destination stands for. The zero value is
// "not a Service": the connection goes where it was going.
type Destination struct {
	Service   string     // "namespace/name"; empty: not a Service
	Endpoints []Endpoint // ready ones; none on a Service: no_endpoints
	Protocol  Protocol   // what the Service's port is declared to carry
	Policy    *Policy    // of the Service; nil: defaults
	Routes    *Routes    // what governs the Service's port; nil: no route is attached
	Identity  string     // Endpoint.Identity of what is no Service
}

// Backend is the Service's port itself: where everything goes that no route
// governs.
func (d Destination) Backend() Backend {
	return Backend{Service: d.Service, Endpoints: d.Endpoints, Protocol: d.Protocol, Policy: d.Policy}
}

// Endpoint is one ready pod behind a Service port.
type Endpoint struct {
	Addr     netip.AddrPort
	Pod      string // "namespace/name", empty if unknown
	Workload string // "namespace/name" of what the pod is one of, empty if unknown
	Identity string // SPIFFE ID that it has to show, by mTLS; empty: it is spoken to in plain
}

// Probes are what the kubelet asks of a pod. It has no identity to show.
type Probes struct {
	From     []netip.Addr // the node's own
	Declared []Probe
}

// Probe is a request that a pod declares: GET of a target, or a call of gRPC's health
// service.
type Probe struct {
	Port   uint16
	Target string // path and query, as it stands in the request
	GRPC   bool
}

// healthCheck is what a probe of gRPC calls (github.com/grpc/grpc, doc/health-checking.md).
const healthCheck = "/grpc.health.v1.Health/Check"

// Of reports whether anything is declared that an address may ask of a port.
func (p Probes) Of(from netip.Addr, port uint16) bool {
	return slices.ContainsFunc(p.Declared, func(d Probe) bool { return d.Port == port }) && slices.Contains(p.From, from)
}

// Match reports whether a request is one that an address may make of a port. Nobody
// makes a tunnel of a probe.
func (p Probes) Match(from netip.Addr, port uint16, method, path, query []byte, upgrades bool) bool {
	if upgrades || !p.Of(from, port) {
		return false
	}
	target := string(path)
	if query != nil {
		target += "?" + string(query)
	}
	return slices.ContainsFunc(p.Declared, func(d Probe) bool {
		if d.GRPC {
			return d.Port == port && string(method) == "POST" && target == healthCheck
		}
		return d.Port == port && string(method) == "GET" && target == d.Target
	})
}

// PeerMode is what a port demands of its callers, as PeerAuthentication says.
type PeerMode uint8

// The modes.
const (
	// Permissive takes mTLS and plain connections.
	Permissive PeerMode = iota
	// Strict refuses plain ones.
	Strict
	// Disable has callers come in plain, and waits for nothing else. One that has not
	// heard of it yet is taken as it comes.
	Disable
)

// Protocol is what a port is declared to carry, by its appProtocol or its name.
type Protocol uint8

// The protocols that make a difference here.
const (
	Undeclared Protocol = iota // nobody says: it is looked at
	Opaque                     // passed on as it is
	HTTP                       // HTTP/1.x, or HTTP/2 if it begins so
	HTTP2                      // HTTP/2 with prior knowledge
)

// Kind is the kind of the routes that govern a port: all of one, since those of
// the weightier kind conflict with the others.
type Kind uint8

// The kinds, the weightiest first.
const (
	GRPCRoute Kind = iota + 1
	HTTPRoute
	TCPRoute
)

// Routes are all the rules of one Service port, for the clients of one namespace.
type Routes struct {
	Kind    Kind
	Matches []Match // in order of precedence; none for TCPRoute
	Rules   []Rule  // for TCPRoute there is one
}

// Match is one set of conditions, all of which a request must meet.
type Match struct {
	Rule    int    // whose match it is: index in Routes.Rules
	Path    Path   // the zero value: any
	Method  string // empty: any
	GRPC    *Method
	Headers []Value // names in lower case
	Query   []Value
}

// Path is a condition on the path, in its canonical form.
type Path struct {
	Kind   PathKind
	Value  string
	Regexp *Regexp // of PathRegexp, in place of Value
}

// PathKind is how a path is compared.
type PathKind uint8

// The ways. A prefix is one of whole path elements, without a trailing slash.
const (
	PathAny PathKind = iota
	PathExact
	PathPrefix
	PathRegexp
)

// Method is a GRPCRoute's condition on the method: empty parts match any.
type Method struct {
	Service, Method             string
	ServiceRegexp, MethodRegexp *Regexp // in place of the texts, for the whole of them
}

// Value is a condition on a header or a query parameter.
type Value struct {
	Name   string
	Value  string  // exact
	Regexp *Regexp // in place of Value, for the whole of it
}

// Rule is what happens to the requests that meet one of its matches.
type Rule struct {
	Route    string // "HTTPRoute/namespace/name"
	Name     string // the rule's own; may be empty
	Filters  Filters
	Backends []WeightedBackend // none, or weights of zero alone: 500, but for a redirect

	Timeout        *time.Duration // of the whole request, all attempts; 0: none; nil: the policy's
	BackendTimeout time.Duration  // of one attempt; 0: none
	Retry          *Retry         // nil: the policy's, or none but for what was never sent
}

// WeightedBackend gets its share of a rule's requests: Weight of the sum.
type WeightedBackend struct {
	Weight  uint32
	Backend Backend
	Filters Filters // after the rule's
}

// Backend is a Service's port.
type Backend struct {
	Service   string // "namespace/name"
	Endpoints []Endpoint
	Protocol  Protocol
	Policy    *Policy
	Invalid   bool // the reference is to nothing: its share is answered 500
}

// Filters are what a rule does to requests and answers.
type Filters struct {
	RequestHeaders, ResponseHeaders *HeaderChange
	Redirect                        *Redirect
	Rewrite                         *Rewrite
	Mirrors                         []Mirror
	CORS                            *CORS
	Invalid                         bool // a filter that cannot be resolved: 500, never skipped
}

// HeaderChange sets, adds and removes header fields, in that order. Names are in
// lower case.
type HeaderChange struct {
	Set, Add []Header
	Remove   []string
}

// Header is a field.
type Header struct{ Name, Value string }

// Redirect is answered in place of the backends. Empty parts are the request's.
type Redirect struct {
	Scheme, Hostname string
	Path             *PathChange
	Port             uint16 // 0: by the scheme if that is set, else the port that was dialled
	Status           int    // 301, 302, 303, 307 or 308
}

// Rewrite changes what the backend sees.
type Rewrite struct {
	Hostname string
	Path     *PathChange
}

// PathChange replaces the whole path, or the prefix that matched.
type PathChange struct {
	Prefix bool
	Value  string
}

// Mirror copies a share of the requests, Numerator in Denominator, to a backend
// whose answers nobody sees.
type Mirror struct {
	Backend                Backend
	Numerator, Denominator uint32
}

// CORS is the Gateway API's HTTPCORSFilter.
type CORS struct {
	AllowOrigins                              []string // "https://*.example.com", "*"
	AllowMethods, AllowHeaders, ExposeHeaders []string
	AllowCredentials                          bool
	MaxAge                                    int32 // seconds
}

// Retry is which failures are tried again, beyond those where nothing was sent.
type Retry struct {
	Attempts int           // not counting the first
	Codes    []uint16      // answers that count as failures, 5xx
	Backoff  time.Duration // before the first retry; doubled after each, with jitter
}

// Policy is a TrafficPolicy, as far as it is a proxy's business. Zero values are
// the defaults.
type Policy struct {
	Name      string // "namespace/name"
	Balance   Algorithm
	HashOn    HashSource
	HashName  string        // the header's or the cookie's
	SlowStart time.Duration // over which a new endpoint comes to its full share; 0: at once
	Affinity  time.Duration // sessionAffinity ClientIP; 0: none

	Ejection  Ejection
	Limits    Limits
	Retry     *Retry
	Budget    uint32        // retries, in percent of the requests that are under way; 0: 20
	Timeout   time.Duration // of a whole request whose Rule does not say; 0: none
	RateLimit *RateLimit
}

// Algorithm is how an endpoint is chosen.
type Algorithm uint8

// The algorithms.
const (
	LeastRequest Algorithm = iota // of two random ones, that with fewer requests
	RoundRobin
	Random
	ConsistentHash // Maglev
)

// HashSource is what ConsistentHash looks at.
type HashSource uint8

// The sources.
const (
	HashClient HashSource = iota // the client's address
	HashHeader
	HashCookie
)

// Ejection sets endpoints aside that fail. Off: Failures is negative.
type Ejection struct {
	Failures   int           // consecutive ones: 5xx, or no connection; 0: 5
	Base       time.Duration // how long for the first time, longer each time; 0: 30 s
	MaxPercent int           // of a backend's endpoints that may be set aside; 0: 50
}

// Limits bound what one proxy sends to a backend. 0: no limit, but of Pending.
type Limits struct {
	Connections int // open ones, idle ones too, of HTTP and of anything else
	Pending     int // requests, and connections, that wait for one when they are all in use; 0: none does
	Requests    int
	Retries     int
}

// RateLimit is a token bucket.
type RateLimit struct {
	Requests   uint32        // that many
	Per        time.Duration // in this time
	Burst      uint32        // 0: Requests
	PerClient  bool          // a bucket for each caller's address
	ByIdentity bool          // PerClient: or for its identity, if it has shown one
}
