package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// AuthorizationPolicy says who may call pods. It is enforced by the proxies of the pods
// that it selects, on the identity that the caller's certificate shows and on the port
// that the application listens on, whatever Service or address was dialled. A caller in
// plaintext has no identity.
//
// What a DENY policy matches is refused, whatever others say. A pod that an ALLOW policy
// selects refuses all that none of those allows; a pod that none selects allows the rest.
// What is refused is answered 403, a call of gRPC with status 7, PERMISSION_DENIED, and a
// connection that carries no HTTP is reset. A change ends within a second what goes on
// and is not allowed any more.
//
// A policy that cannot be read, which its schema should not have let pass, is not in force
// as it stands: of ALLOW it allows nothing, of DENY it denies everything.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:storageversion
// +kubebuilder:resource:path=authorizationpolicies,categories=weir
// +kubebuilder:printcolumn:name="Action",type=string,JSONPath=`.spec.action`
// +kubebuilder:printcolumn:name="Audit",type=boolean,JSONPath=`.spec.audit`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].reason`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type AuthorizationPolicy struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// What is wanted.
	// +required
	Spec AuthorizationPolicySpec `json:"spec"`

	// What has come of it.
	// +optional
	Status AuthorizationPolicyStatus `json:"status,omitempty"`
}

// AuthorizationPolicyList is a list of AuthorizationPolicies.
//
// +kubebuilder:object:root=true
type AuthorizationPolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []AuthorizationPolicy `json:"items"`
}

// AuthorizationPolicySpec is what an AuthorizationPolicy wants.
type AuthorizationPolicySpec struct {
	// The pods that it is for, by their labels, in the policy's own namespace. Default, and
	// of {}: all of them.
	// +optional
	PodSelector *PodSelector `json:"podSelector,omitempty"`

	// ALLOW: what a rule matches is allowed. DENY: it is refused.
	// +required
	// +kubebuilder:validation:Enum=ALLOW;DENY
	Action AuthorizationAction `json:"action"`

	// What it is about: whatever one of them matches. Default: nothing, so that a policy of
	// ALLOW without rules has everything refused that no other allows.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=32
	Rules []AuthorizationRule `json:"rules,omitempty"`

	// The policy refuses nothing, and allows nothing: what would be refused if it were in
	// force is logged (weir.policy.audited) and counted (weir_authorization_decisions_total
	// with verdict audit_deny). Default: false.
	// +optional
	Audit *bool `json:"audit,omitempty"`
}

// AuthorizationAction is what becomes of what a rule matches.
type AuthorizationAction string

// The actions.
const (
	Allow AuthorizationAction = "ALLOW"
	Deny  AuthorizationAction = "DENY"
)

// PodSelector selects pods by their labels, as a LabelSelector does: all that it says has
// to be so.
type PodSelector struct {
	// Labels with their values.
	// +optional
	// +kubebuilder:validation:MaxProperties=32
	MatchLabels map[string]LabelValue `json:"matchLabels,omitempty"`

	// What else has to be so of labels.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=32
	MatchExpressions []PodSelectorRequirement `json:"matchExpressions,omitempty"`
}

// LabelValue is a label's value.
//
// +kubebuilder:validation:MaxLength=63
// +kubebuilder:validation:Pattern=`^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$`
type LabelValue string

// PodSelectorRequirement is what has to be so of a label.
//
// +kubebuilder:validation:XValidation:rule="(self.operator in ['In', 'NotIn']) == (has(self.values) && size(self.values) > 0)",message="values are what In and NotIn need, and no other has"
type PodSelectorRequirement struct {
	// The label.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=317
	Key string `json:"key"`

	// In: it has one of the values. NotIn: it has none of them, or is not there. Exists: it
	// is there. DoesNotExist: it is not.
	// +required
	// +kubebuilder:validation:Enum=In;NotIn;Exists;DoesNotExist
	Operator PodSelectorOperator `json:"operator"`

	// The values, for In and NotIn.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=32
	Values []LabelValue `json:"values,omitempty"`
}

// PodSelectorOperator is what has to be so.
type PodSelectorOperator string

// The operators.
const (
	In           PodSelectorOperator = "In"
	NotIn        PodSelectorOperator = "NotIn"
	Exists       PodSelectorOperator = "Exists"
	DoesNotExist PodSelectorOperator = "DoesNotExist"
)

// AuthorizationRule matches what meets everything that it says; one that says nothing
// matches everything.
type AuthorizationRule struct {
	// Who calls: one of them (GEP-3779). A caller in plaintext is none of them, so that
	// neither an ALLOW nor a DENY rule with sources matches it. Default: anyone. An empty
	// list is no one.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=64
	Sources []AuthorizationSource `json:"sources,omitzero"`

	// What is to be seen of a connection. Default: anything.
	// +optional
	NetworkAttributes *NetworkAttributes `json:"networkAttributes,omitempty"`

	// What is asked for by HTTP. Of a connection that carries none, an ALLOW rule that has
	// this matches nothing, and a DENY rule everything. Default: anything, HTTP or not. {}
	// is anything that is HTTP.
	// +optional
	HTTP *HTTPAttributes `json:"http,omitempty"`
}

