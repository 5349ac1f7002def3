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
	api      *cluster.API                // nil: there is none
}

// openView prepares the source that the flags ask for. It does not connect.
func openView(f flags, log *slog.Logger) (*view, error) {
	options, err := decide.ReadOptionsFile(f.options)
	if err != nil {
		return nil, err
	}
	v := &view{store: cluster.NewStore(), options: options}
	v.store.Reach = decide.NewReach(options)
	v.store.Root = f.namespace
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
	v.api = api
	lastGood := cluster.LastGood{Path: lastGoodPath(f.runDir), Version: version}
	v.run = func(ctx context.Context) error { return cluster.RunAPI(ctx, v.store, api, lastGood) }
	return v, nil
}

// refused tells a pod's owner that the pod is denied an identity.
func (v *view) refused(a launch.Attachment, reason string) {
	pod := model.Pod{Namespace: a.PodNamespace, Name: a.PodName, UID: a.PodUID}
	v.recorder.PodEvent(pod, cluster.EventWarning, cluster.CertificateRefused, "the pod's proxy gets no certificate: "+reason)
}

// upgraded tells a pod's owner that another proxy took the place of one that was asked to
// end.
func (v *view) upgraded(a launch.Attachment) {
	pod := model.Pod{Namespace: a.PodNamespace, Name: a.PodName, UID: a.PodUID}
	v.recorder.PodEvent(pod, cluster.EventNormal, cluster.ProxyUpgraded,
		fmt.Sprintf("the pod's proxy was asked to end: another one takes new connections (generation %d), it ends with its last one", a.Generation))
}

// restarted tells a pod's owner that its proxy died and another took its place.
func (v *view) restarted(a launch.Attachment) {
	pod := model.Pod{Namespace: a.PodNamespace, Name: a.PodName, UID: a.PodUID}
	v.recorder.PodEvent(pod, cluster.EventWarning, cluster.ProxyRestarted,
		fmt.Sprintf("the pod's proxy died and was started again on the same listeners (generation %d)", a.Generation))
}
