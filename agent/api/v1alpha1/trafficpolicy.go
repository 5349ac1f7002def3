package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// TrafficPolicy says how the proxies of clients treat a Service: which of its
// endpoints they choose, which they leave alone for a while, how long they wait, what
// they try again, and how much they send. It is a Direct policy of the Gateway API
// (GEP-2648): it is about that one Service, wherever it is dialled and from whichever
// namespace, by itself or as a backend of a route. What a route's own rule says goes
// before what the policy says. Each client pod's proxy counts by itself; what
// rateLimit.perClient says, that of each pod of the Service.
//
// Of two policies for one Service the older one is in force, of two of one age that
// whose name comes first; the other's status says Conflicted.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:storageversion
// +kubebuilder:resource:path=trafficpolicies,categories=weir
// +kubebuilder:metadata:labels="gateway.networking.k8s.io/policy=Direct"
// +kubebuilder:printcolumn:name="Service",type=string,JSONPath=`.spec.targetRef.name`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.ancestors[?(@.controllerName=="weirmesh.io/mesh-controller")].conditions[?(@.type=="Accepted")].reason`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type TrafficPolicy struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// What is wanted.
	// +required
	Spec TrafficPolicySpec `json:"spec"`

	// What has come of it. Weir's entry is that of the controller
	// weirmesh.io/mesh-controller, and its ancestor is the Service. Its condition
	// Accepted has one of the reasons Accepted, TargetNotFound, Conflicted, Invalid; its
	// condition Programmed says how many proxies have acknowledged the policy as it is
	// now, of those that it governs.
	// +optional
	Status gatewayv1.PolicyStatus `json:"status,omitempty"`
}

// TrafficPolicyList is a list of TrafficPolicies.
//
// +kubebuilder:object:root=true
type TrafficPolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []TrafficPolicy `json:"items"`
}

// TrafficPolicySpec is what a TrafficPolicy wants. What is left out is as it is
// without a policy.
type TrafficPolicySpec struct {
	// The Service that the policy is about, all its ports, in the policy's own
	// namespace. One of type ExternalName has no endpoints to treat.
	// +required
	TargetRef ServiceReference `json:"targetRef"`

	// Which endpoint gets a request, or a connection that carries no HTTP.
	// +optional
	LoadBalancer *LoadBalancer `json:"loadBalancer,omitempty"`

	// Which endpoints are left alone because they fail. Default: it is on, with the
	// defaults of its fields.
	// +optional
	OutlierDetection *OutlierDetection `json:"outlierDetection,omitempty"`

	// How many connections there may be, and how many HTTP requests under way. Default:
	// any number.
	// +optional
	CircuitBreaker *CircuitBreaker `json:"circuitBreaker,omitempty"`

	// Which failed HTTP requests are tried again, where an HTTPRoute's rule does not
	// say (HTTPRoute's field of the same name, where its CRD has it). Default: only
	// those that never reached an endpoint. A request that reached one is tried again
	// only if its method is idempotent (RFC 9110, section 9.2.2).
	// +optional
	Retry *Retry `json:"retry,omitempty"`

	// How many HTTP requests may be retries, whoever asked for them (GEP-3388).
	// +optional
	RetryConstraint *RetryConstraint `json:"retryConstraint,omitempty"`

	// How long HTTP requests may take.
	// +optional
	Timeouts *Timeouts `json:"timeouts,omitempty"`

	// How many HTTP requests each client may send in a time. What is too many is answered
	// 429, with when to come back. Default: any number.
	// +optional
	RateLimit *RateLimit `json:"rateLimit,omitempty"`
}

// ServiceReference names a Service in the namespace of the object that it is in.
type ServiceReference struct {
	// The core group. Default: it.
	// +optional
	// +kubebuilder:validation:Enum=""
	Group *string `json:"group,omitempty"`

	// Service. Default: Service.
	// +optional
	// +kubebuilder:validation:Enum=Service
	Kind *string `json:"kind,omitempty"`

	// The Service's name.
	// +required
	Name gatewayv1.ObjectName `json:"name"`
}

