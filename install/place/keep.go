package place

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// pollMarker is how often the agent's marker is looked for.
	pollMarker = 200 * time.Millisecond
	// pollChain is how often the chain is looked at without an event: folders can
	// be removed and made again, and event queues overflow.
	pollChain = 10 * time.Second
	// pollMissing is how often a folder is looked for that is not there.
	pollMissing = 500 * time.Millisecond
	// retrySoon is when a file is looked at again that was half written.
	retrySoon = 100 * time.Millisecond
	// together is how long events are gathered before the folder is looked at: a
	// file that is written is several events.
	together = 10 * time.Millisecond
)

// Keeper installs Weir's plugin on a node and keeps it there.
type Keeper struct {
	Plugin Plugin
	Chain  Chain
	// Marker is a file that exists once the agent was ready in this boot. Nothing
	// is chained before: pods would wait for an agent that never came.
	Marker string
	// Form is how the plugin is chained. With Auto, Loaded is asked.
	Form Form
	// Loaded lists the types of the plugins that the container runtime has loaded
	// for pods; nil: it cannot be asked.
	Loaded func(context.Context) ([]string, error)
	Log    *slog.Logger

	form formState
	pace pace
	said map[string]string // topic → the last message about it, to say each once
}

// Run installs, and then heals until ctx is done. It leaves everything in place.
// The error is about what no waiting helps: a plugin that cannot be copied, a
// folder that cannot be watched.
func (k *Keeper) Run(ctx context.Context) error {
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
	for {
		// Before looking, so that nothing gets between. Adding again is nothing.
		var missing <-chan time.Time
		for _, dir := range k.watched() {
			if err := watcher.Add(dir); err != nil {
				k.Log.Debug("folder cannot be watched, only polled", "folder", dir, "err", err)
				missing = time.After(pollMissing)
			}
		}
		watched := k.form.dropIn
		soon, err := k.once(ctx)
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return nil
		}
		if k.form.dropIn != watched {
			continue // its folder may have changed before it is watched
		}
		select {
		case <-ctx.Done():
			return nil
		case <-watcher.Events:
			gather(watcher)
		case <-missing:
		case err := <-watcher.Errors:
			k.Log.Debug("watch", "err", err) // an overflow: look again
		case <-poll.C:
		case <-soon:
		}
	}
}

// watched are the folders whose files are ours to keep: the drop-in's too.
func (k *Keeper) watched() []string {
	dirs := []string{k.Chain.Dir, k.Plugin.Dir}
	if k.form.dropIn != "" {
		dirs = append(dirs, filepath.Dir(k.form.dropIn))
	}
	return dirs
}

// gather takes what follows an event at once as one with it.
func gather(watcher *fsnotify.Watcher) {
	enough := time.After(together)
	for {
		select {
		case <-watcher.Events:
		case <-enough:
			return
		}
	}
}

// once makes things right. The channel fires when to look again without an event.
func (k *Keeper) once(ctx context.Context) (<-chan time.Time, error) {
	if !k.Plugin.There() {
		if err := k.place(); err != nil {
			return nil, err
		}
	}
	healed, err := k.chain(ctx)
	if err := errors.Join(healed.Skipped...); err != nil {
		k.say("skipped", slog.LevelWarn, "passed over what no runtime can use: "+err.Error())
	}
	if healed.Changed {
		delete(k.said, "chain")
		k.Log.Info("chained", "primary", healed.Primary, "file", healed.File)
		k.rest(ctx, healed.File)
	}
	switch {
	case errors.Is(err, errChanged), errors.Is(err, errUnsettled):
		return time.After(retrySoon), nil
	case errors.Is(err, ErrNoPrimary):
		k.say("chain", slog.LevelInfo, err.Error()+": waiting for the cluster's CNI plugin to write its own")
	case err != nil:
		k.say("chain", slog.LevelError, "pods of this node are not captured: "+err.Error())
	case !healed.Changed:
		k.say("chain", slog.LevelInfo, "the chain is as wanted: "+healed.File)
	}
	return nil, nil
}

// rest pauses after a write if another program keeps changing back what is
// written: two that each insist would spin.
func (k *Keeper) rest(ctx context.Context, file string) {
	pause := k.pace.next(time.Now())
	if pause == 0 {
		return
	}
	k.Log.Warn("another program keeps changing the chain back: pods started meanwhile are not captured. With Cilium set cni.exclusive=false",
		"reason", "ChainContested", "file", file, "writes", k.pace.streak, "pause", pause)
	select {
	case <-time.After(pause):
	case <-ctx.Done():
	}
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
