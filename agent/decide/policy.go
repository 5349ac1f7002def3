package decide

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// Reasons of a policy's condition Accepted, beside Accepted and Conflicted, as the
// Gateway API has them (v1.6, PolicyConditionReason). Invalid is what could not be
// read, and so is no model.TrafficPolicy.
const (
	TargetNotFound = "TargetNotFound"
	Invalid        = "Invalid"
)

// Policies finds the TrafficPolicies about a Service, in any order.
type Policies func(namespace, name string) []model.TrafficPolicy

// policy is how a Service's clients are to treat it: as the policy in force says, and
// the Service itself by its sessionAffinity. Nil: by default.
func policy(svc model.Service, find Policies) *route.Policy {
	oldest, ok := inForce(find(svc.Namespace, svc.Name))
	if !ok && svc.Affinity == 0 {
		return nil
	}
	out := oldest.Policy
	out.Affinity = svc.Affinity
	if out.RateLimit != nil && out.RateLimit.PerClient {
		out.RateLimit = nil // the Service's own pods count
	}
	return &out
}

// Inbound is what holds for callers of a pod with these addresses, by the port that
// they reach: the rate limits which count each of them, of the Services that the pod
// is behind. policies are all there are, in any order; rivals finds those among them
// that are about one Service. Beside it is which of them it is made of.
func Inbound(addrs []netip.Addr, policies []model.TrafficPolicy, rivals Policies, find Lookup) (map[uint16]*route.Policy, []model.Governing) {
	limits := slices.DeleteFunc(slices.Clone(policies), func(p model.TrafficPolicy) bool {
		return p.Policy.RateLimit == nil || !p.Policy.RateLimit.PerClient
	})
	slices.SortFunc(limits, func(a, b model.TrafficPolicy) int {
		return cmp.Or(a.Created.Compare(b.Created), strings.Compare(a.ID(), b.ID()))
	})
	out := map[uint16]*route.Policy{}
	var governing []model.Governing
	for _, p := range limits {
		if oldest, _ := inForce(rivals(p.Namespace, p.Service)); oldest.ID() != p.ID() {
			continue
		}
		_, endpointSlices, _ := find(p.Namespace, p.Service)
		before := len(out)
		for _, port := range portsOf(addrs, endpointSlices) {
			if out[port] == nil {
				out[port] = &route.Policy{Name: p.ID(), RateLimit: p.Policy.RateLimit}
			}
		}
		if len(out) > before {
			governing = append(governing, governingPolicy(p))
		}
	}
	return out, governing
}

// portsOf are the TCP ports at which slices have one of the addresses, ready or not.
func portsOf(addrs []netip.Addr, endpointSlices []model.EndpointSlice) []uint16 {
	var out []uint16
	for _, s := range endpointSlices {
		if !slices.ContainsFunc(s.Endpoints, func(e model.Endpoint) bool { return slices.Contains(addrs, e.Address) }) {
			continue
		}
		for _, p := range s.Ports {
			if p.Protocol == model.TCP {
				out = append(out, p.Port)
			}
		}
	}
	return out
}

// inForce is the oldest of the policies about one Service; of one age, that whose
// name comes first (GEP-713, conflict resolution). It is false if there is none.
func inForce(policies []model.TrafficPolicy) (model.TrafficPolicy, bool) {
	if len(policies) == 0 {
		return model.TrafficPolicy{}, false
	}
	return slices.MinFunc(policies, func(a, b model.TrafficPolicy) int {
		return cmp.Or(a.Created.Compare(b.Created), strings.Compare(a.Name, b.Name))
	}), true
}

// PolicyAccepted judges a policy: the condition Accepted, with regard to its Service.
// The policy is among those that rivals finds.
func PolicyAccepted(p model.TrafficPolicy, rivals Policies, find Lookup) Condition {
	id := p.Namespace + "/" + p.Service
	svc, _, ok := find(p.Namespace, p.Service)
	switch {
	case !ok:
		return no(TargetNotFound, "there is no Service %s", id)
	case svc.External:
		return no(TargetNotFound, "Service %s is of type ExternalName", id)
	}
	if oldest, _ := inForce(rivals(p.Namespace, p.Service)); oldest.ID() != p.ID() {
		return no(Conflicted, "TrafficPolicy %s is about Service %s too, and older", oldest.Name, id)
	}
	return Condition{True: true, Reason: Accepted}
}
