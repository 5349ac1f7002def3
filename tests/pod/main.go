package pod

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// Main is the TestMain of tests that share a node, and returns their exit code.
// Outside a node it builds, calls build if there is more to be built, and runs the
// program again on one, called name; there, ready is called with the node and its
// programs before the tests are run. Without root the tests are run without a node.
func Main(name string, build func(context.Context, Binaries) error, ready func(context.Context, *Node, Binaries) error, run func() int) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	code, err := runOnNode(ctx, name, build, ready, run)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

func runOnNode(ctx context.Context, name string, build func(context.Context, Binaries) error, ready func(context.Context, *Node, Binaries) error, run func() int) (int, error) {
	if os.Geteuid() != 0 {
		return run(), nil
	}
	node, err := Enter()
	if err != nil {
		return 0, err
	}
	if node == nil {
		built, err := Build(ctx)
		if err == nil && build != nil {
			err = build(ctx, built)
		}
		if err != nil {
			return 0, err
		}
		return Isolate(ctx, name)
	}
	programs, err := FindBuilt()
	if err != nil {
		return 0, err
	}
	if err := ready(ctx, node, programs); err != nil {
		return 0, err
	}
	return run(), node.Close()
}
