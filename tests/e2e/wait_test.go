package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"
)

// poll asks until ready returns nil or ctx ends; then the error is the last one.
func poll(ctx context.Context, what string, ready func() error) error {
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", what, err)
		}
	}
}

// eventually fails the test when ready does not return nil within limit.
func eventually(t *testing.T, limit time.Duration, what string, ready func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	if err := poll(ctx, what, ready); err != nil {
		t.Fatalf("after %s: %v", limit, err)
	}
}

// must ends the test on an error.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
