package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// pollInterval is how often something that cannot be waited for is looked at.
const pollInterval = 100 * time.Millisecond

// poll asks until ready returns nil or ctx ends; then the error is the last one
// ready gave. An error marked by permanent ends it at once.
func poll(ctx context.Context, what string, ready func(context.Context) error) error {
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		if errors.As(err, &permanent{}) {
			return fmt.Errorf("wait for %s: %w", what, err)
		}
		if sleepErr := sleep(ctx, pollInterval); sleepErr != nil {
			return fmt.Errorf("wait for %s: %w (%w)", what, err, sleepErr)
		}
	}
}

// permanent marks an error that waiting does not mend.
type permanent struct{ error }

func (p permanent) Unwrap() error { return p.error }

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// tail returns the last lines of a log, for an error's text.
func tail(path string) string {
	file, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer file.Close()
	const most = 4096 // bytes
	if info, err := file.Stat(); err == nil && info.Size() > most {
		if _, err := file.Seek(-most, io.SeekEnd); err != nil {
			return ""
		}
	}
	buf := make([]byte, most)
	n, _ := file.Read(buf)
	return lastLines(string(buf[:n]), 15)
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "\n")
}
