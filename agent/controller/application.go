package controller

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/agent/cluster"
	"github.com/weirmesh/weir/agent/identity"
)

// Reasons for which a request for a certificate is denied.
const (
	reasonNotAnAgent       = "NotAnAgent"       // who asks is not the agent of a node
	reasonOtherUsages      = "OtherUsages"      // the key is not for mTLS, or not for that alone
	reasonPodNotNamed      = "PodNotNamed"      // nobody says which pod it is for
	reasonPodGone          = "PodGone"          // there is no such pod any more, or it is ending
	reasonOtherNode        = "OtherNode"        // the pod runs on another node than who asks
	reasonNoServiceAccount = "NoServiceAccount" // the pod has no identity
	reasonPodNotCaptured   = "PodNotCaptured"   // no proxy could use the certificate
	reasonMalformed        = "Malformed"        // the request cannot be read, or is not signed by its key
	reasonOtherKey         = "OtherKey"         // the key is of another kind than ours
	reasonExtraNames       = "ExtraNames"       // the request wants other names than an ID
	reasonOtherIdentity    = "OtherIdentity"    // the request wants an ID that is not the pod's
	reasonWrongTrustDomain = "WrongTrustDomain" // …of another trust domain
)

// refusal is why a request is denied, and what to do.
type refusal struct{ reason, message string }

func refuse(reason, format string, args ...any) *refusal {
	return &refusal{reason, fmt.Sprintf(format, args...)}
}

// extraNode is where the API server notes the node of the pod that a token is bound to.
const extraNode = "authentication.kubernetes.io/node-name"

// mostTTL is how long a certificate is good for at most.
const mostTTL = identity.MaxTTL

// usages are those of every request.
var usages = []certificatesv1.KeyUsage{certificatesv1.UsageClientAuth, certificatesv1.UsageDigitalSignature, certificatesv1.UsageServerAuth}

// application is what a request asks for, and who asks. Node is the API server's word;
// the rest is the requester's.
type application struct {
	subject cluster.Subject
	node    string
	der     []byte
	ttl     time.Duration
}

// toApplication reads a request, if an agent could have made it. agent is the name of
// the user that all agents are.
func toApplication(r *certificatesv1.CertificateSigningRequest, agent string) (application, *refusal) {
	if r.Spec.Username != agent {
		return application{}, refuse(reasonNotAnAgent, "%s asks: certificates are for the agents of nodes, who are %s", r.Spec.Username, agent)
	}
	nodes := r.Spec.Extra[extraNode]
	if len(nodes) != 1 || nodes[0] == "" {
		return application{}, refuse(reasonNotAnAgent, "the token of who asks is bound to no node: it must be that of a pod of the DaemonSet; Kubernetes notes the node from 1.30 on")
	}
	wanted := slices.Compact(slices.Sorted(slices.Values(r.Spec.Usages)))
	if !slices.Equal(wanted, usages) {
		return application{}, refuse(reasonOtherUsages, "usages are %q: they must be %q", wanted, usages)
	}
	subject, err := cluster.ParseSubject(r.Annotations)
	if err != nil {
		return application{}, refuse(reasonPodNotNamed, "the request does not say which pod it is for: %v", err)
	}
	block, rest := pem.Decode(r.Spec.Request)
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(strings.TrimSpace(string(rest))) > 0 {
		return application{}, refuse(reasonMalformed, "spec.request is not one CERTIFICATE REQUEST in PEM")
	}
	ttl := mostTTL
	if s := r.Spec.ExpirationSeconds; s != nil {
		ttl = min(max(time.Duration(*s)*time.Second, cluster.LeastTTL), mostTTL)
	}
	return application{subject, nodes[0], block.Bytes, ttl}, nil
}

// holder is the identity of the pod that an application is for, if a certificate for it
// may be given to that node. pod is the one of that name, nil if there is none.
func (a application) holder(pod *corev1.Pod, td spiffeid.TrustDomain) (spiffeid.ID, *refusal) {
	name := a.subject.Namespace + "/" + a.subject.Name
	switch {
	case pod == nil:
		return spiffeid.ID{}, refuse(reasonPodGone, "there is no pod %s", name)
	case string(pod.UID) != a.subject.UID:
		return spiffeid.ID{}, refuse(reasonPodGone, "pod %s has the UID %s by now, the request names %s", name, pod.UID, a.subject.UID)
	case pod.Spec.NodeName != a.node:
		return spiffeid.ID{}, refuse(reasonOtherNode, "pod %s runs on node %q, and the agent of node %q asks: only that of its own node may", name, pod.Spec.NodeName, a.node)
	case pod.Status.Phase == corev1.PodSucceeded, pod.Status.Phase == corev1.PodFailed:
		return spiffeid.ID{}, refuse(reasonPodGone, "pod %s has ended: it is %s", name, pod.Status.Phase)
	case pod.DeletionTimestamp != nil:
		return spiffeid.ID{}, refuse(reasonPodGone, "pod %s is being deleted", name)
	case pod.Annotations[corev1.MirrorPodAnnotationKey] != "", pod.Spec.ServiceAccountName == "":
		return spiffeid.ID{}, refuse(reasonNoServiceAccount, "pod %s has no service account, hence no identity: static pods match no source of a policy", name)
	case pod.Spec.HostNetwork:
		return spiffeid.ID{}, refuse(reasonPodNotCaptured, "pod %s is on the host's network and cannot be captured", name)
	case !cluster.Captured(pod):
		return spiffeid.ID{}, refuse(reasonPodNotCaptured, "pod %s has no condition %s=True: the agent of its node publishes it when the pod is captured; see the pod's events, and the label weirmesh.io/capture", name, cluster.ConditionCaptured)
	}
	id, err := identity.Of(td, pod.Namespace, pod.Spec.ServiceAccountName)
	if err != nil {
		return spiffeid.ID{}, refuse(reasonNoServiceAccount, "%v", err)
	}
	return id, nil
}

// refusalOf is why a CA did not sign, if that is for something that the request says.
func (a application) refusalOf(err error, td spiffeid.TrustDomain) *refusal {
	var reason string
	switch {
	case errors.Is(err, identity.ErrOtherIdentity) && !a.claims(td):
		return refuse(reasonWrongTrustDomain, "%v: the trust domain is %s; agents and controller are to have the same options", err, td.Name())
	case errors.Is(err, identity.ErrOtherIdentity):
		reason = reasonOtherIdentity
	case errors.Is(err, identity.ErrOtherNames):
		reason = reasonExtraNames
	case errors.Is(err, identity.ErrKey):
		reason = reasonOtherKey
	case errors.Is(err, identity.ErrMalformed), errors.Is(err, identity.ErrSignature):
		reason = reasonMalformed
	default:
		return nil
	}
	return refuse(reason, "%v; weir-proxy's requests have a key of the curve P-256 and no name but the pod's SPIFFE ID", err)
}

// claims reports whether the ID that is asked for is of a trust domain.
func (a application) claims(td spiffeid.TrustDomain) bool {
	request, err := x509.ParseCertificateRequest(a.der)
	if err != nil || len(request.URIs) != 1 {
		return false
	}
	return request.URIs[0].Scheme == "spiffe" && request.URIs[0].Host == td.Name()
}