// LoadBalancer says which endpoint gets a request.
//
// +kubebuilder:validation:XValidation:rule="has(self.consistentHash) == (has(self.type) && self.type == 'ConsistentHash')",message="consistentHash is what type ConsistentHash needs, and no other has"
// +kubebuilder:validation:XValidation:rule="!has(self.slowStart) || !has(self.type) || self.type != 'ConsistentHash'",message="slowStart and type ConsistentHash exclude each other"
type LoadBalancer struct {
	// LeastRequest: of two random endpoints that with fewer requests under way.
	// RoundRobin: one after the other. Random: any. ConsistentHash: always the same
	// one for what consistentHash names, as long as it is there (Maglev). Default:
	// LeastRequest. A Service with sessionAffinity ClientIP keeps each client pod at
	// the endpoint that this chose first.
	// +optional
	// +kubebuilder:validation:Enum=LeastRequest;RoundRobin;Random;ConsistentHash
	Type *LoadBalancerType `json:"type,omitempty"`

	// What ConsistentHash looks at.
	// +optional
	ConsistentHash *ConsistentHash `json:"consistentHash,omitempty"`

	// How a new endpoint comes to its full share. Default: at once.
	// +optional
	SlowStart *SlowStart `json:"slowStart,omitempty"`
}

// LoadBalancerType is how an endpoint is chosen.
type LoadBalancerType string

// The types of LoadBalancer.
const (
	LeastRequest          LoadBalancerType = "LeastRequest"
	RoundRobin            LoadBalancerType = "RoundRobin"
	Random                LoadBalancerType = "Random"
	ConsistentHashBalance LoadBalancerType = "ConsistentHash"
)

// ConsistentHash is what requests have in common that go to one endpoint.
//
// +kubebuilder:validation:XValidation:rule="has(self.header) == (self.type == 'Header')",message="header is what type Header needs, and no other has"
// +kubebuilder:validation:XValidation:rule="has(self.cookie) == (self.type == 'Cookie')",message="cookie is what type Cookie needs, and no other has"
type ConsistentHash struct {
	// SourceIP: the address of the client pod. Header: a header field of the request.
	// Cookie: a cookie of the request. A request that has none goes where
	// LeastRequest would send it.
	// +required
	// +kubebuilder:validation:Enum=SourceIP;Header;Cookie
	Type ConsistentHashType `json:"type"`

	// The header field, of type Header.
	// +optional
	Header *HashHeader `json:"header,omitempty"`

	// The cookie, of type Cookie. It is the application's: no proxy sets one.
	// +optional
	Cookie *HashCookie `json:"cookie,omitempty"`
}

// ConsistentHashType is what ConsistentHash looks at.
type ConsistentHashType string

// The types of ConsistentHash.
const (
	SourceIP ConsistentHashType = "SourceIP"
	Header   ConsistentHashType = "Header"
	Cookie   ConsistentHashType = "Cookie"
)

// HashHeader names a header field.
type HashHeader struct {
	// The field's name, in any case (RFC 9110, section 5.1). If it is there several
	// times the first one counts.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=256
	// +kubebuilder:validation:Pattern=`^[A-Za-z0-9!#$%&'*+\-.^_\x60|~]+$`
	Name string `json:"name"`
}

// HashCookie names a cookie.
type HashCookie struct {
	// The cookie's name, exactly (RFC 6265, section 4.1.1).
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=256
	// +kubebuilder:validation:Pattern=`^[A-Za-z0-9!#$%&'*+\-.^_\x60|~]+$`
	Name string `json:"name"`
}

// SlowStart is how a new endpoint comes to its full share.
type SlowStart struct {
	// In this time, evenly. From 1ms to 1h.
	// +required
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('1ms') && duration(self) <= duration('1h')",message="must be from 1ms to 1h"
	Window gatewayv1.Duration `json:"window"`
}

// OutlierDetection says which endpoints are ejected: left alone for a while, unless
// no other is left.
type OutlierDetection struct {
	// After so many failures in a row an endpoint is ejected: answers of 5xx, or
	// connections that fail. 0: none ever is. Default: 5.
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000
	ConsecutiveErrors *int32 `json:"consecutiveErrors,omitempty"`

	// For how long the first time. The n-th time takes n times as long, at most 5m or,
	// if that is longer, this. From 1s to 1h. Default: 30s.
	// +optional
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('1s') && duration(self) <= duration('1h')",message="must be from 1s to 1h"
	BaseEjectionTime *gatewayv1.Duration `json:"baseEjectionTime,omitempty"`

	// Of the Service's endpoints at most this share is ejected at a time, and never
	// all. Default: 50.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100
	MaxEjectionPercent *int32 `json:"maxEjectionPercent,omitempty"`
}

