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

	must(t, createPolicy(t, ns, trafficPolicy, "a", `{"targetRef":{"name":"back"},"retry":{"attempts":2}}`))
	become(map[string]string{"a": "weirmesh.io/mesh-controller back TargetNotFound"})
	service(t, ns, "back", 8080)
	become(map[string]string{"a": "weirmesh.io/mesh-controller back Accepted"})
	must(t, createPolicy(t, ns, trafficPolicy, "b", `{"targetRef":{"name":"back"}}`))
	become(map[string]string{"a": "weirmesh.io/mesh-controller back Accepted", "b": "weirmesh.io/mesh-controller back Conflicted"})

	for spec, words := range map[string]string{
		`{"targetRef":{"kind":"Pod","name":"back"}}`:                                     "spec.targetRef.kind",
		`{"targetRef":{"name":"back"},"loadBalancer":{"type":"ConsistentHash"}}`:         "consistentHash is what type ConsistentHash needs",
		`{"targetRef":{"name":"back"},"rateLimit":{"count":1,"interval":"2h"}}`:          "must be from 1ms to 1h",
		`{"targetRef":{"name":"back"},"outlierDetection":{"maxEjectionPercent":101}}`:    "less than or equal to 100",
		`{"targetRef":{"name":"back"},"retry":{"codes":[429]},"timeouts":{"request":1}}`: "spec.timeouts.request",
	} {
		if err := createPolicy(t, ns, trafficPolicy, "c", spec); !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: got %v, want a refusal with %q", spec, err, words)
		}
	}

	controller := as(t, controllerName, nil)
	others := `{"status":{"ancestors":[{"ancestorRef":{"group":"","kind":"Service","name":"back"},"controllerName":"example.com/mesh",
		"conditions":[{"type":"Accepted","status":"True","reason":"Accepted","message":"","lastTransitionTime":"2026-03-01T12:00:00Z"}]}]}}`
	expectAnswer(t, "another controller's entry", patchPolicy(t, controller, ns, trafficPolicy, "a", others), ownStatusPolicy, "entries of weirmesh.io/mesh-controller only")
	expectAnswer(t, "its own entries", patchPolicy(t, controller, ns, trafficPolicy, "a", `{"status":{"ancestors":[]}}`), ownStatusPolicy, "")
}

// authorizationStatus has the API server and the controller judge AuthorizationPolicies.
func authorizationStatus(t *testing.T) {
	ns := newNamespace(t, nil)
	policies, err := policyclient.New(bed.config)
	must(t, err)
	must(t, createPolicy(t, ns, authorizationPolicy, "a", `{"action":"ALLOW","rules":[{"sources":[]}]}`))
	eventually(t, soon, "the status of a policy that governs nothing", func() error {
		list, err := policies.AuthorizationPolicies(ns).List(t.Context(), metav1.ListOptions{})
		must(t, err)
		got := ""
		for _, c := range list.Items[0].Status.Conditions {
			got += fmt.Sprintf("%s=%s/%s ", c.Type, c.Status, c.Reason)
		}
		if want := "Accepted=True/Accepted Programmed=True/Programmed "; got != want {
			return fmt.Errorf("%q, want %q", got, want)
		}
		return nil
	})
	for spec, words := range map[string]string{
		`{"rules":[]}`:     "spec.action",
		`{"action":"LOG"}`: "spec.action",
		`{"action":"DENY","rules":[{"sources":[{"type":"SPIFFE"}]}]}`:                                       "spiffe is what type SPIFFE needs",
		`{"action":"DENY","rules":[{"networkAttributes":{"ports":[0]}}]}`:                                   "greater than or equal to 1",
		`{"action":"DENY","rules":[{"http":{"headers":[{"name":"Host","value":"a"}]}}]}`:                    "host is no header field of HTTP/2",
		`{"action":"ALLOW","podSelector":{"matchExpressions":[{"key":"a","operator":"In"}]}}`:               "values are what In and NotIn need",
		`{"action":"ALLOW","rules":[{"http":{"paths":[{"type":"Exact","value":"/a?b"}]}}]}`:                 "spec.rules[0].http.paths[0].value",
		`{"action":"ALLOW","rules":[{"sources":[{"type":"ServiceAccount","serviceAccount":{"name":""}}]}]}`: "serviceAccount.name",
	} {
		if err := createPolicy(t, ns, authorizationPolicy, "b", spec); !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: got %v, want a refusal with %q", spec, err, words)
		}
	}
	controller := as(t, controllerName, nil)
	conditions := func(types ...string) string {
		var all []string
		for _, kind := range types {
			all = append(all, `{"type":"`+kind+`","status":"True","reason":"Accepted","message":"","lastTransitionTime":"2026-03-01T12:00:00Z"}`)
		}
		return `{"status":{"conditions":[` + strings.Join(all, ",") + `]}}`
	}
	expectAnswer(t, "a condition that is not its own", patchPolicy(t, controller, ns, authorizationPolicy, "a", conditions("Accepted", "Other")), ownStatusPolicy, "conditions Accepted and Programmed only")
	expectAnswer(t, "its own conditions", patchPolicy(t, controller, ns, authorizationPolicy, "a", conditions("Accepted", "Programmed")), ownStatusPolicy, "")
}

// policyKind is one of our kinds, and what it is served as.
type policyKind struct{ name, resource string }

var (
	trafficPolicy       = policyKind{"TrafficPolicy", v1alpha1.TrafficPolicyResource}
	authorizationPolicy = policyKind{"AuthorizationPolicy", v1alpha1.AuthorizationPolicyResource}
	peerAuthentication  = policyKind{"PeerAuthentication", v1alpha1.PeerAuthenticationResource}
)

func createPolicy(t *testing.T, namespace string, kind policyKind, name, spec string) error {
	t.Helper()
	body, err := json.Marshal(map[string]any{
		"apiVersion": v1alpha1.GroupVersion.String(), "kind": kind.name,
		"metadata": map[string]any{"name": name}, "spec": json.RawMessage(spec),
	})
	must(t, err)
	return bed.kube.CoreV1().RESTClient().Post().AbsPath("/apis", v1alpha1.GroupVersion.String(), "namespaces", namespace, kind.resource).
		SetHeader("Content-Type", "application/json").SetHeader("Accept", "application/json").Body(body).Do(t.Context()).Error()
}

// patchPolicy patches a status, and changes nothing.
func patchPolicy(t *testing.T, client kubernetes.Interface, namespace string, kind policyKind, name, patch string) error {
	t.Helper()
	return client.CoreV1().RESTClient().Patch(types.MergePatchType).
		AbsPath("/apis", v1alpha1.GroupVersion.String(), "namespaces", namespace, kind.resource, name, "status").
		Param("dryRun", metav1.DryRunAll).SetHeader("Accept", "application/json").Body([]byte(patch)).Do(t.Context()).Error()
}