// AuthorizationSource is who calls.
//
// +kubebuilder:validation:XValidation:rule="has(self.serviceAccount) == (self.type == 'ServiceAccount')",message="serviceAccount is what type ServiceAccount needs, and no other has"
// +kubebuilder:validation:XValidation:rule="has(self.spiffe) == (self.type == 'SPIFFE')",message="spiffe is what type SPIFFE needs, and no other has"
type AuthorizationSource struct {
	// ServiceAccount: pods of a service account, of this mesh. SPIFFE: who has an identity,
	// of any trust domain that this mesh trusts.
	// +required
	// +kubebuilder:validation:Enum=ServiceAccount;SPIFFE
	Type AuthorizationSourceType `json:"type"`

	// The service account, of type ServiceAccount.
	// +optional
	ServiceAccount *ServiceAccountSource `json:"serviceAccount,omitempty"`

	// The identity, of type SPIFFE: spiffe://<trust domain>/ns/<namespace>/sa/<service
	// account>. The service account may be *: all of the namespace.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=640
	// +kubebuilder:validation:Pattern=`^spiffe://[a-z0-9._-]{1,255}/ns/[a-z0-9]([-a-z0-9]*[a-z0-9])?/sa/(\*|[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*)$`
	SPIFFE *string `json:"spiffe,omitempty"`
}

// AuthorizationSourceType is how a source is named.
type AuthorizationSourceType string

// The types of AuthorizationSource.
const (
	ServiceAccountType AuthorizationSourceType = "ServiceAccount"
	SPIFFEType         AuthorizationSourceType = "SPIFFE"
)

// ServiceAccountSource names a service account.
type ServiceAccountSource struct {
	// Its namespace. Default: the policy's own.
	// +optional
	Namespace *gatewayv1.Namespace `json:"namespace,omitempty"`

	// Its name, or *: all of the namespace.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^(\*|[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*)$`
	Name string `json:"name"`
}

// NetworkAttributes are what is to be seen of a connection.
type NetworkAttributes struct {
	// Ports of the application, not of a Service: one of them. Default: any.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=32
	// +kubebuilder:validation:items:Minimum=1
	// +kubebuilder:validation:items:Maximum=65535
	Ports []int32 `json:"ports,omitempty"`
}

// HTTPAttributes are what is asked for by HTTP, gRPC among it: all of it has to be so.
type HTTPAttributes struct {
	// Methods: one of them. Default: any.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:MaxLength=32
	// +kubebuilder:validation:items:Pattern=`^[A-Z][A-Z0-9-]*$`
	Methods []string `json:"methods,omitempty"`

	// Paths: one of them. Default: any. Both the path asked for and these are compared as
	// routes compare them: in their canonical form, without the query. That of a call of
	// gRPC is /package.Service/Method.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=32
	Paths []PathMatch `json:"paths,omitempty"`

	// Header fields: all of them. Default: any.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	Headers []HeaderMatch `json:"headers,omitempty"`
}

// PathMatch is a path, or all below one.
type PathMatch struct {
	// Exact: that path. PathPrefix: it and all below it, by whole elements.
	// +required
	// +kubebuilder:validation:Enum=Exact;PathPrefix
	Type PathMatchType `json:"type"`

	// The path.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=1024
	// +kubebuilder:validation:Pattern=`^/(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|%[1-9a-fA-F][0-9a-fA-F]|%0[1-9a-fA-F])*$`
	Value string `json:"value"`
}

// PathMatchType is how a path is compared.
type PathMatchType string

// The types of PathMatch.
const (
	ExactPath  PathMatchType = "Exact"
	PathPrefix PathMatchType = "PathPrefix"
)

// HeaderMatch is a header field with its whole value, exactly. If a request has it several
// times, an ALLOW rule matches only if all have the value, and a DENY rule if one has.
//
// +kubebuilder:validation:XValidation:rule="self.name.lowerAscii() != 'host'",message="host is no header field of HTTP/2"
type HeaderMatch struct {
	// The field's name, in any case.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=256
	// +kubebuilder:validation:Pattern=`^[A-Za-z0-9!#$%&'*+\-.^_\x60|~]+$`
	Name string `json:"name"`

	// Its value.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=4096
	Value string `json:"value"`
}

// AuthorizationPolicyStatus is what has come of an AuthorizationPolicy.
type AuthorizationPolicyStatus struct {
	// Accepted has one of the reasons Accepted and Invalid. Programmed says how many proxies
	// have acknowledged the policy as it is now, of those of the pods that it selects.
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=8
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}
