// Command weir-install puts Weir's CNI plugin on a node and into the node's CNI
// chain, keeps it there, and takes it out again. It runs as a container of the
// agent's DaemonSet, with the node's folders mounted.
//
// It only places: weir-agent decides and serves, weir-cni does what is to be done
// for a pod. When it ends (the DaemonSet is updated, the node shuts down) it
// leaves the chain as it is. It takes it out when it ends because its DaemonSet or
// namespace is deleted, and by the command "uninstall".
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"github.com/weirmesh/weir/install/agent"
	"github.com/weirmesh/weir/install/conflist"
	"github.com/weirmesh/weir/install/owner"
	"github.com/weirmesh/weir/install/place"
)

// version is set by the linker.
var version = "dev"

const usage = `weir-install puts weir-cni into a node's CNI chain.

  weir-install run [flags]        copy the plugin, wait for the agent, chain it, and
                                  keep it there until stopped; stopping undoes nothing,
                                  unless --daemonset is being deleted
  weir-install ready [flags]      exit 0 if new pods go through the plugin
  weir-install uninstall [flags]  take it out of the chain, have the agent let the
                                  node's pods go, and take it off the node
  weir-install version

weir-install <command> -h lists the flags.
`

// errUsage is a command line that makes no sense.
var errUsage = errors.New("usage")

// Exit codes.
const (
	exitFailed = 1
	exitUsage  = 2
)

// leaveTime is what the agent gets to let the node's pods go.
const leaveTime = 6 * time.Second

// reloadTime is what a runtime gets to notice that its configuration changed,
// before pods are let go. It watches the folder: milliseconds.
const reloadTime = time.Second

// ownerTime is what the API server gets to answer when the program is stopped. It,
// reloadTime and leaveTime are to fit into the grace period of the manifests, 20 s.
const ownerTime = 5 * time.Second

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	err := dispatch(ctx, args, stdout, stderr)
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errUsage):
		fmt.Fprintln(stderr, "weir-install:", err)
		return exitUsage
	default:
		fmt.Fprintln(stderr, "weir-install:", err)
		return exitFailed
	}
}

func dispatch(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return fmt.Errorf("%w: a command is needed", errUsage)
	}
	command, args := args[0], args[1:]
	log := slog.New(slog.NewTextHandler(stderr, nil))
	switch command {
	case "version":
		fmt.Fprintln(stdout, "weir-install", version)
		return nil
	case "-h", "--help", "help":
		fmt.Fprint(stdout, usage)
		return nil
	case "run", "ready", "uninstall":
	default:
		fmt.Fprint(stderr, usage)
		return fmt.Errorf("%w: no command %q", errUsage, command)
	}
	o, err := parseFlags(command, args, stderr)
	if err != nil {
		return err
	}
	switch command {
	case "run":
		return keep(ctx, o, log)
	case "ready":
		return ready(ctx, o)
	default:
		return uninstall(ctx, o, log)
	}
}

// keep runs until it is stopped, and then finds out what for.
func keep(ctx context.Context, o options, log *slog.Logger) error {
	if err := o.readMesh(); err != nil {
		return err
	}
	keeper := place.Keeper{
		Plugin: o.place(), Chain: o.chain(), Marker: o.marker(),
		Form: place.Form(o.form), Loaded: o.loaded(), Log: log,
	}
	if o.owner == "" {
		return keeper.Run(ctx)
	}
	set, err := owner.InCluster(o.owner)
	if err != nil {
		return fmt.Errorf("--daemonset %s: %w", o.owner, err)
	}
	watching, stop := context.WithCancel(ctx)
	watched := make(chan struct{})
	go watch(watching, set, watched)
	err = keeper.Run(ctx)
	stop()
	<-watched
	if err != nil {
		return err
	}
	return leave(context.WithoutCancel(ctx), o, set, log)
}

func watch(ctx context.Context, set *owner.Owner, done chan<- struct{}) {
	defer close(done)
	set.Watch(ctx)
}

