package cluster

import (
	"context"
	"log/slog"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

// How often it is looked whether a kind is served: soon after the start, then ever
// less often.
const (
	firstLook = time.Second
	lastLook  = 30 * time.Second
)

// Version is one version of a kind that a CRD brings, which may be there or not.
// Use VersionOf.
type Version struct {
	look   func(ctx context.Context) error // NotFound: it is not served
	follow func(ctx context.Context)       // returns when it is served no longer, too
}

// VersionOf makes a Version; the parameters are Follow's.
func VersionOf[O Object, L runtime.Object](
	client any, log *slog.Logger, kind string, example O, resource Resource[L], to cache.ReflectorStore,
) Version {
	return Version{
		look: func(ctx context.Context) error {
			_, err := resource.List(ctx, metav1.ListOptions{Limit: 1})
			return err
		},
		follow: func(ctx context.Context) {
			ctx, gone := context.WithCancel(ctx)
			defer gone()
			Follow(ctx, client, log, kind, example, Selector{}, whileServed[L]{resource, gone}, to)
		},
	}
}

// whileServed says when a kind is not served: a list of all objects is found, else.
type whileServed[L runtime.Object] struct {
	Resource[L]
	gone func()
}

func (w whileServed[L]) List(ctx context.Context, opts metav1.ListOptions) (L, error) {
	list, err := w.Resource.List(ctx, opts)
	w.note(err)
	return list, err
}

func (w whileServed[L]) Watch(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
	stream, err := w.Resource.Watch(ctx, opts)
	w.note(err)
	return stream, err
}

func (w whileServed[L]) note(err error) {
	if apierrors.IsNotFound(err) {
		w.gone()
	}
}

// FollowServed follows a kind until ctx is done, for as long as the API server
// serves it, in the first of the versions that it has. While it has none, absent is
// called, at least once, and it is looked again, after 1 s and then up to 30 s.
func FollowServed(ctx context.Context, log *slog.Logger, kind string, absent func(), versions ...Version) {
	state := &Reachability{Kind: kind, Log: log}
	for pause := firstLook; ctx.Err() == nil; pause = min(2*pause, lastLook) {
		v, err := firstServed(ctx, versions)
		state.Note(ctx, err)
		switch {
		case err != nil:
		case v != nil:
			v.follow(ctx)
			pause = firstLook
		default:
			absent()
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// firstServed is nil if there is none.
func firstServed(ctx context.Context, versions []Version) (*Version, error) {
	for i, v := range versions {
		if err := v.look(ctx); err == nil {
			return &versions[i], nil
		} else if !apierrors.IsNotFound(err) {
			return nil, err
		}
	}
	return nil, nil
}
