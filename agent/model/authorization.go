package model

import (
	"slices"

	"github.com/weirmesh/weir/proxy/authz"
)

// AuthorizationPolicy is what somebody wants of the callers of pods in the same
// namespace.
type AuthorizationPolicy struct {
	Namespace, Name string
	Generation      int64    // that of the spec; 0: unknown
	Selector        Selector // of pods
	Policy          authz.Policy
}

// ID is "namespace/name".
func (p AuthorizationPolicy) ID() string { return p.Namespace + "/" + p.Name }

// FullName is "AuthorizationPolicy/namespace/name".
func (p AuthorizationPolicy) FullName() string { return "AuthorizationPolicy/" + p.ID() }

// Selector are conditions on labels, all of which must be met; none: all pods.
type Selector []Requirement

// Requirement is a condition on a label.
type Requirement struct {
	Key      string
	Operator Operator
	Values   []string // of In and NotIn
}

// Operator is what is asked of a label.
type Operator string

// The operators, as Kubernetes has them.
const (
	In           Operator = "In"
	NotIn        Operator = "NotIn" // or it is not there
	Exists       Operator = "Exists"
	DoesNotExist Operator = "DoesNotExist"
)

// Matches reports whether labels meet all conditions. One that is unknown is not met.
func (s Selector) Matches(labels map[string]string) bool {
	return !slices.ContainsFunc(s, func(r Requirement) bool { return !r.met(labels) })
}

func (r Requirement) met(labels map[string]string) bool {
	value, there := labels[r.Key]
	switch r.Operator {
	case In:
		return there && slices.Contains(r.Values, value)
	case NotIn:
		return !there || !slices.Contains(r.Values, value)
	case Exists:
		return there
	case DoesNotExist:
		return !there
	}
	return false
}
