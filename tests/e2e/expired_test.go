package e2e

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/weirmesh/weir/agent/identity"
	"github.com/weirmesh/weir/agent/telemetry"
)

// brief is how long a certificate is good that nobody renews: for pods to be called by
// then, and for the agent to have asked for another.
const brief = 15 * time.Second

// certificatesEnd signs in the controllers' place, while these are away: with their CA, by
// clocks that are 10 minutes ahead and behind, and by one that is too far ahead; and one
// certificate that ends before they are back.
func certificatesEnd(t *testing.T) {
	ca := signingCA(t)
	bringBack := takeControllers(t)
	ns := newNamespace(t, captured())
	serviceAll(t, ns, "brief")
	serviceAll(t, ns, "ahead")
	pods := startAll(t, ns, onNode(serveAll("brief"), 0), onNode(serveAll("ahead"), 1),
		onNode(appPod("behind", "sleep", "1h"), 0), onNode(appPod("early", "sleep", "1h"), 0))
	ends, ahead, behind, early := pods[0], pods[1], pods[2], pods[3]
	now := time.Now()
	sign(t, ca, ahead, now.Add(10*time.Minute), identity.DefaultTTL)
	sign(t, ca, behind, now.Add(-10*time.Minute), identity.DefaultTTL)
	sign(t, ca, early, now.Add(20*time.Minute), identity.DefaultTTL)
	now = time.Now()
	sign(t, ca, ends, now, brief)

	const calling, called, beside = "brief to ahead", "ahead to brief", "behind to ahead"
	become := func(when string, want map[string]string) {
		t.Helper()
		eventually(t, soon, "calls "+when, func() error {
			got := map[string]string{calling: outcomes(t, ends, "ahead"), called: outcomes(t, ahead, "brief"), beside: outcomes(t, behind, "ahead")}
			if diff := cmp.Diff(want, got); diff != "" {
				return fmt.Errorf("-want +got:\n%s", diff)
			}
			return nil
		})
	}
	all := expectedOutcomes(func(string) bool { return true })
	become("with certificates that are good", map[string]string{calling: all, called: all, beside: all})
	if late := time.Since(now); late > brief {
		t.Fatalf("that took %s: the certificate had ended by then", late)
	}
	callerShown(t, behind, "URI=spiffe://cluster.local/ns/"+ns+"/sa/default", "ahead")
	failedFor(t, early, "cert_unavailable")

	time.Sleep(time.Until(now.Add(brief)))
	none := outcomesOf(func(w way) string {
		if w.name == "HTTP" {
			return "503"
		}
		return w.reset
	})
	become("with one that has ended", map[string]string{calling: none, called: none, beside: all})
	for _, pod := range []*corev1.Pod{ends, ahead} {
		waitFailure(t, pod, "cert_expired")
	}

	bringBack()
	eventually(t, startLimit, "another certificate of pod brief", func() error {
		if leaf := leafOf(t, ends); time.Until(leaf.NotAfter) < brief {
			return fmt.Errorf("it has one until %s", leaf.NotAfter)
		}
		return nil
	})
	become("with another", map[string]string{calling: all, called: all, beside: all})
	allServed(t, "early, to ahead", get(t, early, "-retry", "20s", "http://ahead:8080/"))
}

// failedFor has a pod call ahead and be answered 503 by its own proxy, for a reason. The
// proxy may take some seconds to say so.
func failedFor(t *testing.T, from *corev1.Pod, reason string) {
	t.Helper()
	if r := get(t, from, "-timeout", "20s", "http://ahead:8080/")[0]; r.Status != http.StatusServiceUnavailable {
		t.Errorf("%s got status %d, %s, want 503", from.Name, r.Status, r.Error)
	}
	waitFailure(t, from, reason)
}

// waitFailure waits until a pod's proxy has recorded that it did not call, for a reason.
func waitFailure(t *testing.T, from *corev1.Pod, reason string) {
	t.Helper()
	waitRecord(t, from.Name+" failing for "+reason, func(r telemetry.Record) bool {
		return r.Pod == from.Namespace+"/"+from.Name && r.Direction == "outbound" && r.Reason == reason && r.HTTP != nil &&
			r.Status == http.StatusServiceUnavailable
	})
}

// signingCA is the CA that the controllers sign with.
func signingCA(t *testing.T) *identity.Authority {
	t.Helper()
	secret, err := bed.kube.CoreV1().Secrets(weirNamespace).Get(t.Context(), "weir-ca", metav1.GetOptions{})
	must(t, err)
	ring, err := identity.ParseKeyring(secret.Data["keyring.json"])
	must(t, err)
	return ring.Signs()
}

// sign answers a pod's request for a certificate as the controllers do, by a clock of ours.
func sign(t *testing.T, ca *identity.Authority, pod *corev1.Pod, now time.Time, ttl time.Duration) {
	t.Helper()
	ctx, requests := t.Context(), bed.kube.CertificatesV1().CertificateSigningRequests()
	var found *certificatesv1.CertificateSigningRequest
	eventually(t, soon, "a request of pod "+pod.Name, func() error {
		list, err := requests.List(ctx, metav1.ListOptions{FieldSelector: "spec.signerName=" + signerName})
		if err != nil {
			return err
		}
		for _, r := range list.Items {
			if r.Annotations[podUIDAnnotation] == string(pod.UID) {
				found = &r
				return nil
			}
		}
		return errors.New("there is none")
	})
	block, _ := pem.Decode(found.Spec.Request)
	id, err := spiffeid.FromString("spiffe://cluster.local/ns/" + pod.Namespace + "/sa/" + pod.Spec.ServiceAccountName)
	must(t, err)
	chain, err := ca.Sign(block.Bytes, id, now, ttl)
	must(t, err)
	found.Status.Conditions = append(found.Status.Conditions, certificatesv1.CertificateSigningRequestCondition{
		Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue, Reason: "Test",
	})
	found, err = requests.UpdateApproval(ctx, found.Name, found, metav1.UpdateOptions{})
	must(t, err)
	found.Status.Certificate = identity.EncodeChain(chain)
	_, err = requests.UpdateStatus(ctx, found, metav1.UpdateOptions{})
	must(t, err)
}

// takeControllers takes all controllers away, until the function it returns is called or
// the test ends.
func takeControllers(t *testing.T) func() {
	t.Helper()
	deployments, ctx := bed.kube.AppsV1().Deployments(weirNamespace), t.Context()
	now, err := deployments.Get(ctx, controllerName, metav1.GetOptions{})
	must(t, err)
	scale := func(ctx context.Context, n int32) error {
		_, err := deployments.Patch(ctx, controllerName, types.MergePatchType, fmt.Appendf(nil, `{"spec":{"replicas":%d}}`, n), metav1.PatchOptions{})
		return err
	}
	done := false
	bringBack := func() {
		if done {
			return
		}
		done = true
		ctx, cancel := context.WithTimeout(context.Background(), startLimit)
		defer cancel()
		if err := scale(ctx, *now.Spec.Replicas); err != nil {
			t.Error(err)
		}
		if err := poll(ctx, "the controllers", func() error { return bed.controllersReady(ctx) }); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(bringBack)
	must(t, scale(ctx, 0))
	eventually(t, endLimit, "no controller to be left", func() error {
		list, err := bed.kube.CoreV1().Pods(weirNamespace).List(ctx, metav1.ListOptions{LabelSelector: "app=" + controllerName})
		if err == nil && len(list.Items) > 0 {
			err = fmt.Errorf("there are %d", len(list.Items))
		}
		return err
	})
	return bringBack
}
