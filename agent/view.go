package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync"

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

	// What goes through an API server to get pods certificates; nil without one.
	publisher *cluster.Publisher
	issuer    *cluster.Issuer
	roots     *cluster.Roots
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
	v.publisher = api.NewPublisher(v.store)
	v.issuer = api.NewIssuer(v.store, v.recorder.PodEvent)
	v.roots = api.NewRoots(f.namespace)
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

// captureChanged says that other pods than before are captured.
func (v *view) captureChanged() {
	if v.publisher != nil {
		v.publisher.Changed()
	}
}

// certificates runs what keeps pods' certificates possible until ctx is done: it tells the
// cluster which pods are captured, and hears what is to be trusted.
func (v *view) certificates(ctx context.Context, attachments func() []launch.Attachment) {
	if v.publisher == nil {
		return
	}
	v.publisher.Captured = func() (map[string]bool, bool) { return capturedPods(attachments()) }
	var both sync.WaitGroup
	both.Go(func() { v.publisher.Run(ctx) })
	both.Go(func() { v.roots.Run(ctx) })
	both.Wait()
}

// capturedPods are the UIDs of the pods whose traffic is turned aside. It is false if
// there are attachments of which nobody knows yet which pod they are of.
func capturedPods(all []launch.Attachment) (map[string]bool, bool) {
	out, known := map[string]bool{}, true
	for _, a := range all {
		known = known && a.Identified()
		if a.Identified() && a.Committed && !a.Released {
			out[a.PodUID] = true
		}
	}
	return out, known
}

// restarted tells a pod's owner that its proxy died and another took its place.
func (v *view) restarted(a launch.Attachment) {
	pod := model.Pod{Namespace: a.PodNamespace, Name: a.PodName, UID: a.PodUID}
	v.recorder.PodEvent(pod, cluster.EventWarning, "ProxyRestarted",
		fmt.Sprintf("the pod's proxy died and was started again on the same listeners (generation %d)", a.Generation))
}
