// Command weir-cluster runs the test cluster from a shell: build, up, status,
// down. Package cluster says what the cluster is.
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
	"syscall"
	"time"

	"github.com/weirmesh/weir/tests/cluster"
)

const usage = `usage: weir-cluster <command> [flags]

  build   build the cluster's programs into the cache (once per version)
  up      start a cluster, building first what is missing; it goes on running
  status  say whether it runs, and how to use it
  down    end it and remove everything it made

Flags of a command: weir-cluster <command> -h
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "weir-cluster:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return flag.ErrHelp
	}
	began := time.Now()
	options := cluster.Options{Progress: func(line string) {
		fmt.Fprintf(stderr, "%5.1fs %s\n", time.Since(began).Seconds(), line)
	}}
	flags := flag.NewFlagSet("weir-cluster "+args[0], flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&options.CacheDir, "cache", "", "folder of the built programs (default: weir/cluster in the user's cache folder)")
	if args[0] != "build" {
		flags.StringVar(&options.Name, "name", "weir", "the cluster's name, the prefix of all that is the host's: up to 8 lower-case letters and digits")
		flags.StringVar(&options.StateDir, "state", "", "state folder (default: /var/tmp/weir-cluster/<name>)")
	}
	if args[0] == "up" {
		flags.IntVar(&options.Nodes, "nodes", 2, "how many nodes, 1 to 9")
		flags.BoolVar(&options.IPv4Only, "ipv4-only", false, "no IPv6; otherwise nodes, pods and services are dual stack")
	}
	command, ok := map[string]func(context.Context, cluster.Options, io.Writer) error{
		"build": build, "up": up, "status": status, "down": down,
	}[args[0]]
	if !ok {
		fmt.Fprint(stderr, usage)
		return fmt.Errorf("no command %q", args[0])
	}
	if err := flags.Parse(args[1:]); err != nil {
		return flag.ErrHelp
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("%s takes no arguments, got %q", args[0], flags.Args())
	}
	return command(ctx, options, stdout)
}

func build(ctx context.Context, options cluster.Options, stdout io.Writer) error {
	binaries, err := cluster.Build(ctx, options.CacheDir, options.Progress)
	if err != nil {
		return err
	}
	fmt.Fprintln(stdout, "programs are built; kubectl:", filepath.Join(binaries.Kubernetes, "kubectl"))
	return nil
}

func up(ctx context.Context, options cluster.Options, stdout io.Writer) error {
	if err := cluster.CheckHost(); err != nil {
		return err
	}
	if _, err := cluster.Build(ctx, options.CacheDir, options.Progress); err != nil {
		return err
	}
	c, err := cluster.Up(ctx, options)
	if err != nil {
		return err
	}
	options.Progress("the cluster is up")
	describe(c, stdout)
	return nil
}

func status(_ context.Context, options cluster.Options, stdout io.Writer) error {
	c, err := cluster.Attach(stateDir(options))
	if err != nil {
		return err
	}
	describe(c, stdout)
	return nil
}

func down(ctx context.Context, options cluster.Options, _ io.Writer) error {
	if err := cluster.Down(ctx, options); err != nil {
		return err
	}
	options.Progress("the cluster is down")
	return nil
}

func stateDir(options cluster.Options) string {
	if options.StateDir != "" {
		return options.StateDir
	}
	return cluster.DefaultStateDir(options.Name)
}

func describe(c *cluster.Cluster, out io.Writer) {
	fmt.Fprintf(out, "export KUBECONFIG=%s\nexport PATH=%s:$PATH\n", c.Kubeconfig, c.Bin())
	fmt.Fprintf(out, "# logs: %s\n", c.LogDir())
	for _, node := range c.Nodes {
		fmt.Fprintf(out, "# a shell on %s: nsenter -t %d -m -n -p -u -i\n", node.Name, node.PID())
	}
}
