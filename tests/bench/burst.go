package main

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/weirmesh/weir/tests/bench/report"
	"github.com/weirmesh/weir/tests/pod"
)

func burstPod(i int) *pod.Pod {
	name := fmt.Sprintf("burst-%d", i)
	return &pod.Pod{Namespace: namespace, Name: name, ContainerID: name}
}

// atOnce takes n pods through the chain at the same time, as kubelet does after a
// node was drained and came back, and out again at the same time. The samples are
// weir-cni's, from exec to exit.
func (b *addBench) atOnce(ctx context.Context, n int) ([]report.Series, error) {
	var mu sync.Mutex
	took := map[string][]float64{}
	chain, err := b.node.NewChain(b.binaries.Folders(), func(command string, r pod.Ran) {
		if r.Plugin == "weir-cni" {
			mu.Lock()
			defer mu.Unlock()
			took[command] = append(took[command], millis(r.Took))
		}
	})
	if err != nil {
		return nil, err
	}
	var pods []*pod.Pod
	for i := range n {
		p := burstPod(i)
		if p.Netns, err = b.node.NewNamespace(p.ContainerID); err != nil {
			return nil, err
		}
		pods = append(pods, p)
	}
	for _, step := range []func(context.Context, *pod.Pod) error{chain.Add, chain.Del} {
		if err := together(ctx, pods, step); err != nil {
			return nil, err
		}
	}
	for _, p := range pods {
		if err := b.node.RemoveNamespace(p.Netns); err != nil {
			return nil, err
		}
	}
	return []report.Series{
		{Name: nameBurst, Unit: "ms", Samples: took["ADD"]},
		{Name: nameBurstDEL, Unit: "ms", Samples: took["DEL"]},
	}, nil
}

// together runs f for all pods at the same time.
func together(ctx context.Context, pods []*pod.Pod, f func(context.Context, *pod.Pod) error) error {
	errs := make([]error, len(pods))
	var running sync.WaitGroup
	for i, p := range pods {
		running.Go(func() { errs[i] = f(ctx, p) })
	}
	running.Wait()
	return errors.Join(errs...)
}
