package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupVersion is of all kinds here.
var GroupVersion = schema.GroupVersion{Group: "policy.weirmesh.io", Version: "v1alpha1"}

// What the API server serves the kinds as.
const (
	TrafficPolicyResource       = "trafficpolicies"
	AuthorizationPolicyResource = "authorizationpolicies"
	PeerAuthenticationResource  = "peerauthentications"
)

// Install adds the kinds to a scheme. Its error is one that only a kind of the same
// name could cause.
func Install(scheme *runtime.Scheme) error {
	scheme.AddKnownTypes(GroupVersion, &TrafficPolicy{}, &TrafficPolicyList{}, &AuthorizationPolicy{}, &AuthorizationPolicyList{},
		&PeerAuthentication{}, &PeerAuthenticationList{})
	metav1.AddToGroupVersion(scheme, GroupVersion)
	return nil
}
