package controller

import (
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weirmesh/weir/agent/api/v1alpha1"
	"github.com/weirmesh/weir/agent/cluster"
	"github.com/weirmesh/weir/agent/decide"
)

// authzObject is what is known of an AuthorizationPolicy or a PeerAuthentication.
type authzObject struct {
	kind, namespace, name string

	closes     string // what comes of it if it could not be read
	unread     error  // why it is not in force as it stands, if it is not
	version    string // resourceVersion
	generation int64
	conditions []metav1.Condition // the status
}

func toAuthz(p *v1alpha1.AuthorizationPolicy) authzObject {
	out := authzObject{
		kind: "AuthorizationPolicy", namespace: p.Namespace, name: p.Name,
		version: p.ResourceVersion, generation: p.Generation, conditions: p.Status.Conditions,
		closes: "the pods that it selects refuse what it may be about",
	}
	_, out.unread = cluster.AuthorizationPolicy(p)
	return out
}

func toPeerAuth(p *v1alpha1.PeerAuthentication) authzObject {
	out := authzObject{
		kind: "PeerAuthentication", namespace: p.Namespace, name: p.Name,
		version: p.ResourceVersion, generation: p.Generation, conditions: p.Status.Conditions,
		closes: "the pods that it may be about refuse plaintext",
	}
	_, out.unread = cluster.PeerAuthentication(p)
	return out
}

// fullName is as in "AuthorizationPolicy/namespace/name".
func (p authzObject) fullName() string { return p.kind + "/" + p.namespace + "/" + p.name }

// accepted judges a policy. It needs nothing else that is there.
func (p authzObject) accepted() decide.Condition {
	if p.unread != nil { // a value that its CRD should not let pass
		return decide.Condition{Reason: decide.Invalid, Message: p.unread.Error() + "; until that is right, " + p.closes}
	}
	return decide.Condition{True: true, Reason: decide.Accepted}
}

// authzStatus is a policy's status as it should be, of how it is. It reports whether
// there is a difference. Of proxies and counts see parentStatus. What refuses because it
// could not be read is programmed like what could.
func authzStatus(p authzObject, proxies *tally, counts bool, now time.Time) ([]metav1.Condition, bool) {
	out := slices.Clone(p.conditions)
	setCondition(&out, string(gatewayv1.PolicyConditionAccepted), p.accepted(), p.generation, now)
	if proxies != nil {
		setProgrammed(&out, proxies.programmed(p.fullName(), "", p.generation), p.generation, counts, now)
	}
	return out, !equality.Semantic.DeepEqual(out, p.conditions)
}

// authzSettled is routeSettled for such a policy.
func (t *tally) authzSettled(p authzObject) bool {
	return t == nil || t.programmed(p.fullName(), "", p.generation).status == metav1.ConditionTrue
}