// leave uninstalls if the DaemonSet is being deleted, and does nothing if it is
// not, or that cannot be known: a chain too many makes pods wait, one too few lets
// them start uncaptured.
func leave(ctx context.Context, o options, set *owner.Owner, log *slog.Logger) error {
	asking, cancel := context.WithTimeout(ctx, ownerTime)
	defer cancel()
	deleted, err := set.Deleted(asking)
	switch {
	case err != nil:
		log.Warn("stopped; everything stays on the node", "because", err)
		return nil
	case !deleted:
		log.Info("stopped; everything stays on the node: the DaemonSet is there", "daemonset", o.owner)
		return nil
	}
	log.Info("the DaemonSet or its namespace is being deleted: uninstalling", "daemonset", o.owner)
	return uninstall(ctx, o, log)
}

// provenTime is how old a drop-in is that counts as loaded without asking: run
// would have replaced it by an entry if the runtime did not read it.
const provenTime = 30 * time.Second

// ready returns nil when new pods go through the plugin: it is on the node and in
// the chain. What it is in as a new drop-in counts once the runtime has loaded it,
// which not every runtime does.
func ready(ctx context.Context, o options) error {
	if plugin := o.place(); !plugin.There() {
		return fmt.Errorf("not ready: %s is not there", plugin.Path())
	}
	chained, err := o.chain().Chained()
	if err != nil {
		return fmt.Errorf("not ready: %w", err)
	}
	if place.Form(o.form) != place.Auto {
		return nil
	}
	return proven(ctx, chained, o.loaded())
}

// proven returns nil if what weir-cni is chained in is what the runtime reads.
func proven(ctx context.Context, chained place.Chained, loaded func(context.Context) ([]string, error)) error {
	if !chained.DropIn || loaded == nil || time.Since(chained.Since) > provenTime {
		return nil
	}
	types, err := loaded(ctx)
	switch {
	case err != nil:
		return fmt.Errorf("not ready: whether the drop-in is loaded is not known: %w", err)
	case !slices.Contains(types, conflist.PluginType):
		return fmt.Errorf("not ready: the runtime has loaded %q, without the drop-in; if it reads none, it is an entry in some seconds", types)
	}
	return nil
}

// uninstall takes the plugin out of the chain, has the agent let the node's pods
// go, and removes the plugin. It may be repeated. Where no agent answers, pods keep
// their proxies.
func uninstall(ctx context.Context, o options, log *slog.Logger) error {
	changed, err := o.chain().Remove()
	for _, file := range changed {
		log.Info("taken out of the chain", "file", file)
	}
	if err != nil {
		// The plugin stays: a chain that names one that is gone starts no pod.
		return fmt.Errorf("uninstall: %w", err)
	}
	if len(changed) > 0 {
		select {
		case <-time.After(reloadTime):
		case <-ctx.Done():
			return fmt.Errorf("uninstall: stopped before the plugin was removed: run it again: %w", ctx.Err())
		}
	}
	letGo(ctx, o, log)
	plugin := o.place()
	removed, err := plugin.Remove()
	if err != nil {
		return fmt.Errorf("uninstall: %w", err)
	}
	switch {
	case removed:
		log.Info("plugin removed", "path", plugin.Path())
	case len(changed) == 0:
		log.Info("nothing to uninstall", "chain", o.chain().Dir, "plugin", plugin.Path())
	}
	return nil
}

// letGo asks the agent to. What it answers changes nothing for the plugin: of pods
// that are there, nobody runs it any more.
func letGo(ctx context.Context, o options, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(ctx, leaveTime)
	defer cancel()
	draining, err := agent.Leave(ctx, o.socket())
	if err != nil {
		log.Warn("captured pods are not let go, and keep their proxies until they are restarted", "because", err)
		return
	}
	log.Info("captured pods are let go", "proxies that drain", draining)
}
