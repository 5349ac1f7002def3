package cluster

import (
	"context"
	"fmt"
	"log/slog"
	"sync"

	"github.com/go-logr/logr"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// Object is a pointer to one of Kubernetes' types.
type Object interface {
	metav1.Object
	runtime.Object
}

// Resource is the part of a typed client that a watch needs; L is a list type.
type Resource[L runtime.Object] interface {
	List(ctx context.Context, opts metav1.ListOptions) (L, error)
	Watch(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error)
}

// Selector says which objects of a kind are followed; empty: all.
type Selector struct{ Fields, Labels string }

// Follow has a store told of the objects of one kind until ctx is done. It is
// client-go's reflector, which is the lower half of an informer: it lists, watches
// and starts over by itself. The upper half, a cache of Kubernetes objects, is
// left out: the store keeps what it needs of them. The client is the one that the
// resource is of; a fake one says by itself that it streams no lists.
func Follow[O Object, L runtime.Object](
	ctx context.Context, client any, log *slog.Logger, kind string, example O,
	selector Selector, resource Resource[L], to cache.ReflectorStore,
) {
	state := &Reachability{Kind: kind, Log: log}
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, opts metav1.ListOptions) (runtime.Object, error) {
			opts.FieldSelector, opts.LabelSelector = selector.Fields, selector.Labels
			list, err := resource.List(ctx, opts)
			state.Note(ctx, err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
			opts.FieldSelector, opts.LabelSelector = selector.Fields, selector.Labels
			w, err := resource.Watch(ctx, opts)
			state.Note(ctx, err)
			return w, err
		},
	}
	logger := Quiet(log)
	reflector := cache.NewReflectorWithOptions(cache.ToListWatcherWithWatchListSemantics(lw, client), example, to,
		cache.ReflectorOptions{Name: kind, Logger: &logger})
	reflector.RunWithContext(klog.NewContext(ctx, logger))
}

// watchKind makes the watch of one kind for the Store.
func watchKind[O Object, L runtime.Object](
	api *API, kind string, example O, fields string, resource Resource[L], strip func(O), to sink[O],
) func(ctx context.Context, synced func()) {
	return func(ctx context.Context, synced func()) {
		feed := newFeed(api, kind, strip, to, synced)
		Follow(ctx, api.client, api.log, kind, example, Selector{Fields: fields}, resource, feed)
	}
}

func newFeed[O Object](api *API, kind string, strip func(O), to sink[O], synced func()) *feed[O] {
	return &feed[O]{sink: to, strip: strip, synced: synced, log: api.log.With("kind", kind)}
}

// routeVersion makes a version of a kind of routes for the Store.
func routeVersion[O Object, L runtime.Object](
	api *API, s *Store, kind route.Kind, example O, resource Resource[L], convert func(O) (model.Route, error), synced func(),
) Version {
	name := routeKinds[kind]
	feed := newFeed(api, name, func(o O) { dropManagedFields(o) }, routeSink(s, kind, convert), synced)
	return VersionOf(api.gateway, api.log, name, example, resource, feed)
}

// feed is the store a reflector writes to. It passes on to a sink.
type feed[O Object] struct {
	sink   sink[O]
	strip  func(O)
	synced func() // told of every complete list
	log    *slog.Logger
}

var _ cache.TransformingStore = (*feed[Object])(nil)

// Transformer makes a streamed list small while it is being collected.
func (f *feed[O]) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) {
		if o, ok := obj.(O); ok {
			f.strip(o)
		}
		return obj, nil
	}
}

func (f *feed[O]) Add(obj any) error {
	o, ok := obj.(O)
	if !ok {
		return fmt.Errorf("watch: %T where %T is watched", obj, o)
	}
	if err := f.sink.set(o); err != nil {
		f.skip(o, err)
	}
	return nil
}

func (f *feed[O]) Update(obj any) error { return f.Add(obj) }

func (f *feed[O]) Delete(obj any) error {
	o, ok := obj.(O)
	if !ok {
		return fmt.Errorf("watch: %T where %T is watched", obj, o)
	}
	f.sink.drop(key{o.GetNamespace(), o.GetName()})
	return nil
}

func (f *feed[O]) Replace(list []any, _ string) error {
	objects := make([]O, 0, len(list))
	for _, item := range list {
		o, ok := item.(O)
		if !ok {
			return fmt.Errorf("watch: %T where %T is listed", item, o)
		}
		objects = append(objects, o)
	}
	f.sink.replace(objects, f.skip)
	f.synced()
	return nil
}

func (f *feed[O]) Resync() error { return nil }

// skip leaves out an object that the API server should not have accepted: failing
// instead would have the whole list asked for again, for ever.
func (f *feed[O]) skip(o O, err error) {
	f.log.Warn("object left out", "namespace", o.GetNamespace(), "name", o.GetName(), "error", err)
}

// Reachability says once when an API server stops answering for a kind, and once
// when it answers again.
type Reachability struct {
	Kind string
	Log  *slog.Logger

	mu   sync.Mutex
	last string // the error there is now
}

// Note takes the outcome of a call.
func (r *Reachability) Note(ctx context.Context, err error) {
	if ctx.Err() != nil || apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
		return // the end, or a list that has become too old to go on from
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case err == nil && r.last != "":
		r.last = ""
		r.Log.InfoContext(ctx, "API server answers again", "kind", r.Kind)
	case err != nil && r.last != err.Error():
		r.last = err.Error()
		r.Log.WarnContext(ctx, "API server does not answer; retrying, what is known is kept", "kind", r.Kind, "error", err)
	}
}

// Quiet is a log for client-go: its lines are debug lines. What a person should
// know is said by Reachability.
func Quiet(log *slog.Logger) logr.Logger { return logr.FromSlogHandler(demoted{log.Handler()}) }

// demoted turns client-go's own lines into debug lines: it writes one at every
// attempt to reach a server that is away.
type demoted struct{ slog.Handler }

func (d demoted) Enabled(ctx context.Context, _ slog.Level) bool {
	return d.Handler.Enabled(ctx, slog.LevelDebug)
}

// Handle looks whether it is enabled: an error is handed over without asking.
func (d demoted) Handle(ctx context.Context, r slog.Record) error {
	if !d.Enabled(ctx, r.Level) {
		return nil
	}
	r.Level = slog.LevelDebug
	return d.Handler.Handle(ctx, r)
}

func (d demoted) WithAttrs(attrs []slog.Attr) slog.Handler {
	return demoted{d.Handler.WithAttrs(attrs)}
}

func (d demoted) WithGroup(name string) slog.Handler { return demoted{d.Handler.WithGroup(name)} }
