package controller

import (
	"context"
	"log/slog"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weirmesh/weir/proxy/route"
)

// statusWriter says in the status of routes and policies what comes of them.
type statusWriter struct {
	clients
	watches *routeWatches
	census  *census // nil: how far proxies have routes and policies is not said
	log     *slog.Logger

	// How many may yet be written in a round of the census of which only a count is another.
	round, routeCounts, policyCounts, authzCounts int
}

// countsEach is how many statuses are written of routes, and how many of each kind of policies, after
// each round of the census, at least soon apart, of which nothing but the number of
// proxies has changed. Pods come and go all the time, and all agents hear of every status.
const countsEach = 10

// run looks at all of them at every change, until ctx is done.
func (s *statusWriter) run(ctx context.Context) {
	if s.watches.waitSynced(ctx) != nil {
		return
	}
	repeat(ctx, s.watches.changed, func() bool { return s.once(ctx) })
}

// once returns false if there is something left to do again.
func (s *statusWriter) once(ctx context.Context) bool {
	view := s.watches.view()
	proxies := s.tally()
	done, settled := true, true
	for _, r := range view.routes {
		verdicts := view.verdicts(r)
		settled = settled && proxies.routeSettled(r, verdicts)
		parents, differs := worthIt(&s.routeCounts, func(counts bool, now time.Time) ([]gatewayv1.RouteParentStatus, bool) {
			return parentStatus(r, verdicts, proxies, counts, now)
		})
		if differs {
			patch, err := statusPatch(r.version, "parents", parents)
			if err == nil {
				err = s.patchRoute(ctx, r, patch)
			}
			done = s.written(ctx, r.fullName(), err) && done
		}
	}
	for _, p := range view.policies {
		accepted := view.accepted(p)
		settled = settled && proxies.policySettled(p, accepted)
		ancestors, differs := worthIt(&s.policyCounts, func(counts bool, now time.Time) ([]gatewayv1.PolicyAncestorStatus, bool) {
			return ancestorStatus(p, accepted, proxies, counts, now)
		})
		if differs {
			patch, err := statusPatch(p.version, "ancestors", ancestors)
			if err == nil {
				err = patchStatus(ctx, s.policies.TrafficPolicies(p.namespace), p.name, patch)
			}
			done = s.written(ctx, p.fullName(), err) && done
		}
	}
	for _, p := range view.authz {
		settled = settled && proxies.authzSettled(p)
		conditions, differs := worthIt(&s.authzCounts, func(counts bool, now time.Time) ([]metav1.Condition, bool) {
			return authzStatus(p, proxies, counts, now)
		})
		if differs {
			patch, err := statusPatch(p.version, "conditions", conditions)
			if err == nil {
				err = p.kind.patch(ctx, s.policies, p.namespace, p.name, patch)
			}
			done = s.written(ctx, p.fullName(), err) && done
		}
	}
	if !settled {
		s.census.want()
	}
	return done
}

// tally is what the census found last; nil if there is none yet.
func (s *statusWriter) tally() *tally {
	if s.census == nil {
		return nil
	}
	t := s.census.tally()
	if t != nil && t.round != s.round {
		s.round, s.routeCounts, s.policyCounts, s.authzCounts = t.round, countsEach, countsEach, countsEach
	}
	return t
}

// worthIt is a status as it should be written, and whether it should: one of which only
// a count is another takes one of those that are left.
func worthIt[E any](left *int, status func(counts bool, now time.Time) ([]E, bool)) ([]E, bool) {
	now := time.Now()
	all, differs := status(true, now)
	if !differs {
		return nil, false
	}
	if _, more := status(false, now); more {
		return all, true
	}
	*left--
	return all, *left >= 0
}

// written says how a patch went. It returns false if it is to be tried again.
func (s *statusWriter) written(ctx context.Context, object string, err error) bool {
	switch {
	case err == nil:
		s.log.DebugContext(ctx, "status written", "object", object)
	case apierrors.IsConflict(err), apierrors.IsNotFound(err):
		s.log.DebugContext(ctx, "object has changed meanwhile", "object", object) // the watch tells how
	case ctx.Err() != nil:
	default:
		s.log.WarnContext(ctx, "status not written; trying again", "object", object, "error", err)
		return false
	}
	return true
}

var patchOptions = metav1.PatchOptions{FieldManager: programName}

// patcher is the part of a typed client that a patch needs; O is the object's type.
type patcher[O any] interface {
	Patch(ctx context.Context, name string, kind types.PatchType, patch []byte, opts metav1.PatchOptions, subresources ...string) (O, error)
}

func patchStatus[O any](ctx context.Context, c patcher[O], name string, patch []byte) error {
	_, err := c.Patch(ctx, name, types.MergePatchType, patch, patchOptions, "status")
	return err
}

func (s *statusWriter) patchRoute(ctx context.Context, r routeObject, patch []byte) error {
	switch v1 := s.gateway.GatewayV1(); {
	case r.kind == route.HTTPRoute:
		return patchStatus(ctx, v1.HTTPRoutes(r.namespace), r.name, patch)
	case r.kind == route.GRPCRoute:
		return patchStatus(ctx, v1.GRPCRoutes(r.namespace), r.name, patch)
	case r.old:
		return patchStatus(ctx, s.gateway.GatewayV1alpha2().TCPRoutes(r.namespace), r.name, patch)
	default:
		return patchStatus(ctx, v1.TCPRoutes(r.namespace), r.name, patch)
	}
}
