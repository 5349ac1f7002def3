package controller

import (
	"context"
	"log/slog"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weirmesh/weir/agent/decide"
	"github.com/weirmesh/weir/proxy/route"
)

// statusWriter says in the status of routes and policies what comes of them.
type statusWriter struct {
	clients
	watches *routeWatches
	census  *census // nil: how far proxies have routes is not said
	log     *slog.Logger

	round  int // of the census, that counts is of
	counts int // how many routes may be written in it of which only a count is another
}

// countsEach is how many statuses are written after each round of the census, at
// least soon apart, of which nothing but the number of proxies has changed. Pods come
// and go all the time, and all agents hear of every status.
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
		settled = settled && (proxies == nil || proxies.settled(r, verdicts))
		if parents, differs := s.parents(r, verdicts, proxies); differs {
			patch, err := statusPatch(r.version, "parents", parents)
			if err == nil {
				err = s.patchRoute(ctx, r, patch)
			}
			done = s.written(ctx, r.fullName(), err) && done
		}
	}
	for _, p := range view.policies {
		if ancestors, differs := ancestorStatus(p, view.accepted(p), time.Now()); differs {
			patch, err := statusPatch(p.version, "ancestors", ancestors)
			if err == nil {
				_, err = s.policies.TrafficPolicies(p.namespace).Patch(ctx, p.name, patchKind, patch, patchOptions, statusPart)
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
		s.round, s.counts = t.round, countsEach
	}
	return t
}

// parents is a route's status as it should be written, and whether it should.
func (s *statusWriter) parents(r routeObject, verdicts []decide.Verdict, proxies *tally) ([]gatewayv1.RouteParentStatus, bool) {
	now := time.Now()
	all, differs := parentStatus(r, verdicts, proxies, true, now)
	if !differs {
		return nil, false
	}
	if _, more := parentStatus(r, verdicts, proxies, false, now); more {
		return all, true
	}
	s.counts--
	return all, s.counts >= 0
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

// How a status is patched.
const (
	patchKind  = types.MergePatchType
	statusPart = "status"
)

var patchOptions = metav1.PatchOptions{FieldManager: "weir-controller"}

func (s *statusWriter) patchRoute(ctx context.Context, r routeObject, patch []byte) error {
	var err error
	switch v1 := s.gateway.GatewayV1(); {
	case r.kind == route.HTTPRoute:
		_, err = v1.HTTPRoutes(r.namespace).Patch(ctx, r.name, patchKind, patch, patchOptions, statusPart)
	case r.kind == route.GRPCRoute:
		_, err = v1.GRPCRoutes(r.namespace).Patch(ctx, r.name, patchKind, patch, patchOptions, statusPart)
	case r.old:
		_, err = s.gateway.GatewayV1alpha2().TCPRoutes(r.namespace).Patch(ctx, r.name, patchKind, patch, patchOptions, statusPart)
	default:
		_, err = v1.TCPRoutes(r.namespace).Patch(ctx, r.name, patchKind, patch, patchOptions, statusPart)
	}
	return err
}
