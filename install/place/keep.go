package place

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/time/rate"
)

const (
	// pollMarker is how often the agent's marker is looked for.
	pollMarker = 200 * time.Millisecond
	// pollChain is how often the chain is looked at without an event: folders can
	// be removed and made again, and event queues overflow.
	pollChain = 10 * time.Second
	// retrySoon is when a file is looked at again that was half written.
	retrySoon = 100 * time.Millisecond

	// Two programs that undo each other's changes must not spin: after burst
	// writes at once, one every interval.
	writeBurst    = 10
	writeInterval = 5 * time.Second
)

// Keeper installs Weir's plugin on a node and keeps it there.
type Keeper struct {
	Plugin Plugin
	Chain  Chain
	// Marker is a file that exists once the agent was ready in this boot. Nothing
	// is chained before: pods would wait for an agent that never came.
	Marker string
	Log    *slog.Logger

	said map[string]string // topic → the last message about it, to say each once
}

// Run installs, and then heals until ctx is done. It leaves everything in place.
// The error is about what no waiting helps: a plugin that cannot be copied, a
// folder that cannot be watched.
func (k *Keeper) Run(ctx context.Context) error {
	if err := errors.Join(sweep(k.Plugin.Dir), sweep(k.Chain.Dir)); err != nil {
		return err
	}
	if err := k.place(); err != nil {
		return err
	}
	if err := k.waitMarker(ctx); err != nil {
		return nil // done before there was anything to heal
	}
	return k.heal(ctx)
}

func (k *Keeper) place() error {
	copied, err := k.Plugin.Place()
	if err != nil {
		return err
	}
	if copied {
		k.Log.Info("plugin placed", "path", k.Plugin.Path())
	}
	return nil
}

// waitMarker returns nil once the marker is there.
func (k *Keeper) waitMarker(ctx context.Context) error {
	ticker := time.NewTicker(pollMarker)
	defer ticker.Stop()
	for {
		_, err := os.Stat(k.Marker)
		if err == nil {
			return nil
		}
		if errors.Is(err, fs.ErrNotExist) {
			k.say("marker", slog.LevelInfo, "waiting for the agent to be ready before the plugin is chained: "+k.Marker)
		} else {
			k.say("marker", slog.LevelWarn, "the agent's marker cannot be seen: "+err.Error())
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}

// heal looks at the chain at every event in the folders, and at every poll.
func (k *Keeper) heal(ctx context.Context) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch the CNI configurations: %w: raise fs.inotify.max_user_instances", err)
	}
	defer watcher.Close()
	poll := time.NewTicker(pollChain)
	defer poll.Stop()
	writes := rate.NewLimiter(rate.Every(writeInterval), writeBurst)
	for {
		// Before looking, so that nothing gets between. Adding again is nothing;
		// a folder that is not there is tried at the next poll.
		for _, dir := range []string{k.Chain.Dir, k.Plugin.Dir} {
			if err := watcher.Add(dir); err != nil {
				k.Log.Debug("folder cannot be watched, only polled", "folder", dir, "err", err)
			}
		}
		soon, err := k.once(ctx, writes)
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-watcher.Events:
		case err := <-watcher.Errors:
			k.Log.Debug("watch", "err", err) // an overflow: look again
		case <-poll.C:
		case <-soon:
		}
	}
}

// once makes things right. The channel fires when to look again without an event.
func (k *Keeper) once(ctx context.Context, writes *rate.Limiter) (<-chan time.Time, error) {
	if !k.Plugin.There() {
		if err := k.place(); err != nil {
			return nil, err
		}
	}
	healed, err := k.Chain.Heal()
	if err := errors.Join(healed.Skipped...); err != nil {
		k.say("skipped", slog.LevelWarn, "passed over what no runtime can use: "+err.Error())
	}
	switch {
	case errors.Is(err, errChanged), errors.Is(err, errUnsettled):
		return time.After(retrySoon), nil
	case errors.Is(err, ErrNoPrimary):
		k.say("chain", slog.LevelInfo, err.Error()+": waiting for the cluster's CNI plugin to write its own")
	case err != nil:
		k.say("chain", slog.LevelError, "pods of this node are not captured: "+err.Error())
	case healed.Changed:
		delete(k.said, "chain")
		k.Log.Info("chained", "primary", healed.Primary, "file", healed.File)
		if writes.Tokens() < 1 {
			k.Log.Warn("another program keeps changing the chain: slowing down. With Cilium set cni.exclusive=false", "file", healed.File)
		}
		if err := writes.Wait(ctx); err != nil {
			return nil, nil // ctx is done
		}
	default:
		k.say("chain", slog.LevelInfo, "the chain is as wanted: "+healed.File)
	}
	return nil, nil
}

// say logs a message if it is not the last one about its topic.
func (k *Keeper) say(topic string, level slog.Level, message string) {
	if k.said[topic] == message {
		return
	}
	if k.said == nil {
		k.said = map[string]string{}
	}
	k.said[topic] = message
	k.Log.Log(context.Background(), level, message)
}
