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
	ownNodePolicy      = "weir-agent-own-node"
	capturedOnlyPolicy = "weir-agent-captured-only"
	ownSignerPolicy    = "weir-agent-own-signer"
	taintOnlyPolicy    = "weir-controller-taint-only"
	ownStatusPolicy    = "weir-controller-own-status"
	ownObjectsPolicy   = "weir-controller-own-objects"
)

// ownNodeOnly does with the tokens that Weir's pods have what they may do, and what
// only RBAC would let them.
func ownNodeOnly(t *testing.T) {
	for _, name := range []string{ownNodePolicy, capturedOnlyPolicy, ownSignerPolicy, taintOnlyPolicy, ownStatusPolicy, ownObjectsPolicy} {
		policy, err := bed.kube.AdmissionregistrationV1().ValidatingAdmissionPolicies().Get(t.Context(), name, metav1.GetOptions{})
		must(t, err)
		if checked := policy.Status.TypeChecking; checked == nil || len(checked.ExpressionWarnings) > 0 {
			t.Errorf("the API server says of policy %s: %+v", name, checked)
		}
	}
	t.Run("agent", agentsEvents)
	t.Run("pods", agentsPods)
	t.Run("controller", controllersPatches)
	t.Run("objects", controllersObjects)
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

// agentsPods patches the status of pods as agents may and may not; nothing is changed.
func agentsPods(t *testing.T) {
	pod := start(t, newNamespace(t, nil), onNode(appPod("about", "sleep", "1h"), 0))
	a, b := bed.Nodes[0].Name, bed.Nodes[1].Name
	onA, onB, nowhere := as(t, agentName, agentOn(t, a)), as(t, agentName, agentOn(t, b)), as(t, agentName, nil)
	condition := func(kind string) string {
		return `{"status":{"conditions":[{"type":"` + kind + `","status":"True","reason":"E2E"}]}}`
	}
	own := condition(capturedCondition)
	for _, tt := range []struct {
		what    string
		client  kubernetes.Interface
		patch   string
		refused string // words of the refusal; empty: it is allowed
	}{
		{"that a pod of its own node is captured", onA, own, ""},
		{"that a pod of another node is", onB, own, "weir-agent on " + b + ` may not say anything of a pod of node "` + a + `"`},
		{"with a token that is bound to no node", nowhere, own, "bound to no node"},
		{"that a pod is ready", onA, condition("Ready"), "no condition of a pod but weirmesh.io/Captured"},
		{"another condition", onA, condition("example.com/Other"), "no condition of a pod but weirmesh.io/Captured"},
		{"another address", onA, `{"status":{"podIP":"10.0.0.1","podIPs":[{"$patch":"replace"},{"ip":"10.0.0.1"}]}}`, "nothing of a pod's status but the condition"},
		{"another phase", onA, `{"status":{"phase":"Failed"}}`, "nothing of a pod's status but the condition"},
		{"a label", onA, `{"metadata":{"labels":{"app":"back"}}}`, "nothing of a pod but its status"},
		{"an annotation", onA, `{"metadata":{"annotations":{"x":"y"}}}`, "nothing of a pod but its status"},
	} {
		_, err := tt.client.CoreV1().Pods(pod.Namespace).Patch(t.Context(), pod.Name, types.StrategicMergePatchType, []byte(tt.patch),
			metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}}, "status")
		expectAnswer(t, tt.what, err, capturedOnlyPolicy, tt.refused)
	}
}

// controllersObjects makes objects as the controller may and may not; nothing is made.
func controllersObjects(t *testing.T) {
	client := as(t, controllerName, nil).CoreV1()
	secret := func(name string) error {
		_, err := client.Secrets(weirNamespace).Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}}, dryCreate)
		return err
	}
	config := func(name string) error {
		_, err := client.ConfigMaps(weirNamespace).Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, dryCreate)
		return err
	}
	if err := secret("weir-ca"); !apierrors.IsAlreadyExists(err) {
		t.Errorf("the Secret of the CA: got %v, want that it is there", err)
	}
	expectAnswer(t, "another Secret", secret("e2e"), ownObjectsPolicy, "may make the Secret weir-ca")
	expectAnswer(t, "the ConfigMap of the roots", config("weir-roots"), ownObjectsPolicy, "")
	expectAnswer(t, "another ConfigMap", config("weir-options-e2e"), ownObjectsPolicy, "may make the Secret weir-ca")

	// The key of the CA is the controller's alone.
	for _, node := range bed.Nodes {
		_, err := as(t, agentName, agentOn(t, node.Name)).CoreV1().Secrets(weirNamespace).Get(t.Context(), "weir-ca", metav1.GetOptions{})
		if !apierrors.IsForbidden(err) {
			t.Errorf("the agent on %s asks for the CA's key: got %v, want a refusal", node.Name, err)
		}
	}
}

var dryCreate = metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}

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
