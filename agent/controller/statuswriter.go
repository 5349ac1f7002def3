package controller

import (
	"context"
	"log/slog"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	gateway "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned"

	"github.com/weirmesh/weir/proxy/route"
)

// statusWriter says in routes' status what comes of them.
type statusWriter struct {
	client  gateway.Interface
	watches *routeWatches
	log     *slog.Logger
}

// run looks at all routes at every change, until ctx is done.
func (s *statusWriter) run(ctx context.Context) {
	if s.watches.waitSynced(ctx) != nil {
		return
	}
	repeat(ctx, s.watches.changed, func() bool { return s.once(ctx) })
}

// once returns false if there is something left to do again.
func (s *statusWriter) once(ctx context.Context) bool {
	view := s.watches.view()
	done := true
	for _, r := range view.routes {
		parents, differs := parentStatus(r, view.verdicts(r), time.Now())
		if !differs {
			continue
		}
		patch, err := statusPatch(r.version, parents)
		if err == nil {
			err = s.patch(ctx, r, patch)
		}
		switch {
		case err == nil:
			s.log.DebugContext(ctx, "status written", "route", r.fullName())
		case apierrors.IsConflict(err), apierrors.IsNotFound(err):
			s.log.DebugContext(ctx, "route has changed meanwhile", "route", r.fullName()) // the watch tells how
		case ctx.Err() != nil:
			return true
		default:
			s.log.WarnContext(ctx, "status not written; trying again", "route", r.fullName(), "error", err)
			done = false
		}
	}
	return done
}

func (s *statusWriter) patch(ctx context.Context, r routeObject, patch []byte) error {
	options := metav1.PatchOptions{FieldManager: "weir-controller"}
	const kind, part = types.MergePatchType, "status"
	var err error
	switch v1 := s.client.GatewayV1(); {
	case r.kind == route.HTTPRoute:
		_, err = v1.HTTPRoutes(r.namespace).Patch(ctx, r.name, kind, patch, options, part)
	case r.kind == route.GRPCRoute:
		_, err = v1.GRPCRoutes(r.namespace).Patch(ctx, r.name, kind, patch, options, part)
	case r.old:
		_, err = s.client.GatewayV1alpha2().TCPRoutes(r.namespace).Patch(ctx, r.name, kind, patch, options, part)
	default:
		_, err = v1.TCPRoutes(r.namespace).Patch(ctx, r.name, kind, patch, options, part)
	}
	return err
}
