package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// PeerAuthentication says whether those who call pods have to show who they are, by
// mTLS. It is enforced by the proxies of the pods that it selects, on the port that the
// application listens on.
//
// What it says of a port goes before what it says of all; one with a podSelector before
// one of its namespace, and that before one of the mesh, which is one without a podSelector
// in Weir's own namespace. Of several of the same reach the oldest counts, then the first
// by name. Where nobody says anything, it is Permissive.
//
// A policy that cannot be read, which its schema should not have let pass, is Strict for
// all that it may be about.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:storageversion
// +kubebuilder:resource:path=peerauthentications,categories=weir
// +kubebuilder:printcolumn:name="Mode",type=string,JSONPath=`.spec.mode`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].reason`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type PeerAuthentication struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// What is wanted.
	// +required
	Spec PeerAuthenticationSpec `json:"spec"`

	// What has come of it.
	// +optional
	Status PeerAuthenticationStatus `json:"status,omitempty"`
}

// PeerAuthenticationList is a list of PeerAuthentications.
//
// +kubebuilder:object:root=true
type PeerAuthenticationList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []PeerAuthentication `json:"items"`
}

// PeerAuthenticationSpec is what a PeerAuthentication wants.
//
// +kubebuilder:validation:XValidation:rule="has(self.mode) || has(self.ports)",message="neither mode nor ports: it says nothing"
// +kubebuilder:validation:XValidation:rule="!has(self.ports) || has(self.podSelector) && ((has(self.podSelector.matchLabels) && size(self.podSelector.matchLabels) > 0) || (has(self.podSelector.matchExpressions) && size(self.podSelector.matchExpressions) > 0))",message="ports are those of some pods: podSelector has to say of which"
type PeerAuthenticationSpec struct {
	// The pods that it is for, by their labels, in the policy's own namespace. Default, and
	// of {}: all of them; in Weir's own namespace, weir-system, all of the mesh.
	// +optional
	PodSelector *PodSelector `json:"podSelector,omitempty"`

	// Strict: callers in plaintext are refused, but for kubelet's probes. Permissive: who
	// comes with mTLS has an identity, and who comes in plaintext none. Disable: plaintext
	// is what is expected; who comes with mTLS all the same is taken as under Permissive.
	// Default: what a policy of wider reach says.
	// +optional
	Mode *PeerMode `json:"mode,omitempty"`

	// Ports of the application, not of a Service, that are treated otherwise. It needs a
	// podSelector that selects by something.
	// +optional
	// +listType=map
	// +listMapKey=port
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=32
	Ports []PeerPort `json:"ports,omitempty"`
}

// PeerPort is how callers of a port are treated.
type PeerPort struct {
	// The application's port.
	// +required
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	Port int32 `json:"port"`

	// As the mode of all ports.
	// +required
	Mode PeerMode `json:"mode"`
}

// PeerMode is what is demanded of callers.
//
// +kubebuilder:validation:Enum=Permissive;Strict;Disable
type PeerMode string

// The modes.
const (
	Permissive PeerMode = "Permissive"
	Strict     PeerMode = "Strict"
	Disable    PeerMode = "Disable"
)

// PeerAuthenticationStatus is what has come of a PeerAuthentication.
type PeerAuthenticationStatus struct {
	// Accepted has one of the reasons Accepted and Invalid. Programmed says how many proxies
	// have acknowledged the policy as it is now, of those of the pods that it selects.
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=8
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}
