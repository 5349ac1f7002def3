package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"github.com/weirmesh/weir/agent/attach"
	"github.com/weirmesh/weir/agent/attachpb"
	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/repair"
	"github.com/weirmesh/weir/install/owner"
)

// How long an agent takes that was told to stop. All of it is to fit into the
// grace period of the manifests, 20 s; without a deletion it is milliseconds.
const (
	// ownerTime is what the API server gets to say whether Weir is deleted.
	ownerTime = 5 * time.Second
	// chainTime is what the installer gets to take the plugin out of the chain, and
	// to say so: the chain goes first. It asks the API server as long as we do.
	chainTime = 7 * time.Second
	// releaseTime is what it takes to let all pods of a node go.
	releaseTime = 5 * time.Second
	// drainTime is what proxies get to end with their connections, so that nothing
	// is left of them. Those that need longer go on without an agent.
	drainTime = time.Second
)

// departure takes Weir off the node, as far as it is the agent's: when the
// installer says so (Attach.Leave), when the agent is stopped because its DaemonSet
// is deleted, or from the beginning (--release).
//
// A pod that were left captured without an agent would go on with the endpoints
// that its proxy knew last, until they are others.
type departure struct {
	owner   *owner.Owner // nil: a stop is a stop
	repairs *repair.Loop
	agent   *attach.Server
	atOnce  bool
	log     *slog.Logger

	left     atomic.Bool
	released chan struct{} // has one when pods were let go
}

func newDeparture(f flags, repairs *repair.Loop, log *slog.Logger) (*departure, error) {
	d := &departure{repairs: repairs, atOnce: f.release, log: log, released: make(chan struct{}, 1)}
	if f.daemonSet == "" {
		return d, nil
	}
	var err error
	if d.owner, err = owner.InCluster(f.daemonSet); err != nil {
		return nil, fmt.Errorf("--daemonset %s: %w", f.daemonSet, err)
	}
	return d, nil
}

// run waits for stopping, and then does what it is stopped for.
func (d *departure) run(ctx, stopping context.Context) error {
	if d.atOnce {
		d.leave(ctx)
	}
	select {
	case <-ctx.Done():
		return nil
	case <-stopping.Done():
	}
	if !d.done() && d.deleted(ctx) {
		d.log.Info("the DaemonSet or its namespace is being deleted: letting all pods go")
		select {
		case <-d.released:
		case <-time.After(chainTime):
			d.leave(ctx) // no installer runs here, or it cannot do its part
		case <-ctx.Done():
		}
	}
	if d.done() {
		draining, cancel := context.WithTimeout(ctx, drainTime)
		defer cancel()
		if n := d.repairs.Drain(draining); n > 0 {
			d.log.Info("proxies go on until the connections that they have end", "proxies", n)
		}
	}
	return nil
}

// deleted says whether the agent is stopped for good. No answer is no.
func (d *departure) deleted(ctx context.Context) bool {
	if d.owner == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, ownerTime)
	defer cancel()
	deleted, err := d.owner.Deleted(ctx)
	if err != nil {
		d.log.Warn("stopped; pods stay captured", "because", err)
	}
	return deleted
}

// leave is Attach.Leave, from inside.
func (d *departure) leave(ctx context.Context) {
	if _, err := d.agent.Leave(ctx, &attachpb.LeaveRequest{}); err != nil && ctx.Err() == nil {
		d.log.Error("not all pods let go", "error", err)
	}
}

// release is what Attach.Leave does beside refusing ADDs.
func (d *departure) release(ctx context.Context) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, releaseTime)
	defer cancel()
	d.left.Store(true)
	draining, err := d.repairs.Leave(ctx)
	if err == nil {
		d.log.Info("all pods let go", "draining", draining)
		select {
		case d.released <- struct{}{}:
		default:
		}
	}
	return draining, err
}

// done says whether pods were let go.
func (d *departure) done() bool { return d.left.Load() }

// removeState removes what an agent keeps on the node, but for what is of proxies
// that still drain: another agent would look after those.
func removeState(f flags) error {
	proxies := []string{}
	if f.proxyDir != "" {
		var err error
		if proxies, err = launch.Placed(f.proxyDir); err != nil {
			return err
		}
	}
	var errs []error
	for _, path := range append(proxies, markerPath(f.runDir), lastGoodPath(f.runDir), authorityPath(f.runDir), authorityPath(f.runDir)+".bad", rootsPath(f.runDir), socketPath(f.runDir)) {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	errs = append(errs, launch.RemoveFolders(f.runDir))
	for _, dir := range []string{f.runDir, f.proxyDir} {
		os.Remove(dir) // if it is empty, and not a mount of the container's
	}
	return errors.Join(errs...)
}
