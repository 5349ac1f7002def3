package e2e

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"testing"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// What agents and the controller say to each other by way of the API server; the tests
// have words of their own for it.
const (
	signerName        = "weirmesh.io/workload"
	capturedCondition = "weirmesh.io/Captured"
	podAnnotation     = "weirmesh.io/pod"     // of a request: "namespace/name"
	podUIDAnnotation  = "weirmesh.io/pod-uid" // of a request
)

// encrypted has a pod on each node called from the other, in all ways, by a pod of the
// mesh and by one that has opted out, and looks at what goes between the nodes.
func encrypted(t *testing.T) {
	ns := newNamespace(t, captured())
	wire := watchWire(t, bed.Nodes[0])
	names := [2][3]string{{"a", "asks-a", "plain-a"}, {"b", "asks-b", "plain-b"}} // by node
	var all []*corev1.Pod
	for i, n := range names {
		serviceAll(t, ns, n[0])
		all = append(all, onNode(serveAll(n[0]), i), onNode(appPod(n[1], "sleep", "1h"), i),
			onNode(labelled(appPod(n[2], "sleep", "1h"), captureLabel, "disabled"), i))
	}
	pods := map[string]*corev1.Pod{}
	for _, pod := range startAll(t, ns, all...) {
		pods[pod.Name] = pod
	}
	for i, n := range names {
		expectNotCaptured(t, pods[n[2]])
		for _, name := range n[:2] {
			expectCaptured(t, pods[name])
			identified(t, pods[name])
		}
		for _, w := range ways {
			t.Run(fmt.Sprintf("%s from %s", w.name, bed.Nodes[i].Name), func(t *testing.T) {
				wordsHidden(t, wire, w, pods[n[1]], pods[n[2]], names[1-i][0])
			})
		}
		callerShown(t, pods[n[1]], "URI=spiffe://cluster.local/ns/"+ns+"/sa/default", names[1-i][0])
		callerShown(t, pods[n[2]], "", names[1-i][0])
	}
}

// callerShown asks over HTTP and looks at what the application is told of its caller.
func callerShown(t *testing.T, from *corev1.Pod, want, to string) {
	t.Helper()
	results := get(t, from, "http://"+to+":8080/")
	allServed(t, from.Name+" to "+to, results)
	if a := results[0].Answer; a != nil && a.Headers.Get("X-Forwarded-Client-Cert") != want {
		t.Errorf("%s was told that its caller is %q, want %q", to, a.Headers.Values("X-Forwarded-Client-Cert"), want)
	}
}

// wordsHidden calls in one way from a pod of the mesh, whose words are not to be seen,
// and then from one that is not of it, whose words are.
func wordsHidden(t *testing.T, wire *wire, w way, member, stranger *corev1.Pod, to string) {
	say := func(from *corev1.Pod) (string, error) {
		word := newWord()
		if outcome := w.call(t, from, to, word); outcome != served {
			return word, fmt.Errorf("%s got %s", from.Name, outcome)
		}
		return word, nil
	}
	both := func() error {
		hidden, err := say(member)
		if err != nil {
			return err
		}
		open, err := say(stranger)
		if err != nil {
			return err
		}
		wire.waitWord(t, open)
		if wire.saw(hidden) {
			return errors.New("the words of the pod of the mesh are on the wire")
		}
		return nil
	}
	// The caller's proxy has to hear of the endpoint, and that it is captured.
	eventually(t, soon, w.name+" to "+to, both)
	must(t, both())
}

// identified waits until a pod is published as captured, and its proxy has a certificate
// of who the pod is: one that was asked for from the API server, and approved.
func identified(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	waitPod(t, pod, "to be published as captured", func(pod *corev1.Pod) bool {
		return conditionOf(pod, capturedCondition) == corev1.ConditionTrue
	})
	want := "spiffe://cluster.local/ns/" + pod.Namespace + "/sa/" + pod.Spec.ServiceAccountName
	eventually(t, soon, "a certificate of pod "+pod.Name, func() error {
		list, err := bed.kube.CertificatesV1().CertificateSigningRequests().List(t.Context(), metav1.ListOptions{FieldSelector: "spec.signerName=" + signerName})
		if err != nil {
			return err
		}
		for _, r := range list.Items {
			if r.Annotations[podUIDAnnotation] != string(pod.UID) {
				continue
			}
			got, err := identityIn(&r)
			if err == nil && got != want {
				t.Errorf("pod %s has a certificate for %s, want %s", pod.Name, got, want)
			}
			return err
		}
		return errors.New("nobody has asked for one")
	})
}

func conditionOf(pod *corev1.Pod, kind corev1.PodConditionType) corev1.ConditionStatus {
	for _, c := range pod.Status.Conditions {
		if c.Type == kind {
			return c.Status
		}
	}
	return ""
}

// identityIn is the one identity that a request was answered with.
func identityIn(r *certificatesv1.CertificateSigningRequest) (string, error) {
	block, _ := pem.Decode(r.Status.Certificate)
	if block == nil {
		return "", fmt.Errorf("request %s is not answered: %+v", r.Name, r.Status.Conditions)
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return "", err
	}
	if len(leaf.URIs) != 1 {
		return "", fmt.Errorf("request %s was answered with the identities %v", r.Name, leaf.URIs)
	}
	return leaf.URIs[0].String(), nil
}
