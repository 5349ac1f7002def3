package main

import (
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// TestOnlyTheWholeTruthIsAStatus: each change of a good status is found.
func TestOnlyTheWholeTruthIsAStatus(t *testing.T) {
	good := func(resolved gatewayv1.RouteConditionReason, status metav1.ConditionStatus) judgedRoute {
		return judgedRoute{
			ObjectMeta: metav1.ObjectMeta{Generation: 2},
			Spec:       gatewayv1.CommonRouteSpec{ParentRefs: make([]gatewayv1.ParentReference, 1)},
			Status: gatewayv1.RouteStatus{Parents: []gatewayv1.RouteParentStatus{{ControllerName: controllerName, Conditions: []metav1.Condition{
				{Type: "Accepted", Status: metav1.ConditionTrue, Reason: "Accepted", ObservedGeneration: 2},
				{Type: "ResolvedRefs", Status: status, Reason: string(resolved), ObservedGeneration: 2},
				{Type: "Programmed", Status: metav1.ConditionTrue, Reason: "Programmed", ObservedGeneration: 2},
			}}}},
		}
	}
	if err := good("ResolvedRefs", metav1.ConditionTrue).judged("ResolvedRefs"); err != nil {
		t.Error(err)
	}
	if err := good("BackendNotFound", metav1.ConditionFalse).judged("BackendNotFound"); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*judgedRoute, *gatewayv1.RouteParentStatus){
		"of an older generation": func(r *judgedRoute, _ *gatewayv1.RouteParentStatus) { r.Generation++ },
		"not accepted":           func(_ *judgedRoute, s *gatewayv1.RouteParentStatus) { s.Conditions[0].Status = metav1.ConditionFalse },
		"for another reason":     func(_ *judgedRoute, s *gatewayv1.RouteParentStatus) { s.Conditions[1].Reason = "BackendNotFound" },
		"without a condition":    func(_ *judgedRoute, s *gatewayv1.RouteParentStatus) { s.Conditions = s.Conditions[:1] },
		"not with the proxies":   func(_ *judgedRoute, s *gatewayv1.RouteParentStatus) { s.Conditions[2].Status = metav1.ConditionFalse },
		"of another controller":  func(_ *judgedRoute, s *gatewayv1.RouteParentStatus) { s.ControllerName = "example.com/other" },
		"of one parent of two": func(r *judgedRoute, _ *gatewayv1.RouteParentStatus) {
			r.Spec.ParentRefs = make([]gatewayv1.ParentReference, 2)
		},
		"of a parent that is not": func(r *judgedRoute, _ *gatewayv1.RouteParentStatus) { r.Spec.ParentRefs = nil },
	} {
		r := good("ResolvedRefs", metav1.ConditionTrue)
		change(&r, &r.Status.Parents[0])
		if r.judged("ResolvedRefs") == nil {
			t.Errorf("a status %s is taken for a good one", name)
		}
	}
	if good("BackendNotFound", metav1.ConditionFalse).judged("ResolvedRefs") == nil || good("ResolvedRefs", metav1.ConditionTrue).judged("BackendNotFound") == nil {
		t.Error("a status that is not so is taken for a good one")
	}
}
