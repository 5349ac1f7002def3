// bench measures what Weir costs, beside what else there is, in one run. Each
// benchmark is a subcommand; what they have in common is package report.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/weirmesh/weir/tests/bench/report"
	"github.com/weirmesh/weir/tests/pod"
)

// benchmarks are all there are, by name.
var benchmarks = map[string]func(ctx context.Context, args []string, stdout, stderr io.Writer) (int, error){
	"add": runAdd, "dataplane": runDataplane, "config": runConfig, "memory": runMemory, "overload": runOverload,
}

const usage = `bench measures what Weir costs. It prints Markdown, and with OUT=folder in the
environment writes JSON with all samples.

  bench add [flags]         what capture adds to the making of a pod
  bench dataplane [flags]   what requests cost, beside nginx, HAProxy and ReverseProxy
  bench config [flags]      how soon a change in the API server is every proxy's, and what memory that takes
  bench memory [flags]      what a proxy takes while it idles, and an idle connection
  bench overload [flags]    what is left of goodput when five times as much is asked, and beside slow clients

`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var bench func(context.Context, []string, io.Writer, io.Writer) (int, error)
	if len(args) > 0 {
		bench = benchmarks[args[0]]
	}
	if bench == nil {
		fmt.Fprint(stderr, usage)
		if len(args) == 1 && (args[0] == "-h" || args[0] == "--help") {
			return 0
		}
		return 2
	}
	code, err := bench(ctx, args[1:], stdout, stderr)
	switch {
	case err == nil:
		return code
	case errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errUsage):
		return 2 // the flag package has spoken
	case ctx.Err() != nil:
		return pod.Interrupted
	case errors.Is(err, report.ErrNotHeld):
		return 1 // the report says which
	}
	fmt.Fprintln(stderr, "bench:", err)
	return 1
}

var errUsage = errors.New("usage")

// onNode measures on a node of its own: outside it checks and builds, unless bin has
// the programs, and runs this command again on one called name. check, if not nil,
// refuses a machine that lacks something.
func onNode(ctx context.Context, name, bin string, check func() error, measure func(*pod.Node) error) (int, error) {
	node, err := pod.Enter()
	if err != nil {
		return 0, err
	}
	if node != nil {
		return 0, errors.Join(measure(node), node.Close())
	}
	if check != nil {
		if err := check(); err != nil {
			return 0, err
		}
	}
	if err := checkOut(); err != nil {
		return 0, err
	}
	if bin == "" {
		if _, err := pod.Build(ctx); err != nil {
			return 0, err
		}
	}
	return pod.Isolate(ctx, name)
}

// checkOut refuses a folder that a node hides.
func checkOut() error {
	out, err := filepath.Abs(os.Getenv("OUT"))
	if err == nil && strings.HasPrefix(out, pod.NodeDir+"/") {
		return fmt.Errorf("OUT=%s cannot be written to from a node, which has a %s of its own", out, pod.NodeDir)
	}
	return err
}
