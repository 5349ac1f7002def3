package controller

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weirmesh/weir/agent/decide"
	"github.com/weirmesh/weir/agent/model"
)

// conditionProgrammed is the type of the condition that says how many proxies have a
// route or a policy. The Gateway API has it for Gateways and Listeners; of a mesh's routes
// and of policies it is Weir's own.
const conditionProgrammed = "Programmed"

// Reasons of it.
const (
	reasonProgrammed  = "Programmed"        // True: every proxy that it governs has acknowledged it
	reasonPending     = "Pending"           // False: not yet every one
	reasonRejected    = "Rejected"          // False: one has refused it, and keeps what it had
	reasonNotAccepted = "NotAccepted"       // False: it is not in force
	reasonUnreachable = "AgentsUnreachable" // Unknown: an agent that is ready does not answer
)

// useKey is a route, by its full name, for one of its parents, or a policy, which has none.
type useKey struct{ object, parent string }

// tally is what the agents have said.
type tally struct {
	round  int      // its number
	agents []answer // in order of their nodes
	uses   map[useKey][]model.Use
}

// assessment is a condition's status, why and in words.
type assessment struct {
	status          metav1.ConditionStatus
	reason, message string
}

// route is programmed for a route with what else is said of it.
func (t *tally) route(r routeObject, v decide.Verdict) assessment {
	if !v.Accepted.True {
		return notAccepted
	}
	return t.programmed(r.fullName(), v.Parent.String(), r.generation)
}

// policy is programmed for a policy with what is said of it.
func (t *tally) policy(p policyObject, accepted decide.Condition) assessment {
	if !accepted.True {
		return notAccepted
	}
	return t.programmed(p.fullName(), "", p.generation)
}

var notAccepted = assessment{metav1.ConditionFalse, reasonNotAccepted, "see the condition Accepted"}

// setProgrammed says it. Without counts, words that alone have changed stay as they
// were.
func setProgrammed(conditions *[]metav1.Condition, a assessment, generation int64, counts bool, now time.Time) {
	was := meta.FindStatusCondition(*conditions, conditionProgrammed)
	if !counts && was != nil && was.Status == a.status && was.Reason == a.reason && was.ObservedGeneration == generation {
		return
	}
	setAssessment(conditions, conditionProgrammed, a, generation, now)
}

// routeSettled reports whether every proxy has the route for all that it is in force for.
// Before the census there is nothing to wait for.
func (t *tally) routeSettled(r routeObject, verdicts []decide.Verdict) bool {
	return t == nil || !slices.ContainsFunc(verdicts, func(v decide.Verdict) bool {
		return v.Accepted.True && t.route(r, v).status != metav1.ConditionTrue
	})
}

// policySettled is routeSettled for a policy.
func (t *tally) policySettled(p policyObject, accepted decide.Condition) bool {
	return t == nil || !accepted.True || t.policy(p, accepted).status == metav1.ConditionTrue
}

// programmed says how far the proxies have a generation of a route for one of its
// parents, or of a policy. Every agent must have seen that generation: who has not may
// have proxies that it governs.
func (t *tally) programmed(name, parent string, generation int64) assessment {
	var proxies, acknowledged, refused int
	for _, u := range t.uses[useKey{name, parent}] {
		proxies += u.Proxies
		if u.Generation == generation {
			acknowledged += u.Acknowledged
			refused += u.Refused
		}
	}
	var behind, silent, starting []string // nodes
	for _, a := range t.agents {
		switch {
		case !a.ready:
			starting = append(starting, a.node)
		case a.said == nil:
			silent = append(silent, a.node)
		case a.said.Known[name] != generation:
			behind = append(behind, a.node)
		}
	}
	out := assessment{metav1.ConditionTrue, reasonProgrammed, fmt.Sprintf("%d of %d proxies", acknowledged, proxies)}
	say := func(format string, args ...any) { out.message += "; " + fmt.Sprintf(format, args...) }
	switch {
	case refused > 0:
		out.status, out.reason = metav1.ConditionFalse, reasonRejected
		say("%d refused it and keep what they had: their agents' logs say why", refused)
	case acknowledged < proxies || len(behind) > 0:
		out.status, out.reason = metav1.ConditionFalse, reasonPending
	case len(silent) > 0 || len(t.agents) == len(starting):
		out.status, out.reason = metav1.ConditionUnknown, reasonUnreachable
	}
	if len(behind) > 0 {
		say("agents that do not know this generation yet: %s", someOf(behind))
	}
	if len(silent) > 0 {
		say("agents that are ready and do not answer on the port of their metrics: %s", someOf(silent))
	}
	if len(starting) > 0 {
		say("not counted, as the agent is not ready: %s", someOf(starting))
	}
	if len(t.agents) == 0 {
		say("there is no agent")
	}
	return out
}

// someOf names nodes, of many the first.
func someOf(nodes []string) string {
	const named = 5
	if more := len(nodes) - named; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(nodes[:named], ", "), more)
	}
	return strings.Join(nodes, ", ")
}
