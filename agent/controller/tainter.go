package controller

import (
	"context"
	"log/slog"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
)

// settleTime is how long changes are gathered: kubelets of a large cluster report
// all the time.
const settleTime = 50 * time.Millisecond

// Pauses after a patch that the API server did not take.
const (
	firstRetry = time.Second
	maxRetry   = 30 * time.Second
)

// tainter takes the taint off nodes whose agent is ready.
type tainter struct {
	client  kubernetes.Interface
	watches *watches
	log     *slog.Logger
}

// run looks at all tainted nodes at every change, until ctx is done.
func (t *tainter) run(ctx context.Context) {
	if t.watches.waitSynced(ctx) != nil {
		return
	}
	said := map[string]string{} // node → why it still has the taint
	repeat(ctx, t.watches.changed, func() bool { return t.once(ctx, said) })
}

// repeat calls once now and at every change, until ctx is done; and again after a
// pause if it returns false.
func repeat(ctx context.Context, changed <-chan struct{}, once func() bool) {
	retry := firstRetry
	for {
		var again <-chan time.Time
		if once() {
			retry = firstRetry
		} else {
			again = time.After(retry)
			retry = min(2*retry, maxRetry)
		}
		select {
		case <-ctx.Done():
			return
		case <-again:
		case <-changed:
			select {
			case <-ctx.Done():
				return
			case <-time.After(settleTime):
			}
		}
	}
}

// once returns false if there is something left to do again.
func (t *tainter) once(ctx context.Context, said map[string]string) bool {
	waiting := t.watches.waiting()
	for name := range said {
		if _, ok := waiting[name]; !ok {
			delete(said, name)
		}
	}
	done := true
	for name, w := range waiting {
		v := judge(w.node, w.agents)
		if !v.remove {
			if said[name] != v.why {
				said[name] = v.why
				t.log.InfoContext(ctx, "node keeps its taint", "node", name, "because", v.why)
			}
			continue
		}
		if !t.remove(ctx, w.node, v.why) {
			done = false
		}
	}
	return done
}

// remove takes the taint off a node. A node that is another by now is not touched:
// the watch tells what it is.
func (t *tainter) remove(ctx context.Context, n node, why string) bool {
	patch, err := n.withoutTaint()
	if err == nil {
		_, err = t.client.CoreV1().Nodes().Patch(ctx, n.name, types.MergePatchType, patch, patchOptions)
	}
	switch {
	case err == nil:
		t.log.InfoContext(ctx, "taint removed", "node", n.name, "taint", NotReadyTaint, "because", why, "registered", n.made)
	case apierrors.IsConflict(err), apierrors.IsNotFound(err):
		t.log.DebugContext(ctx, "node has changed meanwhile", "node", n.name)
	case ctx.Err() != nil:
	default:
		t.log.WarnContext(ctx, "taint not removed; trying again", "node", n.name, "error", err)
		return false
	}
	return true
}
