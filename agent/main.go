// weir-agent is the node's part of Weir: it answers the CNI plugin, decides what
// is captured, ships and supervises one proxy per captured pod, tells the
// proxies what they need to know, and writes down what they report.
//
// Data flows: cluster (or a folder of manifests) → decide → attach → launch for
// a pod's birth; cluster → push → proxies for their config; proxies → push →
// telemetry for what they saw. This file only wires.
//
// With the argument "controller" it is what runs once for a cluster instead.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/weirmesh/weir/agent/attach"
	"github.com/weirmesh/weir/agent/attachpb"
	"github.com/weirmesh/weir/agent/decide"
	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/push"
	"github.com/weirmesh/weir/agent/repair"
	"github.com/weirmesh/weir/agent/telemetry"
)

// version is set by the linker.
var version = "dev"

// gcPercent is Go's GOGC where nobody sets that: a cluster's lists are large when they
// come and small once they are kept, and memory is what an agent takes of its node.
const gcPercent = 50

// The first thread is main's alone. Elsewhere goroutines have threads enter other
// namespaces, which end with them; this one the runtime would keep, and it is by its
// namespaces that the process is known: a probe that is run in the agent's container
// would look for its program on the host.
func init() { runtime.LockOSThread() } //nolint:gochecknoinits // only before main is it certain to be the first

func main() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var err error
	switch {
	case len(args) > 0 && args[0] == "ready":
		err = ready(ctx, args[1:], stderr)
	case len(args) > 1 && args[0] == launch.DialCommand:
		err = launch.RunDial(args[1:])
	case len(args) > 0 && args[0] == "controller":
		err = control(ctx, args[1:], stdout, stderr)
	default:
		err = serve(ctx, args, stdout, stderr)
	}
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	default:
		fmt.Fprintln(stderr, "weir-agent:", err)
		return 1
	}
}

