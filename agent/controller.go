package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/weirmesh/weir/agent/cluster"
	"github.com/weirmesh/weir/agent/controller"
	"github.com/weirmesh/weir/agent/decide"
	"github.com/weirmesh/weir/agent/identity"
)

// control runs a replica of the controller until ctx is done.
func control(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o, printVersion, err := parseControllerFlags(args, stderr)
	if err != nil {
		return err
	}
	if printVersion {
		fmt.Fprintln(stdout, "weir-agent controller", version)
		return nil
	}
	o.Log = slog.New(slog.NewTextHandler(stderr, nil))
	o.Log.Info("started", "identity", o.Identity, "version", version)
	return controller.Run(ctx, o)
}

func parseControllerFlags(args []string, stderr io.Writer) (controller.Options, bool, error) {
	var o controller.Options
	fs := flag.NewFlagSet("weir-agent controller", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprint(stderr, "weir-agent controller takes the taint "+controller.NotReadyTaint+" off nodes whose agent is ready,\n"+
			"and writes the status of routes of the Gateway API whose parent is a Service, and\n"+
			"of TrafficPolicies. Which proxies have a route it asks their agents. It keeps a CA,\n"+
			"in a Secret, and signs certificates for captured pods when their agents ask.\n"+
			"Of any number of replicas the one that holds the Lease acts.\n\n")
		fs.PrintDefaults()
	}
	host, err := os.Hostname()
	if err != nil {
		host = ""
	}
	fs.StringVar(&o.Kubeconfig, "kubeconfig", "", "`file` to reach the API server with; empty: the pod's service account")
	fs.StringVar(&o.Namespace, "namespace", "weir-system", "`namespace` of the Lease and of the agents' pods")
	fs.StringVar(&o.Agents, "agents", "app=weir-agent", "label `selector` of the agents' pods")
	port := fs.Int("agents-port", 15090, "`port` of the agents' --metrics-address, to ask them which routes, policies and roots their proxies have; 0: do not, then nothing has a condition Programmed, and a new CA signs after a day")
	fs.StringVar(&o.Lease, "lease", "weir-controller", "`name` of the Lease")
	fs.StringVar(&o.Identity, "identity", host, "this replica's `name` in the Lease, no other's")
	fs.StringVar(&o.Health, "health-address", ":15091", "`address` to serve /healthz, /readyz and /metrics on; empty: do not")
	options := fs.String("options", "", "`file` of mesh options, the agents' own: their trustDomain and certificateTTL; empty: the defaults")
	signs := fs.Bool("sign", true, "sign certificates for "+cluster.SignerName+"; false: somebody else in the cluster does")
	fs.StringVar(&o.AgentAccount, "agent-account", "weir-agent", "`name` of the agents' service account: certificates are for nobody else")
	printVersion := fs.Bool("version", false, "print the version and exit")
	if err := fs.Parse(args); err != nil {
		return o, false, err
	}
	switch {
	case fs.NArg() > 0:
		return o, false, fmt.Errorf("unexpected argument %q; weir-agent controller -h lists what there is", fs.Arg(0))
	case o.Identity == "":
		return o, false, errors.New("--identity is needed: the pod's name")
	case o.Namespace == "", o.Agents == "", o.Lease == "", o.AgentAccount == "":
		return o, false, errors.New("--namespace, --agents, --lease and --agent-account must not be empty")
	case *port < 0 || *port > 65535:
		return o, false, fmt.Errorf("--agents-port %d is not between 0 and 65535", *port)
	}
	if *signs {
		mesh, err := decide.ReadOptionsFile(*options)
		if err != nil {
			return o, false, err
		}
		o.TTL = mesh.CertificateTTL.Duration
		if o.TrustDomain, err = identity.TrustDomain(mesh.TrustDomain); err != nil {
			return o, false, err
		}
	}
	if *port != 0 {
		o.Ask = controller.AskOn(*port)
	}
	return o, *printVersion, nil
}
