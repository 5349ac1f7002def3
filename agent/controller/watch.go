package controller

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/weirmesh/weir/agent/cluster"
)

// watches are the controller's view of the cluster.
type watches struct {
	nodes   *kept[*corev1.Node, node]
	agents  *kept[*corev1.Pod, agent]
	changed chan struct{} // one waiting change stands for all
}

func newWatches() *watches {
	w := &watches{changed: make(chan struct{}, 1)}
	w.nodes = newKept(toNode, w.change)
	w.agents = newKept(toAgent, w.change)
	return w
}

func (w *watches) change() {
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// synced says whether both watches have had their first complete list.
func (w *watches) synced() bool { return w.nodes.done() && w.agents.done() }

// waitSynced returns when synced is true, or an error with ctx.
func (w *watches) waitSynced(ctx context.Context) error {
	return waitAll(ctx, w.nodes.synced, w.agents.synced)
}

// waitAll returns when all are closed, or an error with ctx.
func waitAll(ctx context.Context, closed ...chan struct{}) error {
	for _, c := range closed {
		select {
		case <-c:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// waiting are the nodes that have the taint, and the agents of each.
func (w *watches) waiting() map[string]tainted {
	out := map[string]tainted{}
	for n := range w.nodes.each {
		if n.waiting {
			out[n.name] = tainted{node: n}
		}
	}
	if len(out) == 0 {
		return nil
	}
	for a := range w.agents.each {
		if t, ok := out[a.node]; ok {
			t.agents = append(t.agents, a)
			out[a.node] = t
		}
	}
	for _, t := range out {
		slices.SortFunc(t.agents, func(a, b agent) int { return strings.Compare(a.pod, b.pod) })
	}
	return out
}

type tainted struct {
	node   node
	agents []agent
}

// kept is what is kept of the objects of one kind, as a reflector tells of them.
type kept[O cluster.Object, V any] struct {
	convert func(O) V
	changed func()
	synced  chan struct{} // closed by the first complete list

	once   sync.Once
	mu     sync.Mutex
	values map[string]V // by namespace and name
}

var _ cache.ReflectorStore = (*kept[*corev1.Node, node])(nil)

func newKept[O cluster.Object, V any](convert func(O) V, changed func()) *kept[O, V] {
	return &kept[O, V]{convert: convert, changed: changed, synced: make(chan struct{}), values: map[string]V{}}
}

func (k *kept[O, V]) done() bool {
	select {
	case <-k.synced:
		return true
	default:
		return false
	}
}

// each is a sequence of all values. The loop over it must not call back here.
func (k *kept[O, V]) each(yield func(V) bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, v := range k.values {
		if !yield(v) {
			return
		}
	}
}

// Add keeps an object.
func (k *kept[O, V]) Add(obj any) error {
	o, ok := obj.(O)
	if !ok {
		return fmt.Errorf("watch: %T where %T is watched", obj, o)
	}
	k.mu.Lock()
	k.values[o.GetNamespace()+"/"+o.GetName()] = k.convert(o)
	k.mu.Unlock()
	k.changed()
	return nil
}

// Update keeps an object as it is now.
func (k *kept[O, V]) Update(obj any) error { return k.Add(obj) }

// Delete forgets an object.
func (k *kept[O, V]) Delete(obj any) error {
	o, ok := obj.(O)
	if !ok {
		return fmt.Errorf("watch: %T where %T is watched", obj, o)
	}
	k.mu.Lock()
	delete(k.values, o.GetNamespace()+"/"+o.GetName())
	k.mu.Unlock()
	k.changed()
	return nil
}

// Replace keeps a list in place of what was there.
func (k *kept[O, V]) Replace(list []any, _ string) error {
	values := make(map[string]V, len(list))
	for _, item := range list {
		o, ok := item.(O)
		if !ok {
			return fmt.Errorf("watch: %T where %T is listed", item, o)
		}
		values[o.GetNamespace()+"/"+o.GetName()] = k.convert(o)
	}
	k.mu.Lock()
	k.values = values
	k.mu.Unlock()
	k.once.Do(func() { close(k.synced) })
	k.changed()
	return nil
}

// Resync has nothing to do: nothing is queued.
func (k *kept[O, V]) Resync() error { return nil }