// ready asks the agent of this node whether it serves.
func ready(ctx context.Context, args []string, stderr io.Writer) error {
	fs := flag.NewFlagSet("weir-agent ready", flag.ContinueOnError)
	fs.SetOutput(stderr)
	runDir := fs.String("run-dir", "/run/weir", "the agent's --run-dir, a `folder`")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if _, err := os.Stat(markerPath(*runDir)); err != nil {
		return fmt.Errorf("not ready since this boot: %w", err)
	}
	conn, err := grpc.NewClient("unix:"+socketPath(*runDir), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	_, err = attachpb.NewAttachClient(conn).Status(ctx, &attachpb.StatusRequest{})
	return err
}

func socketPath(runDir string) string { return filepath.Join(runDir, "attach.sock") }

// markerPath is the file that says: the agent was ready in this boot. The folder
// is a tmpfs, so it is gone after a reboot.
func markerPath(runDir string) string { return filepath.Join(runDir, "ready") }

// lastGoodPath is the file of the cluster's view, for an agent that starts while
// the API server is away.
func lastGoodPath(runDir string) string { return filepath.Join(runDir, "last-good.gz") }

// authorityPath is the file of the CA of an agent that has one of its own. Those who
// trust it are gone after a reboot, as it is.
func authorityPath(runDir string) string { return filepath.Join(runDir, "ca.json") }

// rootsPath is where the roots of the cluster are kept that were heard of last.
func rootsPath(runDir string) string { return filepath.Join(runDir, "roots.pem") }

// farewell is how long a pod is reached by mTLS still, at most, after the agent has said
// that it is captured no longer: a write to the API server, and what comes of it to every
// proxy (p99 123 ms in make bench-config).
const farewell = 2 * time.Second

// serve runs the agent until ctx is done. Proxies go on when it returns.
func serve(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	f, err := parseFlags(args, stderr)
	if err != nil {
		return err
	}
	if f.version {
		fmt.Fprintln(stdout, "weir-agent", version)
		return nil
	}
	if os.Geteuid() != 0 {
		return errors.New("must run as root: it enters pods' namespaces")
	}
	log := slog.New(slog.NewTextHandler(stderr, nil))

	accessLog := stdout
	if f.accessLog != "-" {
		file, err := os.OpenFile(f.accessLog, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return fmt.Errorf("--access-log: %w", err)
		}
		defer file.Close()
		accessLog = file
	}
	proxy := f.proxy
	if f.proxyDir != "" {
		program, err := launch.PlaceProxy(f.proxy, f.proxyDir)
		if err != nil {
			return err
		}
		defer program.Close()
		if program.Memory {
			log.Info("nothing can be executed in --proxy-dir: proxies run from memory", "folder", f.proxyDir)
		}
		proxy = program.Path
	}

	view, err := openView(f, log)
	if err != nil {
		return err
	}
	records := telemetry.NewAccessLog(accessLog, log)
	pusher := &push.Pusher{
		View:               view.store,
		WaitSynced:         view.store.WaitUsable,
		TrustDomain:        view.options.TrustDomain,
		Refused:            view.refused,
		MeshRanges:         view.options.MeshRanges,
		ClassicKeyExchange: view.options.KeyExchange == decide.Classic,
		AccessLog:          records,
		Log:                log,
	}
	identities, err := openIdentities(f, view, log)
	if err != nil {
		return err
	}
	pusher.Issuer = identities.issuer
	repairs := &repair.Loop{View: view.store, Farewell: farewell, Current: view.store.Synced, Event: view.recorder.PodEvent, Log: log}
	var metrics *telemetry.Metrics // they count the proxies, which are not there yet
	proxies, err := launch.Open(launch.Options{
		RunDir:       f.runDir,
		NetnsDir:     f.netnsDir,
		CgroupRoot:   f.cgroupRoot,
		CgroupParent: f.cgroupParent,
		PodsCgroup:   f.podsCgroup,
		Proxy:        proxy,
		Plugin:       f.plugin,
		HostCgroupNS: f.cgroupNS,
		HostMountNS:  f.mountNS,
		UIDBase:      uint32(f.uidBase),
		MaxProcs:     view.options.ProxyMaxProcs,
		Limits:       launch.Limits{Memory: decide.DefaultMemoryLimit, CPUWeight: decide.DefaultCPUWeight},
		Log:          log,
		Session:      pusher.Session,
		Restarted: func(a launch.Attachment) {
			metrics.ProxyRestarted()
			view.restarted(a)
		},
		Upgraded: view.upgraded,
		Drained:  repairs.Drained,
		Changed:  identities.changed,
	})
	if err != nil {
		return err
	}
	defer proxies.Close()
	metrics = telemetry.NewMetrics(version, view.store, func() map[string]int { return podStates(proxies.List()) }, pusher.Versions)
	pusher.Metrics = metrics // there is no session yet
	metrics.Authority(identities.issuer.Ends)
	// What the node cannot do is settled before the first pod, for all of them.
	view.options.KeepClientAddress, err = proxies.TestNode(ctx, view.options.KeepClientAddress)
	if err != nil {
		return err
	}
	repairs.Decide, repairs.Proxies, repairs.Count = view.options, proxies, metrics.Operation
	listener, err := attach.Listen(socketPath(f.runDir), log)
	if err != nil {
		return err
	}
	if err := proxies.Recover(); err != nil {
		return err
	}
	leave, err := newDeparture(f, repairs, log)
	if err != nil {
		return err
	}
	server := &attach.Server{
		Pods:    view.store,
		Decide:  view.options,
		Proxies: proxies,
		Version: version,
		Release: leave.release,
		Event:   view.recorder.PodEvent,
		Metrics: metrics,
		Log:     log,
	}
	leave.agent = server
	err = runAll(ctx, f, log, parts{view, pusher, records, identities, proxies, repairs, metrics, listener, server, leave})
	if leave.done() {
		err = errors.Join(err, removeState(f))
	}
	return err
}

// podStates counts attachments by state.
func podStates(all []launch.Attachment) map[string]int {
	out := map[string]int{}
	for _, a := range all {
		switch {
		case a.Released:
			out[telemetry.StateExcluded]++
		case a.Committed:
			out[telemetry.StateCaptured]++
		default:
			out[telemetry.StatePending]++
		}
	}
	return out
}

// parts are what runs.
type parts struct {
	view     *view
	pusher   *push.Pusher
	records  *telemetry.AccessLog
	ids      *identities
	proxies  *launch.Manager
	repairs  *repair.Loop
	metrics  *telemetry.Metrics
	listener net.Listener
	server   *attach.Server
	leave    *departure
}

// runAll runs the agent's parts until stopping is done and what there is to do
// then is, or one of them fails.
func runAll(stopping context.Context, f flags, log *slog.Logger, p parts) error {
	grpcServer := grpc.NewServer()
	attachpb.RegisterAttachServer(grpcServer, p.server)
	var metricsListener net.Listener
	if f.metrics != "" {
		var err error
		if metricsListener, err = net.Listen("tcp", f.metrics); err != nil && !errors.Is(err, syscall.EADDRINUSE) {
			return fmt.Errorf("--metrics-address: %w", err)
		}
	}

	running, stop := context.WithCancel(context.WithoutCancel(stopping))
	defer stop()
	group, ctx := errgroup.WithContext(running)
	group.Go(func() error {
		defer stop()
		return p.leave.run(ctx, stopping)
	})
	group.Go(func() error {
		followAddresses(ctx, p.view.store.SetNodeAddresses, log)
		return nil
	})
	if p.leave.owner != nil {
		group.Go(func() error {
			p.leave.owner.Watch(ctx)
			return nil
		})
	}
	group.Go(func() error { return p.view.run(ctx) })
	group.Go(func() error { return grpcServer.Serve(p.listener) })
	group.Go(func() error {
		<-ctx.Done()
		if p.leave.done() {
			grpcServer.GracefulStop() // the installer hears how it went
		} else {
			grpcServer.Stop() // ADDs under way fail and are retried
		}
		return nil
	})
	group.Go(func() error {
		p.proxies.Reap(ctx)
		return nil
	})
	group.Go(func() error {
		p.records.Run(ctx)
		return nil
	})
	group.Go(func() error {
		p.ids.run(ctx, p.pusher, p.proxies.List)
		return nil
	})
	group.Go(func() error {
		if err := p.view.store.WaitSynced(ctx); err != nil {
			return nil // stopped before it was ready
		}
		log.Info("ready", "node", f.nodeName, "version", version, "socket", socketPath(f.runDir))
		return os.WriteFile(markerPath(f.runDir), nil, 0o600)
	})
	group.Go(func() error {
		for {
			select {
			case <-p.view.store.Changed():
				p.pusher.Changed()
			case <-ctx.Done():
				return nil
			}
		}
	})
	group.Go(func() error {
		if err := p.view.store.WaitSynced(ctx); err != nil {
			return nil // no Service is known
		}
		b := balancing{p.view.store.Served, p.proxies.Destination, p.metrics.ConnectTimeBalancing, p.view.recorder.NodeEvent, log}
		b.watch(ctx)
		return nil
	})
	if f.repair {
		group.Go(func() error {
			if err := p.view.store.WaitUsable(ctx); err != nil {
				return nil // what should be captured is not known
			}
			p.repairs.Run(ctx, p.view.store.PodsChanged())
			return nil
		})
	}
	if f.metrics != "" {
		mux := http.NewServeMux()
		mux.Handle("/metrics", p.metrics.Handler())
		mux.HandleFunc("GET "+push.ProgrammedPath, p.pusher.ServeProgrammed)
		group.Go(func() error {
			if metricsListener == nil {
				metricsListener = listenLater(ctx, f.metrics, log)
			}
			if metricsListener == nil {
				return nil
			}
			return telemetry.Serve(ctx, metricsListener, mux)
		})
	}
	err := group.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// listenLater listens on an address that somebody has, as soon as it is free: another
// agent that is ending, mostly, and no reason for pods to wait. It returns nil once ctx
// is done.
func listenLater(ctx context.Context, address string, log *slog.Logger) net.Listener {
	log.Warn("metrics are not served yet: the address is in use; end who has it, or choose another --metrics-address", "address", address)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
		if listener, err := net.Listen("tcp", address); err == nil {
			return listener
		}
	}
}
