package cluster

import (
	"errors"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/agent/model"
)

// What an agent and the controller say to each other by way of the API server.
const (
	// SignerName is who signs for pods (CertificateSigningRequest, spec.signerName).
	SignerName = model.Prefix + "workload"
	// ConditionCaptured is the condition in a pod's status by which the agent of its
	// node says whether the pod is captured.
	ConditionCaptured corev1.PodConditionType = model.Prefix + "Captured"
	// RootsBundle is the ClusterTrustBundle of the roots that proxies trust. Its name
	// begins as its signer's has to.
	RootsBundle = "weirmesh.io:workload:weir"
	// RootsConfigMap, in Weir's namespace, has them under RootsKey where the cluster
	// serves no ClusterTrustBundle.
	RootsConfigMap = "weir-roots"
	RootsKey       = "ca.crt"
)

// Annotations of a request for a certificate, which name the pod that it is for. They
// are the requester's word.
const (
	annotationPod = model.Prefix + "pod"     // "namespace/name"
	annotationUID = model.Prefix + "pod-uid" // its metadata.uid
)

// Subject is the pod that a request for a certificate names.
type Subject struct{ Namespace, Name, UID string }

// Annotations say it, in a request.
func (s Subject) Annotations() map[string]string {
	return map[string]string{annotationPod: s.Namespace + "/" + s.Name, annotationUID: s.UID}
}

// ParseSubject reads the annotations of a request.
func ParseSubject(annotations map[string]string) (Subject, error) {
	namespace, name, ok := strings.Cut(annotations[annotationPod], "/")
	s := Subject{namespace, name, annotations[annotationUID]}
	if !ok || s.Namespace == "" || s.Name == "" || strings.Contains(s.Name, "/") || s.UID == "" {
		return Subject{}, errors.New("the annotations " + annotationPod + ", namespace/name, and " + annotationUID + " are needed")
	}
	return s, nil
}

// Captured reports whether a pod's status says that it is captured.
func Captured(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == ConditionCaptured {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}
