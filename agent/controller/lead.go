package controller

import (
	"context"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"k8s.io/klog/v2"

	"github.com/weirmesh/weir/agent/cluster"
)

// Kubernetes' own components have these times. A leader that is killed is missed
// for leaseDuration; one that is told to end hands over, which takes
// retryPeriod and, as that is random, a bit more than twice that at most.
const (
	leaseDuration = 15 * time.Second
	renewDeadline = 10 * time.Second
	retryPeriod   = 2 * time.Second
	// watchdogGrace is how long after its lease ran out a leader that does not
	// notice counts as alive.
	watchdogGrace = 20 * time.Second
)

// lead campaigns until ctx is done, and runs work whenever, and only while, this
// replica holds the Lease. One that loses it, as the API server was away, campaigns
// again.
func lead(ctx context.Context, o Options, client kubernetes.Interface, watchdog *leaderelection.HealthzAdaptor, work func(context.Context)) error {
	for ctx.Err() == nil {
		if err := term(ctx, o, client, watchdog, work); err != nil {
			return err
		}
	}
	return nil
}

// term is one campaign and what follows if it is won. When ctx is done the work is
// ended first and the Lease released then: the next leader finds nobody at work.
func term(ctx context.Context, o Options, client kubernetes.Interface, watchdog *leaderelection.HealthzAdaptor, work func(context.Context)) error {
	candidacy, release := context.WithCancel(klog.NewContext(context.WithoutCancel(ctx), cluster.Quiet(o.Log)))
	defer release()
	started, ended := make(chan struct{}), make(chan struct{})
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Name: o.Lease,
		Lock: &loudLock{
			Interface: &resourcelock.LeaseLock{
				LeaseMeta:  metav1.ObjectMeta{Namespace: o.Namespace, Name: o.Lease},
				Client:     client.CoordinationV1(),
				LockConfig: resourcelock.ResourceLockConfig{Identity: o.Identity},
			},
			state: cluster.Reachability{Kind: "lease", Log: o.Log},
		},
		LeaseDuration: leaseDuration, RenewDeadline: renewDeadline, RetryPeriod: retryPeriod,
		ReleaseOnCancel: true,
		WatchDog:        watchdog,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(leading context.Context) {
				close(started)
				defer close(ended)
				o.Log.Info("leading", "identity", o.Identity)
				leading, stop := context.WithCancel(leading)
				defer stop()
				defer context.AfterFunc(ctx, stop)()
				work(leading)
				o.Log.Info("no longer leading", "identity", o.Identity)
			},
			OnStoppedLeading: func() {},
			OnNewLeader:      func(leader string) { o.Log.Info("leader", "identity", leader) },
		},
	})
	if err != nil {
		return fmt.Errorf("leader election: %w", err)
	}
	watchdog.SetLeaderElection(elector)
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		elector.Run(candidacy)
	}()
	select {
	case <-finished: // the Lease is lost
	case <-ctx.Done():
		select {
		case <-started:
			<-ended
		default: // if the campaign is won just now, the work ends as it begins
		}
		release()
		<-finished
	}
	select {
	case <-started:
		<-ended
	default:
	}
	return nil
}

// loudLock says why the Lease cannot be read or written; client-go's own lines
// about it come at every try.
type loudLock struct {
	resourcelock.Interface
	state cluster.Reachability
}

func (l *loudLock) Get(ctx context.Context) (*resourcelock.LeaderElectionRecord, []byte, error) {
	record, raw, err := l.Interface.Get(ctx)
	l.note(ctx, err)
	return record, raw, err
}

func (l *loudLock) Create(ctx context.Context, record resourcelock.LeaderElectionRecord) error {
	err := l.Interface.Create(ctx, record)
	l.note(ctx, err)
	return err
}

func (l *loudLock) Update(ctx context.Context, record resourcelock.LeaderElectionRecord) error {
	err := l.Interface.Update(ctx, record)
	l.note(ctx, err)
	return err
}

// note leaves out what is part of every election.
func (l *loudLock) note(ctx context.Context, err error) {
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) {
		err = nil
	}
	l.state.Note(ctx, err)
}
