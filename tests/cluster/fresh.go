package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// ErrBusy says that another run has the cluster of this name.
var ErrBusy = errors.New("another run has this cluster")

// Fresh builds what is missing, ends what a run that was killed has left of the
// cluster of options' Name, and starts it anew. The cluster is this process's until
// it closes what is returned beside it, or ends: meanwhile Fresh with the same
// folder, which must exist, fails with ErrBusy. When ctx ends, nothing stays, logs
// included.
func Fresh(ctx context.Context, folder string, options Options) (*Cluster, io.Closer, error) {
	options, err := options.withDefaults()
	if err != nil {
		return nil, nil, err
	}
	lock, err := lockFolder(folder)
	if err != nil {
		return nil, nil, err
	}
	c, err := fresh(ctx, options)
	if err != nil {
		lock.Close()
		return nil, nil, err
	}
	return c, lock, nil
}

func fresh(ctx context.Context, options Options) (*Cluster, error) {
	if _, err := Build(ctx, options.CacheDir, options.Progress); err != nil {
		return nil, err
	}
	if err := Down(ctx, options); err != nil {
		return nil, err
	}
	c, err := Up(ctx, options)
	if err != nil && ctx.Err() != nil {
		// Nobody asks for the logs of what was interrupted.
		err = errors.Join(errors.New("interrupted"), Down(context.WithoutCancel(ctx), options))
	}
	return c, err
}

// lockFolder locks a folder for this process; the lock goes with the process.
func lockFolder(path string) (io.Closer, error) {
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		dir.Close()
		return nil, fmt.Errorf("%w (%s is locked)", ErrBusy, path)
	}
	return dir, nil
}
