package cluster

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// settleTime is how long after a first change a directory is read: one write of
	// several files, or of one in several steps, is then one change.
	settleTime = 50 * time.Millisecond
	// retryTime is how long after a bad read it is read again, changed or not: the
	// directory may have been away, and its watch with it.
	retryTime = time.Second
)

// RunDir keeps the Store up to date from a directory of manifests until ctx is
// done: the same YAML or JSON that an API server takes, read strictly. Namespaces
// need no object; without one they have no labels. Every pod in the directory
// counts as this node's.
//
// The directory as a whole is one state: any change has all of it read again. A
// mistake in it, which names file, document and field, is RunDir's error at the
// start; later it is logged, and the Store keeps the last good state.
func RunDir(ctx context.Context, s *Store, dir string, log *slog.Logger) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("manifests: %w", err)
	}
	defer watcher.Close()
	d := &directory{path: dir, store: s, watcher: watcher, log: log}

	s.mu.Lock()
	s.impliedNamespaces = true
	s.mu.Unlock()
	if err := d.load(); err != nil {
		return err
	}
	s.markSynced()
	d.follow(ctx)
	return nil
}

// directory is a directory of manifests under watch.
type directory struct {
	path    string
	store   *Store
	watcher *fsnotify.Watcher
	log     *slog.Logger
	bad     string // the mistake there is now, already logged
}

// load reads the directory into the Store.
func (d *directory) load() error {
	// Watch first, so that no change falls between. Again every time: a directory
	// that was replaced is another inode. Watching one twice changes nothing.
	if err := d.watcher.Add(d.path); err != nil {
		return fmt.Errorf("manifests: %s: %w", d.path, err)
	}
	v, err := readDir(d.path)
	if err != nil {
		return fmt.Errorf("manifests: %w", err)
	}
	d.store.replace(v)
	return nil
}

// follow loads the directory whenever it has changed.
func (d *directory) follow(ctx context.Context) {
	timer := time.NewTimer(0)
	timer.Stop()
	defer timer.Stop()
	pending := false // the timer runs because of a change
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.watcher.Events:
			if !pending {
				timer.Reset(settleTime)
				pending = true
			}
		case err := <-d.watcher.Errors: // an overflow: changes were missed
			d.log.WarnContext(ctx, "manifests: watch", "error", err)
			timer.Reset(settleTime)
			pending = true
		case <-timer.C:
			pending = false
			if !d.reload(ctx) {
				timer.Reset(retryTime)
			}
		}
	}
}

// reload loads the directory or says once why not.
func (d *directory) reload(ctx context.Context) bool {
	err := d.load()
	switch {
	case err != nil && err.Error() != d.bad:
		d.bad = err.Error()
		d.log.ErrorContext(ctx, "manifests are not valid; the last good ones stay in force", "error", err)
	case err == nil && d.bad != "":
		d.bad = ""
		d.log.InfoContext(ctx, "manifests are valid again", "dir", d.path)
	}
	return err == nil
}
