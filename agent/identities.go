package main

import (
	"context"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/weirmesh/weir/agent/cluster"
	"github.com/weirmesh/weir/agent/identity"
	"github.com/weirmesh/weir/agent/issue"
	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/push"
)

// identities is what gives this node's pods their certificates, and tells those who reach
// a pod that it has one.
type identities struct {
	issuer interface {
		push.Issuer
		// Ends is when the first root that is trusted expires, and who signs; zero: that
		// is not known.
		Ends() (root, issuer time.Time)
	}
	// changed says that other pods than before are captured. It does not wait.
	changed func()
	// run keeps it going until ctx is done.
	run func(ctx context.Context, pusher *push.Pusher, attachments func() []launch.Attachment)
}

// openIdentities prepares those of the cluster, or without one a CA of the agent's own.
func openIdentities(f flags, v *view, log *slog.Logger) (*identities, error) {
	domain, err := identity.TrustDomain(v.options.TrustDomain)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(f.runDir, 0o700); err != nil {
		return nil, err
	}
	if v.api == nil {
		local, err := issue.OpenLocal(issue.Options{
			Path: authorityPath(f.runDir), TrustDomain: domain, Given: f.issuer, TTL: v.options.CertificateTTL.Duration, Pod: v.store.Pod, Log: log,
		})
		if err != nil {
			return nil, err
		}
		return localIdentities(local, v.store), nil
	}
	signer := v.api.NewIssuer(v.store, v.options.CertificateTTL.Duration)
	return clusterIdentities(issue.NewCluster(issue.ClusterOptions{
		Path: rootsPath(f.runDir), TrustDomain: domain, Pod: v.store.Pod, Sign: signer.Issue, Log: log,
	}), v.api.NewPublisher(v.store), v.api.NewRoots(f.namespace)), nil
}

// localIdentities are those of an agent that is alone: what it has captured, it tells
// itself.
func localIdentities(local *issue.Local, store *cluster.Store) *identities {
	changes := make(chan struct{}, 1)
	return &identities{
		issuer: local,
		changed: func() {
			select {
			case changes <- struct{}{}:
			default:
			}
		},
		run: func(ctx context.Context, pusher *push.Pusher, attachments func() []launch.Attachment) {
			var both sync.WaitGroup
			both.Go(func() { local.Run(ctx, pusher.Trusted, pusher.Changed) })
			both.Go(func() {
				for {
					store.SetCaptured(capturedNames(attachments()))
					select {
					case <-changes:
					case <-ctx.Done():
						return
					}
				}
			})
			both.Wait()
		},
	}
}

// capturedNames are the pods whose traffic is turned aside, with their addresses.
func capturedNames(all []launch.Attachment) map[string][]netip.Addr {
	out := map[string][]netip.Addr{}
	for _, a := range all {
		if a.Capturing() {
			out[a.PodNamespace+"/"+a.PodName] = a.Addresses
		}
	}
	return out
}

// clusterIdentities are those that the cluster's signer gives.
func clusterIdentities(signed *issue.Cluster, publisher *cluster.Publisher, roots *cluster.Roots) *identities {
	return &identities{
		issuer: signed, changed: publisher.Changed,
		run: func(ctx context.Context, pusher *push.Pusher, attachments func() []launch.Attachment) {
			publisher.Captured = func() (map[string]bool, bool) { return capturedPods(attachments()) }
			roots.Changed = func() {
				if signed.SetRoots(roots.List()) {
					pusher.Changed()
				}
			}
			var both sync.WaitGroup
			both.Go(func() { publisher.Run(ctx) })
			both.Go(func() { roots.Run(ctx) })
			both.Wait()
		},
	}
}

// capturedPods are the UIDs of the pods whose traffic is turned aside. It is false if
// there are attachments of which nobody knows yet which pod they are of.
func capturedPods(all []launch.Attachment) (map[string]bool, bool) {
	out, known := map[string]bool{}, true
	for _, a := range all {
		known = known && a.Identified()
		if a.Identified() && a.Capturing() {
			out[a.PodUID] = true
		}
	}
	return out, known
}
