package controller

import (
	"context"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	policyclient "github.com/weirmesh/weir/agent/api/client"
	"github.com/weirmesh/weir/agent/api/v1alpha1"
	"github.com/weirmesh/weir/agent/cluster"
	"github.com/weirmesh/weir/agent/decide"
)

// authzKind is a kind whose policies are about pods.
type authzKind struct {
	name   string
	closes string // what comes of a policy that could not be read
	// patch patches a policy's status.
	patch func(ctx context.Context, c policyclient.Interface, namespace, name string, patch []byte) error
}

var authorizationKind = &authzKind{
	name: "AuthorizationPolicy", closes: "the pods that it selects refuse what it may be about",
	patch: func(ctx context.Context, c policyclient.Interface, namespace, name string, patch []byte) error {
		return patchStatus(ctx, c.AuthorizationPolicies(namespace), name, patch)
	},
}

var peerKind = &authzKind{
	name: "PeerAuthentication", closes: "the pods that it may be about refuse plaintext",
	patch: func(ctx context.Context, c policyclient.Interface, namespace, name string, patch []byte) error {
		return patchStatus(ctx, c.PeerAuthentications(namespace), name, patch)
	},
}

// authzObject is what is known of an AuthorizationPolicy or a PeerAuthentication.
type authzObject struct {
	kind            *authzKind
	namespace, name string

	unread     error  // why it is not in force as it stands, if it is not
	version    string // resourceVersion
	generation int64
	conditions []metav1.Condition // the status
}

func toAuthz(p *v1alpha1.AuthorizationPolicy) authzObject {
	_, err := cluster.AuthorizationPolicy(p)
	return newAuthz(authorizationKind, p, p.Status.Conditions, err)
}

func toPeerAuth(p *v1alpha1.PeerAuthentication) authzObject {
	_, err := cluster.PeerAuthentication(p)
	return newAuthz(peerKind, p, p.Status.Conditions, err)
}

func newAuthz(kind *authzKind, o metav1.Object, conditions []metav1.Condition, unread error) authzObject {
	return authzObject{
		kind: kind, namespace: o.GetNamespace(), name: o.GetName(), unread: unread,
		version: o.GetResourceVersion(), generation: o.GetGeneration(), conditions: conditions,
	}
}

// fullName is as in "AuthorizationPolicy/namespace/name".
func (p authzObject) fullName() string { return p.kind.name + "/" + p.namespace + "/" + p.name }

// accepted judges a policy. It needs nothing else that is there.
func (p authzObject) accepted() decide.Condition {
	if p.unread != nil { // a value that its CRD should not let pass
		return decide.Condition{Reason: decide.Invalid, Message: p.unread.Error() + "; until that is right, " + p.kind.closes}
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
