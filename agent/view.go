package main

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/weirmesh/weir/agent/cluster"
	"github.com/weirmesh/weir/agent/decide"
	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/model"
)

// view is the agent's view of the cluster, and what it was told about it.
type view struct {
	store    *cluster.Store
	options  decide.Options
	recorder *cluster.Recorder
	run      func(context.Context) error // the source; blocks until ctx is done
}

// openView prepares the source that the flags ask for. It does not connect.
func openView(f flags, log *slog.Logger) (*view, error) {
	options, err := decide.ReadOptionsFile(f.options)
	if err != nil {
		return nil, err
	}
	v := &view{store: cluster.NewStore(), options: options}
	if f.manifests != "" {
		v.recorder = &cluster.Recorder{Log: log}
		v.run = func(ctx context.Context) error { return cluster.RunDir(ctx, v.store, f.manifests, log) }
		return v, nil
	}
	api, err := cluster.NewAPI(f.kubeconfig, f.nodeName, log)
	if err != nil {
		return nil, fmt.Errorf("%w; without a cluster, use --manifests DIR", err)
	}
	v.recorder = api.NewRecorder()
	lastGood := cluster.LastGood{Path: lastGoodPath(f.runDir), Version: version}
	v.run = func(ctx context.Context) error { return cluster.RunAPI(ctx, v.store, api, lastGood) }
	return v, nil
}

// restarted tells a pod's owner that its proxy died and another took its place.
func (v *view) restarted(a launch.Attachment) {
	pod := model.Pod{Namespace: a.PodNamespace, Name: a.PodName, UID: a.PodUID}
	v.recorder.PodEvent(pod, cluster.EventWarning, "ProxyRestarted",
		fmt.Sprintf("the pod's proxy died and was started again on the same listeners (generation %d)", a.Generation))
}
