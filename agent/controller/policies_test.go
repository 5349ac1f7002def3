package controller

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayfake "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned/fake"

	policyfake "github.com/weirmesh/weir/agent/api/client/fake"
	"github.com/weirmesh/weir/agent/api/v1alpha1"
)

// aPolicy is about a Service, of the third generation, made at that hour.
func aPolicy(name, service string, hour int) *v1alpha1.TrafficPolicy {
	p := &v1alpha1.TrafficPolicy{}
	p.Namespace, p.Name, p.Generation = "shop", name, 3
	p.CreationTimestamp = metav1.Date(2026, 3, 1, hour, 0, 0, 0, time.UTC)
	p.Spec.TargetRef.Name = gatewayv1.ObjectName(service)
	return p
}

func ancestor(controller gatewayv1.GatewayController, service string, conditions ...metav1.Condition) gatewayv1.PolicyAncestorStatus {
	e := entry(controller, service, conditions...)
	return gatewayv1.PolicyAncestorStatus{AncestorRef: e.ParentRef, ControllerName: e.ControllerName, Conditions: e.Conditions}
}

// briefly is brief, of a policy's status.
func briefly(ancestors []gatewayv1.PolicyAncestorStatus) []string {
	var out []gatewayv1.RouteParentStatus
	for _, a := range ancestors {
		out = append(out, gatewayv1.RouteParentStatus{ParentRef: a.AncestorRef, ControllerName: a.ControllerName, Conditions: a.Conditions})
	}
	return brief(out)
}

func TestAncestorStatus(t *testing.T) {
	accepted := condition("Accepted", "True", "Accepted", "", 3)
	other := ancestor("example.com/gateways", "gateway", condition("Accepted", "False", "Invalid", "", 1))
	full := make([]gatewayv1.PolicyAncestorStatus, 16)
	for i := range full {
		full[i] = ancestor(gatewayv1.GatewayController(fmt.Sprintf("example.com/%d", i)), "back", accepted)
	}
	tests := []struct {
		promise, service string
		have             []gatewayv1.PolicyAncestorStatus
		want             []string // nil: nothing is to be written
	}{
		{"an entry about the Service", "back", nil, []string{"mesh-controller back: Accepted=True/Accepted@3!"}},
		{"one that there is not", "nobody", nil, []string{"mesh-controller nobody: Accepted=False/TargetNotFound@3!"}},
		{"what is there already is not written", "back", []gatewayv1.PolicyAncestorStatus{ancestor(ControllerName, "back", accepted)}, nil},
		{"others' entries stay, where they are", "back", []gatewayv1.PolicyAncestorStatus{other, ancestor(ControllerName, "nobody", accepted), other},
			[]string{"example.com/gateways gateway: Accepted=False/Invalid@1", "example.com/gateways gateway: Accepted=False/Invalid@1", "mesh-controller back: Accepted=True/Accepted@3!"}},
		{"others' entries about the Service stay", "back", []gatewayv1.PolicyAncestorStatus{ancestor("example.com/mesh", "back", accepted)},
			[]string{"example.com/mesh back: Accepted=True/Accepted@3", "mesh-controller back: Accepted=True/Accepted@3!"}},
		{"one of two equal entries goes", "back", []gatewayv1.PolicyAncestorStatus{ancestor(ControllerName, "back", accepted), ancestor(ControllerName, "back", accepted)},
			[]string{"mesh-controller back: Accepted=True/Accepted@3"}},
		{"a new generation is observed, and its time is the old one", "back", []gatewayv1.PolicyAncestorStatus{ancestor(ControllerName, "back", condition("Accepted", "True", "Accepted", "", 2))},
			[]string{"mesh-controller back: Accepted=True/Accepted@3"}},
		{"a status that turns has a new time", "back", []gatewayv1.PolicyAncestorStatus{ancestor(ControllerName, "back", condition("Accepted", "False", "Conflicted", "", 3))},
			[]string{"mesh-controller back: Accepted=True/Accepted@3!"}},
		{"conditions of other types stay", "back", []gatewayv1.PolicyAncestorStatus{ancestor(ControllerName, "back", condition("Programmed", "True", "Programmed", "", 3))},
			[]string{"mesh-controller back: Programmed=True/Programmed@3 Accepted=True/Accepted@3!"}},
		{"a status that others have filled is left alone", "back", full, nil},
		{"unless we have a part in it", "nobody", append(full[:15:15], ancestor(ControllerName, "nobody")),
			append(briefly(full[:15]), "mesh-controller nobody: Accepted=False/TargetNotFound@3!")},
	}
	for _, tt := range tests {
		t.Run(tt.promise, func(t *testing.T) {
			w := newRouteWatches()
			p := aPolicy("careful", tt.service, 1)
			p.Status.Ancestors = tt.have
			before := briefly(tt.have)
			if err := errors.Join(w.services.Add(aService("back")), w.policies.Add(p)); err != nil {
				t.Fatal(err)
			}
			view := w.view()
			got, differs := ancestorStatus(view.policies[0], view.accepted(view.policies[0]), nil, true, noon.Add(time.Hour))
			if differs != (tt.want != nil) {
				t.Errorf("to be written: %v", differs)
			}
			if diff := cmp.Diff(tt.want, briefly(got)); differs && diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if diff := cmp.Diff(before, briefly(p.Status.Ancestors)); diff != "" {
				t.Errorf("what was there is another now:\n%s", diff)
			}
		})
	}
}

func TestTheLeaderWritesThePoliciesStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		unreadable := aPolicy("unreadable", "back", 0)
		unreadable.Spec.Retry = &v1alpha1.Retry{Attempts: new(int32(99))}
		policies := policyfake.New(unreadable, aPolicy("old", "back", 1), aPolicy("young", "back", 2), aPolicy("early", "front", 1))
		client := fake.NewClientset(aService("back"))
		for _, name := range []string{"a", "b"} {
			startReplicaOf(t, clients{client, gatewayfake.NewClientset(), policies}, name)
		}
		status := func() map[string]string {
			time.Sleep(time.Second)
			synctest.Wait()
			list, err := policies.TrafficPolicies("").List(t.Context(), metav1.ListOptions{})
			if err != nil {
				t.Fatal(err)
			}
			out := map[string]string{}
			for _, p := range list.Items {
				out[p.Name] = strings.ReplaceAll(strings.Join(briefly(p.Status.Ancestors), "; "), "!", "")
			}
			return out
		}
		want := map[string]string{
			"unreadable": "mesh-controller back: Accepted=False/Invalid@3",
			"old":        "mesh-controller back: Accepted=True/Accepted@3",
			"young":      "mesh-controller back: Accepted=False/Conflicted@3",
			"early":      "mesh-controller front: Accepted=False/TargetNotFound@3",
		}
		if diff := cmp.Diff(want, status()); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}

		check(t)(client.CoreV1().Services("shop").Create(t.Context(), aService("front"), metav1.CreateOptions{}))
		if err := policies.Policies("shop").Delete(t.Context(), "old", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		delete(want, "old")
		want["young"] = "mesh-controller back: Accepted=True/Accepted@3"
		want["early"] = "mesh-controller front: Accepted=True/Accepted@3"
		if diff := cmp.Diff(want, status()); diff != "" {
			t.Errorf("the Service has come and the older policy gone (-want +got):\n%s", diff)
		}
		patches := 0
		for _, a := range policies.Actions() {
			if a.GetVerb() == "patch" {
				patches++
				if a.GetSubresource() != "status" {
					t.Error("a policy is patched, not its status")
				}
			}
		}
		if patches != 6 {
			t.Errorf("%d patches, not one for each change of each policy", patches)
		}
	})
}
