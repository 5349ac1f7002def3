package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"

	"github.com/weirmesh/weir/agent/cluster"
	"github.com/weirmesh/weir/agent/decide"
	"github.com/weirmesh/weir/agent/identity"
	"github.com/weirmesh/weir/agent/issue"
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

// newIssuer is who signs for this agent's pods: without a cluster, a CA of its own. On a
// cluster there is nobody yet: nil, and no pod has an identity.
func newIssuer(f flags, v *view, log *slog.Logger) (*issue.Local, error) {
	if f.manifests == "" {
		return nil, nil
	}
	domain, err := identity.TrustDomain(v.options.TrustDomain)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(f.runDir, 0o700); err != nil {
		return nil, err
	}
	return issue.OpenLocal(issue.Options{Path: authorityPath(f.runDir), TrustDomain: domain, Pod: v.store.Pod, Log: log})
}

// refused tells a pod's owner that the pod is denied an identity.
func (v *view) refused(a launch.Attachment, reason string) {
	pod := model.Pod{Namespace: a.PodNamespace, Name: a.PodName, UID: a.PodUID}
	v.recorder.PodEvent(pod, cluster.EventWarning, cluster.CertificateRefused, "the pod's proxy gets no certificate: "+reason)
}

// restarted tells a pod's owner that its proxy died and another took its place.
func (v *view) restarted(a launch.Attachment) {
	pod := model.Pod{Namespace: a.PodNamespace, Name: a.PodName, UID: a.PodUID}
	v.recorder.PodEvent(pod, cluster.EventWarning, "ProxyRestarted",
		fmt.Sprintf("the pod's proxy died and was started again on the same listeners (generation %d)", a.Generation))
}
