package controller

import (
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weirmesh/weir/agent/api/v1alpha1"
	"github.com/weirmesh/weir/agent/cluster"
	"github.com/weirmesh/weir/agent/decide"
	"github.com/weirmesh/weir/agent/model"
)

// policyObject is what is known of a TrafficPolicy.
type policyObject struct {
	namespace, name string

	policy     model.TrafficPolicy
	unread     error  // why policy is nothing, if it is
	version    string // resourceVersion
	generation int64
	service    gatewayv1.ObjectName             // that of the spec
	ancestors  []gatewayv1.PolicyAncestorStatus // the status
}

func toPolicy(p *v1alpha1.TrafficPolicy) policyObject {
	out := policyObject{
		namespace: p.Namespace, name: p.Name, version: p.ResourceVersion, generation: p.Generation,
		service: p.Spec.TargetRef.Name, ancestors: p.Status.Ancestors,
	}
	out.policy, out.unread = cluster.TrafficPolicy(p)
	return out
}

// fullName is "TrafficPolicy/namespace/name".
func (p policyObject) fullName() string { return "TrafficPolicy/" + p.namespace + "/" + p.name }

// accepted judges a policy.
func (v routeView) accepted(p policyObject) decide.Condition {
	if p.unread != nil { // a value that its CRD should not let pass
		return decide.Condition{Reason: decide.Invalid, Message: p.unread.Error()}
	}
	return decide.PolicyAccepted(p.policy, v.about, v.find)
}

// maxAncestors is how many entries a policy's status may have (PolicyStatus).
const maxAncestors = 16

// ancestorStatus is a policy's status as it should be, of how it is: our entry is the
// one about its Service, the others' are as they are. It reports whether there is a
// difference. What has changed is marked with the time. A status that others have
// filled is left alone, as the Gateway API wants it. Of proxies and counts see
// parentStatus.
func ancestorStatus(p policyObject, accepted decide.Condition, proxies *tally, counts bool, now time.Time) ([]gatewayv1.PolicyAncestorStatus, bool) {
	ref := gatewayv1.ParentReference{Group: new(gatewayv1.Group("")), Kind: new(gatewayv1.Kind("Service")), Name: p.service}
	entry := gatewayv1.PolicyAncestorStatus{AncestorRef: ref, ControllerName: ControllerName}
	at := -1
	var out []gatewayv1.PolicyAncestorStatus
	for _, e := range p.ancestors {
		switch {
		case e.ControllerName != ControllerName:
			out = append(out, e)
		case at < 0 && sameParent(p.namespace, ref, e.AncestorRef):
			entry, at = e, len(out)
			out = append(out, e)
		}
	}
	if at < 0 {
		if len(out) >= maxAncestors {
			return nil, false
		}
		at = len(out)
		out = append(out, entry)
	}
	entry.AncestorRef, entry.Conditions = ref, slices.Clone(entry.Conditions)
	setCondition(&entry.Conditions, string(gatewayv1.PolicyConditionAccepted), accepted, p.generation, now)
	if proxies != nil {
		setProgrammed(&entry.Conditions, proxies.policy(p, accepted), p.generation, counts, now)
	}
	out[at] = entry
	return out, !equality.Semantic.DeepEqual(out, p.ancestors)
}