// CircuitBreaker bounds what one client pod has under way at a port of the Service.
// What is more is answered 503 at once; a connection that carries no HTTP is reset.
//
// +kubebuilder:validation:XValidation:rule="!has(self.maxPendingRequests) || has(self.maxConnections)",message="maxPendingRequests is about what waits where maxConnections says how many connections there are"
type CircuitBreaker struct {
	// Open connections to the Service's endpoints, idle ones among them, whatever they
	// carry. An idle one is closed where one to another endpoint is needed. Many requests
	// of HTTP/2 go by one connection: as many as the endpoint takes. Default: any number.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000000
	MaxConnections *int32 `json:"maxConnections,omitempty"`

	// HTTP requests, and connections that carry no HTTP, that wait for a connection while
	// maxConnections are in use: for at most 5s, or a request's timeout. 0: none waits.
	// Default: 1024.
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000000
	MaxPendingRequests *int32 `json:"maxPendingRequests,omitempty"`

	// HTTP requests. Default: any number.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000000
	MaxParallelRequests *int32 `json:"maxParallelRequests,omitempty"`

	// Retries among them; a request that would need one more fails as it did. Default:
	// what retryConstraint allows.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000000
	MaxParallelRetries *int32 `json:"maxParallelRetries,omitempty"`
}

// Retry is which failed requests are tried again.
type Retry struct {
	// How often, not counting the first time. Default: 1.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=10
	Attempts *int32 `json:"attempts,omitempty"`

	// The statuses, 5xx, that count as failures, beside an endpoint that does not
	// answer. Default: 500, 502, 503 and 504.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:Minimum=500
	// +kubebuilder:validation:items:Maximum=599
	Codes []int32 `json:"codes,omitempty"`

	// How long before the first retry, at most; each further one waits for twice as
	// long, less a random part. Up to 10s. Default: 25ms.
	// +optional
	// +kubebuilder:validation:XValidation:rule="duration(self) <= duration('10s')",message="must be at most 10s"
	Backoff *gatewayv1.Duration `json:"backoff,omitempty"`
}

// RetryConstraint bounds retries by the traffic there is.
type RetryConstraint struct {
	// A share of the requests.
	// +optional
	Budget *RetryBudget `json:"budget,omitempty"`
}

// RetryBudget is a share of the requests.
type RetryBudget struct {
	// At most this share of the requests that a client pod has under way at a port of
	// the Service are retries; 3 are always allowed. Default: 20.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100
	Percent *int32 `json:"percent,omitempty"`
}

// Timeouts bound how long requests take.
type Timeouts struct {
	// Of a whole request, all attempts together, where an HTTPRoute's rule does not
	// say; after that it is answered 504. A rule that says 0s has none. 0s: none. Up to
	// 24h. Default: none.
	// +optional
	// +kubebuilder:validation:XValidation:rule="duration(self) <= duration('24h')",message="must be at most 24h"
	Request *gatewayv1.Duration `json:"request,omitempty"`
}

// RateLimit is a token bucket.
//
// +kubebuilder:validation:XValidation:rule="!has(self.clientBy) || (has(self.perClient) && self.perClient)",message="clientBy is about what perClient counts"
type RateLimit struct {
	// How many requests in an interval, evenly.
	// +required
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000000
	Count int32 `json:"count"`

	// The interval. From 1ms to 1h.
	// +required
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('1ms') && duration(self) <= duration('1h')",message="must be from 1ms to 1h"
	Interval gatewayv1.Duration `json:"interval"`

	// How many at once, after a time with fewer. Default: as many as count.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000000
	Burst *int32 `json:"burst,omitempty"`

	// Who counts. false: the proxy of each client pod, what that pod sends to a port of
	// the Service. true: the proxy of each pod of the Service, what each client sends to a
	// port of that pod, with a proxy of its own or without. It keeps count of 4096 clients;
	// for one more it forgets that which asked longest ago. Of several Services
	// with such a limit for one port of a pod, the oldest policy's is in force. Default:
	// false.
	// +optional
	PerClient *bool `json:"perClient,omitempty"`

	// What perClient takes for one client. Address: each address. Identity: each identity
	// that callers show by mTLS, which is a service account's, all its pods together; who
	// shows none is counted by its address. Default: Address.
	// +optional
	// +kubebuilder:validation:Enum=Address;Identity
	ClientBy *ClientBy `json:"clientBy,omitempty"`
}

// ClientBy is what a client is known by.
type ClientBy string

// What a client may be known by.
const (
	ByAddress  ClientBy = "Address"
	ByIdentity ClientBy = "Identity"
)
