// Package v1alpha1 has Weir's own kinds, policy.weirmesh.io/v1alpha1, as the API
// server keeps them. They say what no standard has a word for; where the Gateway API
// or the proxies that people know have one, it is that word.
//
// The CustomResourceDefinitions in manifests/base/crds and the deep copies are
// generated from the types, their comments and their markers (.ci/generate). No type
// has a default that the API server fills in: an object that does not say is one that
// takes what Weir does, in each of its versions.
//
// Nothing here acts. Package agent/cluster reads objects, cuts them down to
// agent/model, and refuses in a directory what the CRDs would.
//
// +kubebuilder:object:generate=true
// +groupName=policy.weirmesh.io
package v1alpha1
