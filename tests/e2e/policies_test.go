package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	policyclient "github.com/weirmesh/weir/agent/api/client"
	"github.com/weirmesh/weir/agent/api/v1alpha1"
)

// policyStatus has the API server and the controller judge TrafficPolicies.
func policyStatus(t *testing.T) {
	ns := newNamespace(t, nil)
	policies, err := policyclient.New(bed.config)
	must(t, err)
	reasons := func() map[string]string {
		list, err := policies.TrafficPolicies(ns).List(t.Context(), metav1.ListOptions{})
		must(t, err)
		out := map[string]string{}
		for _, p := range list.Items {
			out[p.Name] = ""
			for _, a := range p.Status.Ancestors {
				out[p.Name] += fmt.Sprintf("%s %s %s", a.ControllerName, a.AncestorRef.Name, a.Conditions[0].Reason)
			}
		}
		return out
	}
	become := func(want map[string]string) {
		t.Helper()
		eventually(t, soon, "the status of policies", func() error {
			if diff := cmp.Diff(want, reasons()); diff != "" {
				return fmt.Errorf("-want +got:\n%s", diff)
			}
			return nil
		})
	}

	must(t, createPolicy(t, ns, "a", `{"targetRef":{"name":"back"},"retry":{"attempts":2}}`))
	become(map[string]string{"a": "weirmesh.io/mesh-controller back TargetNotFound"})
	service(t, ns, "back", 8080)
	become(map[string]string{"a": "weirmesh.io/mesh-controller back Accepted"})
	must(t, createPolicy(t, ns, "b", `{"targetRef":{"name":"back"}}`))
	become(map[string]string{"a": "weirmesh.io/mesh-controller back Accepted", "b": "weirmesh.io/mesh-controller back Conflicted"})

	for spec, words := range map[string]string{
		`{"targetRef":{"kind":"Pod","name":"back"}}`:                                     "spec.targetRef.kind",
		`{"targetRef":{"name":"back"},"loadBalancer":{"type":"ConsistentHash"}}`:         "consistentHash is what type ConsistentHash needs",
		`{"targetRef":{"name":"back"},"rateLimit":{"count":1,"interval":"2h"}}`:          "must be from 1ms to 1h",
		`{"targetRef":{"name":"back"},"outlierDetection":{"maxEjectionPercent":101}}`:    "less than or equal to 100",
		`{"targetRef":{"name":"back"},"retry":{"codes":[429]},"timeouts":{"request":1}}`: "spec.timeouts.request",
	} {
		if err := createPolicy(t, ns, "c", spec); !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: got %v, want a refusal with %q", spec, err, words)
		}
	}

	controller := as(t, controllerName, nil)
	others := `{"status":{"ancestors":[{"ancestorRef":{"group":"","kind":"Service","name":"back"},"controllerName":"example.com/mesh",
		"conditions":[{"type":"Accepted","status":"True","reason":"Accepted","message":"","lastTransitionTime":"2026-03-01T12:00:00Z"}]}]}}`
	expectAnswer(t, "another controller's entry", patchPolicy(t, controller, ns, "a", others), ownStatusPolicy, "entries of weirmesh.io/mesh-controller only")
	expectAnswer(t, "its own entries", patchPolicy(t, controller, ns, "a", `{"status":{"ancestors":[]}}`), ownStatusPolicy, "")
}

func createPolicy(t *testing.T, namespace, name, spec string) error {
	t.Helper()
	body, err := json.Marshal(map[string]any{
		"apiVersion": v1alpha1.GroupVersion.String(), "kind": "TrafficPolicy",
		"metadata": map[string]any{"name": name}, "spec": json.RawMessage(spec),
	})
	must(t, err)
	return bed.kube.CoreV1().RESTClient().Post().AbsPath("/apis", v1alpha1.GroupVersion.String(), "namespaces", namespace, v1alpha1.TrafficPolicyResource).
		SetHeader("Content-Type", "application/json").SetHeader("Accept", "application/json").Body(body).Do(t.Context()).Error()
}

// patchPolicy patches a status, and changes nothing.
func patchPolicy(t *testing.T, client kubernetes.Interface, namespace, name, patch string) error {
	t.Helper()
	return client.CoreV1().RESTClient().Patch(types.MergePatchType).
		AbsPath("/apis", v1alpha1.GroupVersion.String(), "namespaces", namespace, v1alpha1.TrafficPolicyResource, name, "status").
		Param("dryRun", metav1.DryRunAll).SetHeader("Accept", "application/json").Body([]byte(patch)).Do(t.Context()).Error()
}
