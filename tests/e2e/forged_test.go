package e2e

import (
	"context"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"testing"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/weirmesh/weir/agent/identity/identitytest"
)

// forgedDenied asks for certificates as one could who has got an agent's token, or none.
func forgedDenied(t *testing.T) {
	ns := newNamespace(t, captured())
	idle := func(name string) *corev1.Pod { return appPod(name, "sleep", "1h") }
	ended := onNode(appPod("ended", "sleep", "1ms"), 0)
	ended.Spec.RestartPolicy = corev1.RestartPolicyNever
	ended = create(t, ns, ended)
	pods := startAll(t, ns, onNode(idle("mine"), 0), onNode(idle("theirs"), 1),
		labelled(onNode(idle("plain"), 0), captureLabel, "disabled"), onNode(idle("deleted"), 0))
	mine, theirs, plain, deleted := pods[0], pods[1], pods[2], pods[3]
	for _, pod := range []*corev1.Pod{mine, theirs, deleted} {
		identified(t, pod)
	}
	ended = waitPod(t, ended, "to end", func(pod *corev1.Pod) bool { return pod.Status.Phase == corev1.PodSucceeded })
	remove(t, deleted)

	a := bed.Nodes[0].Name
	agent := as(t, agentName, agentOn(t, a))
	id := func(account string) string { return "spiffe://cluster.local/ns/" + ns + "/sa/" + account }
	for _, tt := range []struct {
		what   string
		client kubernetes.Interface
		pod    *corev1.Pod
		names  x509.CertificateRequest
		reason string // of the denial; empty: it is approved
	}{
		{"as the proxy of its own pod asks", agent, mine, x509.CertificateRequest{}, ""},
		{"with the identity that the pod has", agent, mine, called(id("default")), ""},
		{"for a pod of another node", agent, theirs, x509.CertificateRequest{}, "OtherNode"},
		{"for a pod that is not captured", agent, plain, x509.CertificateRequest{}, "PodNotCaptured"},
		{"for a pod that has ended", agent, ended, x509.CertificateRequest{}, "PodGone"},
		{"for a pod that was deleted", agent, deleted, x509.CertificateRequest{}, "PodGone"},
		{"with another service account's identity", agent, mine, called(id("admin")), "OtherIdentity"},
		{"with another trust domain's", agent, mine, called("spiffe://elsewhere.example/ns/" + ns + "/sa/default"), "WrongTrustDomain"},
		{"with two identities", agent, mine, called(id("default"), id("admin")), "ExtraNames"},
		{"with a name of the DNS", agent, mine, x509.CertificateRequest{DNSNames: []string{"back"}}, "ExtraNames"},
		{"with a token that is bound to no node", as(t, agentName, nil), mine, x509.CertificateRequest{}, "NotAnAgent"},
		{"as the cluster's administrator", bed.kube, mine, x509.CertificateRequest{}, "NotAnAgent"},
	} {
		t.Run(tt.what, func(t *testing.T) {
			made, err := tt.client.CertificatesV1().CertificateSigningRequests().Create(t.Context(), certificateRequest(t, tt.pod, tt.names, signerName), metav1.CreateOptions{})
			must(t, err)
			t.Cleanup(func() { dropRequest(t, made.Name) })
			if tt.reason == "" {
				approved(t, made.Name, id("default"))
				return
			}
			refused(t, made.Name, tt.reason)
		})
	}
	_, err := agent.CertificatesV1().CertificateSigningRequests().Create(t.Context(),
		certificateRequest(t, mine, x509.CertificateRequest{}, certificatesv1.KubeAPIServerClientSignerName), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
	expectAnswer(t, "of another signer", err, ownSignerPolicy, "may ask the signer weirmesh.io/workload")
}

// called are the names of a request for these identities.
func called(ids ...string) x509.CertificateRequest {
	return x509.CertificateRequest{URIs: identitytest.URIs(ids...)}
}

// certificateRequest is what an agent asks for a pod with, under these names.
func certificateRequest(t *testing.T, pod *corev1.Pod, names x509.CertificateRequest, signer string) *certificatesv1.CertificateSigningRequest {
	t.Helper()
	der := identitytest.Request(t, identitytest.Key(t, elliptic.P256()), names)
	return &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "e2e-", Annotations: map[string]string{
			podAnnotation: pod.Namespace + "/" + pod.Name, podUIDAnnotation: string(pod.UID),
		}},
		Spec: certificatesv1.CertificateSigningRequestSpec{
			SignerName: signer,
			Request:    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
			Usages:     []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageClientAuth, certificatesv1.UsageServerAuth},
		},
	}
}

// approved waits until a request is answered with a certificate of that identity.
func approved(t *testing.T, name, id string) {
	t.Helper()
	r := waitRequest(t, name, func(r *certificatesv1.CertificateSigningRequest) bool { return len(r.Status.Certificate) > 0 })
	got, err := identityIn(r)
	must(t, err)
	if got != id {
		t.Errorf("the certificate is for %s, want %s", got, id)
	}
}

// refused waits until a request is denied, for that reason, and logs what it says.
func refused(t *testing.T, name, reason string) {
	t.Helper()
	r := waitRequest(t, name, func(r *certificatesv1.CertificateSigningRequest) bool { return len(r.Status.Conditions) > 0 })
	c := r.Status.Conditions[0]
	if c.Type != certificatesv1.CertificateDenied || c.Reason != reason || c.Message == "" || len(r.Status.Conditions) > 1 || len(r.Status.Certificate) > 0 {
		t.Errorf("the request is %+v, want Denied for %s", r.Status, reason)
	}
	t.Logf("%s: %s", c.Reason, c.Message)
}

func waitRequest(t *testing.T, name string, is func(*certificatesv1.CertificateSigningRequest) bool) *certificatesv1.CertificateSigningRequest {
	t.Helper()
	var found *certificatesv1.CertificateSigningRequest
	eventually(t, soon, "an answer to request "+name, func() error {
		r, err := bed.kube.CertificatesV1().CertificateSigningRequests().Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if !is(r) {
			return fmt.Errorf("it is %+v", r.Status)
		}
		found = r
		return nil
	})
	return found
}

func dropRequest(t *testing.T, name string) {
	ctx, cancel := context.WithTimeout(context.Background(), soon)
	defer cancel()
	if err := bed.kube.CertificatesV1().CertificateSigningRequests().Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		t.Error(err)
	}
}
