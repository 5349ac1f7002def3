package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// Of the policies in manifests/base.
const (
	ownNodePolicy   = "weir-agent-own-node"
	taintOnlyPolicy = "weir-controller-taint-only"
	ownStatusPolicy = "weir-controller-own-status"
)

// ownNodeOnly does with the tokens that Weir's pods have what they may do, and what
// only RBAC would let them.
func ownNodeOnly(t *testing.T) {
	for _, name := range []string{ownNodePolicy, taintOnlyPolicy, ownStatusPolicy} {
		policy, err := bed.kube.AdmissionregistrationV1().ValidatingAdmissionPolicies().Get(t.Context(), name, metav1.GetOptions{})
		must(t, err)
		if checked := policy.Status.TypeChecking; checked == nil || len(checked.ExpressionWarnings) > 0 {
			t.Errorf("the API server says of policy %s: %+v", name, checked)
		}
	}
	t.Run("agent", agentsEvents)
	t.Run("controller", controllersPatches)
}

func agentsEvents(t *testing.T) {
	ns := newNamespace(t, nil)
	pod := start(t, ns, appPod("about", "sleep", "1h"))
	a, b := bed.Nodes[0].Name, bed.Nodes[1].Name
	onA, onB := as(t, agentName, agentOn(t, a)), as(t, agentName, agentOn(t, b))
	nowhere := as(t, agentName, nil)
	about := func(kind, namespace, name string) corev1.ObjectReference {
		return corev1.ObjectReference{APIVersion: "v1", Kind: kind, Namespace: namespace, Name: name}
	}
	write := func(client kubernetes.Interface, namespace, from string, what corev1.ObjectReference) (*corev1.Event, error) {
		return client.CoreV1().Events(namespace).Create(t.Context(), &corev1.Event{
			ObjectMeta:     metav1.ObjectMeta{GenerateName: "e2e-"},
			InvolvedObject: what, Reason: "E2E", Type: corev1.EventTypeNormal, Message: "from " + from,
			Source: corev1.EventSource{Component: agentName, Host: from},
		}, metav1.CreateOptions{})
	}
	drop := func(event *corev1.Event) {
		if err := bed.kube.CoreV1().Events(event.Namespace).Delete(context.WithoutCancel(t.Context()), event.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	}
	aPod := about("Pod", ns, pod.Name)
	for _, tt := range []struct {
		what    string
		client  kubernetes.Interface
		from    string
		about   corev1.ObjectReference
		refused string // words of the refusal; empty: it is allowed
	}{
		{"about a pod, as its own node", onA, a, aPod, ""},
		{"about a pod, as another node", onA, b, aPod, `weir-agent on ` + a + ` may not write an event whose source.host is "` + b + `"`},
		{"about a pod, as no node", onA, "", aPod, `whose source.host is ""`},
		{"about its own node", onA, a, about("Node", "", a), ""},
		{"about another node", onA, a, about("Node", "", b), "weir-agent on " + a + " may write events about pods and about that node only"},
		{"about something else", onA, a, about("Service", ns, "x"), "about that node only"},
		{"with a token that is bound to no node", nowhere, a, aPod, "bound to no node"},
	} {
		namespace := tt.about.Namespace
		if namespace == "" {
			namespace = metav1.NamespaceDefault
		}
		event, err := write(tt.client, namespace, tt.from, tt.about)
		if err == nil {
			drop(event)
		}
		expectAnswer(t, tt.what, err, ownNodePolicy, tt.refused)
	}

	event, err := write(onB, ns, b, aPod)
	must(t, err)
	count := func(client kubernetes.Interface, patch string) error {
		_, err := client.CoreV1().Events(ns).Patch(t.Context(), event.Name, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
		return err
	}
	expectAnswer(t, "counting its own event", count(onB, `{"count":2}`), ownNodePolicy, "")
	expectAnswer(t, "counting another node's event", count(onA, `{"count":3}`), ownNodePolicy, `may not write an event whose source.host is "`+b+`"`)
	expectAnswer(t, "taking over another node's event", count(onA, `{"source":{"host":"`+a+`"}}`), ownNodePolicy, `may not change an event whose source.host is "`+b+`"`)
}

func controllersPatches(t *testing.T) {
	client := as(t, controllerName, nil)
	node := bed.Nodes[0]
	patch := func(patch string) error {
		_, err := client.CoreV1().Nodes().Patch(t.Context(), node.Name, types.MergePatchType, []byte(patch), metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}})
		return err
	}
	expectAnswer(t, "leaving the taints as they are", patch(`{"spec":{"taints":null}}`), taintOnlyPolicy, "")
	for what, body := range map[string]string{
		"a taint":         `{"spec":{"taints":[{"key":"x","effect":"NoExecute"}]}}`,
		"its own taint":   `{"spec":{"taints":[{"key":"` + notReadyTaint + `","effect":"NoExecute"}]}}`,
		"a label":         `{"metadata":{"labels":{"x":"y"}}}`,
		"an annotation":   `{"metadata":{"annotations":{"x":"y"}}}`,
		"a finalizer":     `{"metadata":{"finalizers":["weirmesh.io/x"]}}`,
		"a cordon":        `{"spec":{"unschedulable":true}}`,
		"the provider ID": `{"spec":{"providerID":"x://y"}}`,
	} {
		words := "may change nothing of a node but its taints"
		if strings.Contains(what, "taint") {
			words = "may take the taint " + notReadyTaint + " off"
		}
		expectAnswer(t, what, patch(body), taintOnlyPolicy, words)
	}
}

// expectAnswer holds what the API server said against: allowed, or refused by the
// policy with these words.
func expectAnswer(t *testing.T, what string, err error, policy, words string) {
	t.Helper()
	switch {
	case words == "" && err != nil:
		t.Errorf("%s: refused: %v", what, err)
	case words != "" && err == nil:
		t.Errorf("%s: allowed", what)
	case words != "" && !(apierrors.IsInvalid(err) && containsAll(err.Error(), []string{policy, words})):
		t.Errorf("%s: got %v, want a refusal by %s with %q", what, err, policy, words)
	}
}

// as makes a client with a token of one of Weir's service accounts, as the pod has
// it; nil: one that no pod has.
func as(t *testing.T, account string, pod *corev1.Pod) kubernetes.Interface {
	t.Helper()
	request := &authenticationv1.TokenRequest{}
	if pod != nil {
		request.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID}
	}
	token, err := bed.kube.CoreV1().ServiceAccounts(weirNamespace).CreateToken(t.Context(), account, request, metav1.CreateOptions{})
	must(t, err)
	config := rest.AnonymousClientConfig(bed.config)
	config.BearerToken = token.Status.Token
	client, err := kubernetes.NewForConfig(config)
	must(t, err)
	return client
}

// agentOn is the agent's pod of a node.
func agentOn(t *testing.T, node string) *corev1.Pod {
	t.Helper()
	var found *corev1.Pod
	eventually(t, soon, "an agent on "+node, func() error {
		pods, err := bed.agentPods(t.Context())
		if err != nil {
			return err
		}
		for i := range pods {
			if pods[i].Spec.NodeName == node && pods[i].DeletionTimestamp == nil {
				found = &pods[i]
				return nil
			}
		}
		return fmt.Errorf("there is none among %d pods", len(pods))
	})
	return found
}
