package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weirmesh/weir/tests/cluster"
)

// controllerName is whose entries of a route's status are Weir's.
const controllerName = "weirmesh.io/mesh-controller"

// programmed is a condition of Weir's own, and its reason.
const programmed = "Programmed"

// unresolved are the manifests of the suite's mesh tests that refer to what is not
// there, with the reason of ResolvedRefs.
var unresolved = map[string]gatewayv1.RouteConditionReason{
	"grpcroute-weight.yaml": gatewayv1.RouteReasonBackendNotFound, // echo-v3
}

// judgedRoute is what HTTPRoutes and GRPCRoutes have in common.
type judgedRoute struct {
	metav1.ObjectMeta `json:"metadata"`
	Spec              gatewayv1.CommonRouteSpec `json:"spec"`
	Status            gatewayv1.RouteStatus     `json:"status"`
}

// judged says what is wrong with the status of a manifest's routes.
func judged(ctx context.Context, c *cluster.Cluster, file string) error {
	said, err := c.Kubectl(ctx, "get", "-f", file, "-o", "json")
	if err != nil {
		return err
	}
	var list struct {
		Items       []judgedRoute // of several routes
		judgedRoute               // the one
	}
	if err := json.Unmarshal(said, &list); err != nil {
		return err
	}
	if len(list.Items) == 0 {
		list.Items = append(list.Items, list.judgedRoute)
	}
	resolved := cmp.Or(unresolved[filepath.Base(file)], gatewayv1.RouteReasonResolvedRefs)
	for _, r := range list.Items {
		if err := r.judged(resolved); err != nil {
			return fmt.Errorf("%s: %w", r.Name, err)
		}
	}
	return nil
}

// judged: each parentRef has an entry of ours that says, of what the route is now,
// that it is accepted, of its references what is so, and that proxies have it; and
// there is no other.
func (r judgedRoute) judged(resolved gatewayv1.RouteConditionReason) error {
	if len(r.Status.Parents) != len(r.Spec.ParentRefs) {
		return fmt.Errorf("%d entries of status for %d parents", len(r.Status.Parents), len(r.Spec.ParentRefs))
	}
	for i, entry := range r.Status.Parents {
		if entry.ControllerName != controllerName {
			return fmt.Errorf("parents[%d] is of %s", i, entry.ControllerName)
		}
		for condition, reason := range map[gatewayv1.RouteConditionType]gatewayv1.RouteConditionReason{
			gatewayv1.RouteConditionAccepted: gatewayv1.RouteReasonAccepted, gatewayv1.RouteConditionResolvedRefs: resolved,
			programmed: programmed,
		} {
			if !r.says(entry, condition, reason) {
				return fmt.Errorf("parents[%d] does not say %s of generation %d: %v", i, reason, r.Generation, entry.Conditions)
			}
		}
	}
	return nil
}

// says reports whether an entry gives a reason for a condition, which is true if both
// are of one name.
func (r judgedRoute) says(entry gatewayv1.RouteParentStatus, condition gatewayv1.RouteConditionType, reason gatewayv1.RouteConditionReason) bool {
	status := metav1.ConditionFalse
	if string(condition) == string(reason) {
		status = metav1.ConditionTrue
	}
	for _, c := range entry.Conditions {
		if c.Type == string(condition) {
			return c.Status == status && c.Reason == string(reason) && c.ObservedGeneration == r.Generation
		}
	}
	return false
}
