package repair

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/model"
)

// node is a node's proxies, without any.
type node struct {
	Proxies // nil: what Leave does not use
	mu      sync.Mutex
	all     []launch.Attachment
	broken  bool // its rules cannot be changed
	log     []string
}

func (n *node) List() []launch.Attachment {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.all)
}

func (n *node) change(id string, f func(*launch.Attachment)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for i := range n.all {
		if n.all[i].ContainerID == id {
			f(&n.all[i])
		}
	}
}

func (n *node) Farewell(id string) error {
	n.log = append(n.log, "farewell "+id)
	return nil
}

func (n *node) Release(id string) error {
	n.log = append(n.log, "proxy "+id)
	n.change(id, func(a *launch.Attachment) { a.Released = true })
	return nil
}

func (n *node) Rules(_ context.Context, tasks []launch.Task) ([]launch.Done, error) {
	if n.broken {
		return nil, errors.New("broken")
	}
	var out []launch.Done
	for _, t := range tasks {
		n.log = append(n.log, t.Do+" "+t.Netns)
		out = append(out, launch.Done{Netns: t.Netns})
	}
	return out, nil
}

type nothing struct{}

func (nothing) Pods() []model.Pod                { return nil }
func (nothing) Namespace(string) model.Namespace { return model.Namespace{} }

func loop(n *node) *Loop {
	return &Loop{
		View: nothing{}, Proxies: n, Current: func() bool { return true }, Event: func(model.Pod, string, string, string) {},
		Count: func(string, error) {}, Log: slog.New(slog.DiscardHandler),
	}
}

func TestLeaveLetsGoWhoIsCapturedAndWhoIsAboutToBe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &node{all: []launch.Attachment{
			{ContainerID: "a", Netns: "A", Committed: true},
			{ContainerID: "b", Netns: "B"}, // its ADD is under way
			{ContainerID: "c", Netns: "C", Committed: true, Released: true},
		}}
		l := loop(n)
		go func() {
			time.Sleep(time.Second)
			n.change("b", func(a *launch.Attachment) { a.Committed = true })
		}()
		draining, err := l.Leave(t.Context())
		if draining != 3 || err != nil {
			t.Errorf("%d draining, %v", draining, err)
		}
		// The rules first: a proxy that ends must not be dialled.
		want := "farewell a, release A, proxy a, farewell b, release B, proxy b"
		if got := strings.Join(n.log, ", "); got != want {
			t.Errorf("%s, want %s", got, want)
		}
		n.all = append(n.all, launch.Attachment{ContainerID: "d", Netns: "D", Committed: true})
		l.round(t.Context()) // would compare its rules
		if got := strings.Join(n.log, ", "); got != want {
			t.Errorf("after it left, the loop goes on: %s", got)
		}
	})
}

func TestLeaveSaysWhatIsStillCaptured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := loop(&node{broken: true, all: []launch.Attachment{{ContainerID: "a", Committed: true}}}).Leave(ctx)
		if err == nil || !strings.Contains(err.Error(), "1 pods are still captured") {
			t.Errorf("%v", err)
		}
	})
}
