// Command weir-proxy is the sidecar of one captured pod. The node's agent starts
// it inside the pod's network namespace; see package jail for how it is started
// and locked in, control for what it is told, relay for what it does.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/agent/journal"
	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/adapt"
	"github.com/weirmesh/weir/proxy/control"
	"github.com/weirmesh/weir/proxy/identity"
	"github.com/weirmesh/weir/proxy/jail"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/mtls"
	"github.com/weirmesh/weir/proxy/relay"
	"github.com/weirmesh/weir/proxy/telemetry"
)

// Descriptors that the agent passes.
const (
	launchFD  = 3 // the launch socket, unix, SOCK_SEQPACKET
	controlFD = 4 // the control socket, unix, listening
)

const (
	// drain is how long connections may go on after SIGTERM. The agent decides
	// by SIGKILL if they are to end sooner.
	drain = 10 * time.Minute
	// lastWords is how long the last access log records may wait for the agent.
	lastWords = time.Second
)

// version is set by the linker.
var version = "dev"

const usage = `weir-proxy is the sidecar proxy of one pod. It is started by weir-agent, which
hands it its sockets; it does nothing by hand.

  weir-proxy --version   print the version
`

func main() { os.Exit(run(os.Args, os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	if len(args) == 2 && args[1] == "--version" {
		fmt.Fprintln(stdout, "weir-proxy", version)
		return 0
	}
	staged := len(args) > 1 && args[1] == jail.ServeArg
	if len(args) > 1 && !staged || !hasSockets() {
		fmt.Fprint(stderr, usage)
		return 2
	}
	var err error
	if staged {
		err = serve(args)
	} else {
		err = jail.Enter(launchFD, controlFD)
	}
	if err != nil {
		jail.SendError(launchFD, err)
		return 1
	}
	return 0
}

// hasSockets reports whether descriptor 3 is a socket of the launch socket's kind
// and 4 one that listens.
func hasSockets() bool {
	kind, err := unix.GetsockoptInt(launchFD, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || kind != unix.SOCK_SEQPACKET {
		return false
	}
	listens, err := unix.GetsockoptInt(controlFD, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	return err == nil && listens != 0
}

// serve is the second stage.
func serve(args []string) error {
	connections := maxConnections() // may not be asked for later
	launch, err := jail.ParseArgs(args)
	if err != nil {
		return err
	}
	records, err := journal.Create() // which nobody may do later
	if err != nil {
		return err
	}
	defer records.Close()
	if err := jail.Confine(launch); err != nil {
		return err
	}
	var listeners []*listen.Listener
	for _, l := range launch.Listeners {
		direction, err := listen.ParseDirection(l.GetName())
		if err != nil {
			return err
		}
		wrapped, err := listen.New(direction, l.FD)
		if err != nil {
			return err
		}
		listeners = append(listeners, wrapped)
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()

	holder := identity.New()
	defer holder.Close()
	if launch.Identity >= 0 {
		// What is wrong with it is no reason not to serve: there will be another.
		_ = holder.Adopt(launch.Identity)
	}
	store := control.NewStore(holder)
	defer store.Close()
	meter := telemetry.NewMeter(store.Destinations)
	server := &control.Server{
		Store:    store,
		Journal:  records,
		Meter:    meter,
		Version:  version,
		Draining: ctx.Done(),
		Handover: func(fd int) error { return jail.SendListening(fd, launch.Listeners) },
		Identity: func(fd int) error {
			return holder.Handover(func(file int) error { return jail.SendMemory(fd, proxypb.LaunchReply_IDENTITY, file) })
		},
		Records: func(fd int) error { return jail.SendMemory(fd, proxypb.LaunchReply_JOURNAL, records.File()) },
	}
	// The control socket is served until the last connection is reported.
	controlling, release := context.WithCancel(context.Background())
	defer release()
	controlled := make(chan error, 1)
	traffic := &relay.Server{
		Config: store, Drain: drain, MaxConnections: connections, KeepClient: launch.KeepNetRaw,
		TLS:   &mtls.Handshaker{Source: holder, Classic: store.ClassicKeyExchange},
		Begun: meter.Begin, Failed: meter.Failed, Ejected: meter.Ejected,
		Log: func(r *telemetry.Record) {
			meter.End(r)
			row := r.Row()
			records.Put(&row)
		},
	}
	store.Changed = traffic.Recheck
	go serveControl(controlling, server, controlled)
	go adapt.Run(controlling, runtime.GOMAXPROCS(0))
	relaying, cancel := context.WithCancel(ctx)
	defer cancel()
	relayed := make(chan error, 1)
	go serveTraffic(relaying, traffic, listeners, relayed)

	if err := jail.SendServing(launchFD); err != nil {
		return err
	}
	unix.Close(launchFD)
	go holder.Run(controlling) // no key is made before
	select {
	case err = <-controlled:
		// Without it the proxy could never be told anything again: the agent
		// starts another one.
		return errors.Join(err, errors.New("the control socket is gone"))
	case err = <-relayed:
	}
	records.Flush(lastWords)
	release()
	return errors.Join(err, <-controlled)
}

func serveControl(ctx context.Context, s *control.Server, done chan<- error) {
	done <- s.Serve(ctx, controlFD)
}

func serveTraffic(ctx context.Context, s *relay.Server, listeners []*listen.Listener, done chan<- error) {
	done <- s.Serve(ctx, listeners)
}

// maxConnections keeps connections, two descriptors each, from using up those of
// the control socket and of the pipes that bytes move through.
func maxConnections() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0
	}
	const reserved = 128
	if limit.Cur <= 2*reserved {
		return reserved
	}
	return int(min(limit.Cur-reserved, 1<<20) / 2)
}
