package controller

import (
	"encoding/json"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weirmesh/weir/agent/decide"
	"github.com/weirmesh/weir/agent/model"
)

// ControllerName is whose entries of routes' status are ours (RouteParentStatus).
const ControllerName gatewayv1.GatewayController = model.Prefix + "mesh-controller"

// maxMessage is how long a condition's message may be, in bytes.
const maxMessage = 32768

// verdicts judges a route, once for each of its refs.
func (v routeView) verdicts(r routeObject) []decide.Verdict {
	if r.unread != nil { // a value that its CRD should not let pass
		out := make([]decide.Verdict, len(r.refs))
		for i := range out {
			out[i].Accepted = decide.Condition{Reason: decide.UnsupportedValue, Message: r.unread.Error()}
			out[i].ResolvedRefs = decide.Condition{True: true, Reason: decide.ResolvedRefs}
		}
		return out
	}
	var rivals []model.Route
	seen := map[string]bool{}
	for _, p := range r.route.Parents {
		id := p.Namespace + "/" + p.Name
		if !seen[id] {
			rivals = append(rivals, v.byParent[id]...)
		}
		seen[id] = true
	}
	return decide.Verdicts(r.route, rivals, v.find)
}

// parentStatus is a route's status as it should be, of how it is: an entry for each
// of its Services, none of ours for anything else, the others' as they are. It
// reports whether there is a difference. What has changed is marked with the time.
// How far proxies have the route is nil where that is not known; with counts, a
// number of proxies that is another is a difference too.
func parentStatus(r routeObject, verdicts []decide.Verdict, proxies *tally, counts bool, now time.Time) ([]gatewayv1.RouteParentStatus, bool) {
	judge := func(entry gatewayv1.RouteParentStatus, i int) gatewayv1.RouteParentStatus {
		entry = judged(entry, r.refs[i], verdicts[i], r.generation, now)
		if proxies != nil {
			setProgrammed(&entry.Conditions, proxies.route(r, verdicts[i]), r.generation, counts, now)
		}
		return entry
	}
	var out []gatewayv1.RouteParentStatus
	taken := make([]bool, len(r.refs))
	for _, entry := range r.parents {
		if entry.ControllerName != ControllerName {
			out = append(out, entry)
			continue
		}
		i := slices.IndexFunc(r.refs, func(p gatewayv1.ParentReference) bool { return sameParent(r.namespace, p, entry.ParentRef) })
		if i >= 0 && !taken[i] {
			taken[i] = true
			out = append(out, judge(entry, i))
		}
	}
	for i := range r.refs {
		if !taken[i] {
			out = append(out, judge(gatewayv1.RouteParentStatus{ControllerName: ControllerName}, i))
		}
	}
	return out, !equality.Semantic.DeepEqual(out, r.parents)
}

// sameParent: the API server fills in group and kind, and nothing else.
func sameParent(namespace string, a, b gatewayv1.ParentReference) bool {
	full := func(p gatewayv1.ParentReference) gatewayv1.ParentReference {
		if p.Namespace == nil {
			p.Namespace = new(gatewayv1.Namespace(namespace))
		}
		return p
	}
	return equality.Semantic.DeepEqual(full(a), full(b))
}

// judged is our entry about a parent with what is said of it now. Conditions of
// other types stay.
func judged(entry gatewayv1.RouteParentStatus, ref gatewayv1.ParentReference, v decide.Verdict, generation int64, now time.Time) gatewayv1.RouteParentStatus {
	entry.ParentRef, entry.Conditions = ref, slices.Clone(entry.Conditions)
	say := func(kind gatewayv1.RouteConditionType, c decide.Condition) {
		setCondition(&entry.Conditions, string(kind), c, generation, now)
	}
	say(gatewayv1.RouteConditionAccepted, v.Accepted)
	say(gatewayv1.RouteConditionResolvedRefs, v.ResolvedRefs)
	if v.PartiallyInvalid != nil {
		say(gatewayv1.RouteConditionPartiallyInvalid, *v.PartiallyInvalid)
	} else {
		meta.RemoveStatusCondition(&entry.Conditions, string(gatewayv1.RouteConditionPartiallyInvalid))
	}
	return entry
}

// setCondition says c as a condition of that type.
func setCondition(conditions *[]metav1.Condition, kind string, c decide.Condition, generation int64, now time.Time) {
	a := assessment{metav1.ConditionFalse, c.Reason, c.Message}
	if c.True {
		a.status = metav1.ConditionTrue
	}
	setAssessment(conditions, kind, a, generation, now)
}

func setAssessment(conditions *[]metav1.Condition, kind string, a assessment, generation int64, now time.Time) {
	meta.SetStatusCondition(conditions, metav1.Condition{
		Type: kind, Status: a.status, Reason: a.reason, Message: a.message[:min(len(a.message), maxMessage)],
		ObservedGeneration: generation, LastTransitionTime: metav1.NewTime(now),
	})
}

// statusPatch is the merge patch of a list in a status that was seen at a version: of
// an object that has changed since, the API server says that there is a conflict.
func statusPatch[E any](version, list string, entries []E) ([]byte, error) {
	if entries == nil {
		entries = []E{} // null would remove a field that must be there
	}
	type object = map[string]any
	return json.Marshal(object{
		"metadata": object{"resourceVersion": version},
		"status":   object{list: entries},
	})
}
