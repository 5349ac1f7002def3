// Package controller is what of Weir is done once for a cluster, not once a node:
// it takes the taint off nodes whose agent is ready, says of each route of a
// Service and of each policy about one, in its status, what comes of it, and keeps the
// CA that signs pods' certificates.
//
// Data flows: the API server → watches of nodes and of agents' pods → decide, a
// pure function → a patch of the node; and watches of Services, routes and policies,
// and what agents say of their proxies when they are asked → package decide's verdicts
// → a patch of an object's status; and requests for certificates → the pod that each
// names, as the API server has it then → package identity, which signs, or a denial with
// its reason. Every replica watches; the one that holds the Lease
// asks and acts. Nothing is kept anywhere else, so a leader that
// begins knows what the last one knew: the CA is in a Secret.
//
// It is not on any pod's way: while no replica runs, only nodes that are new wait,
// routes and policies that are new are in force without saying so, and pods that are
// new get no certificate; those that have one go on.
package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/leaderelection"
	gateway "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned"

	policyclient "github.com/weirmesh/weir/agent/api/client"
	"github.com/weirmesh/weir/agent/cluster"
)

// programName is what the API server knows the controller's requests by, and what it
// has written.
const programName = "weir-controller"

// Options say where the controller runs.
type Options struct {
	Kubeconfig string // file to reach the API server with; empty: the pod's service account
	Namespace  string // Weir's: of the Lease and of the agents' pods
	Agents     string // label selector of the agents' pods
	Ask        Ask    // how an agent is asked which routes and policies its proxies have; nil: they are not asked
	Lease      string // name of the Lease
	Identity   string // this replica's name in the Lease
	Health     string // address to serve /healthz, /readyz and /metrics on; empty: do not
	// TrustDomain is that of pods' identities. The zero one: no certificate is signed,
	// somebody else is the signer.
	TrustDomain  spiffeid.TrustDomain
	TTL          time.Duration // of certificates, at most
	AgentAccount string        // service account of the agents, in Namespace
	Log          *slog.Logger
}

// limits are those of all that is done for a cluster: a certificate takes three requests,
// and while it is being made a new pod's connections wait.
var limits = cluster.Limits{QPS: 300, Burst: 600}

// Run runs a replica until ctx is done. The error is about what no waiting helps;
// an API server that is away is waited for.
func Run(ctx context.Context, o Options) error {
	client, err := cluster.NewClient(o.Kubeconfig, programName, limits)
	if err != nil {
		return fmt.Errorf("%w; outside a pod, name a --kubeconfig", err)
	}
	routes, err := cluster.NewGatewayClient(o.Kubeconfig, programName)
	if err != nil {
		return err
	}
	policies, err := cluster.NewPolicyClient(o.Kubeconfig, programName)
	if err != nil {
		return err
	}
	var listener net.Listener
	if o.Health != "" {
		if listener, err = net.Listen("tcp", o.Health); err != nil {
			return fmt.Errorf("--health-address: %w", err)
		}
	}
	return run(ctx, o, clients{client, routes, policies}, listener)
}

// clients are of one API server.
type clients struct {
	kubernetes.Interface
	gateway  gateway.Interface
	policies policyclient.Interface
}

func run(ctx context.Context, o Options, c clients, listener net.Listener) error {
	w, routes := newWatches(), newRouteWatches()
	t := &tainter{client: c, watches: w, log: o.Log}
	s := &statusWriter{clients: c, watches: routes, log: o.Log}
	if o.Ask != nil {
		s.census = newCensus(w, o.Ask, routes.change, o.Log)
	}
	counts := newMetrics()
	watchdog := leaderelection.NewLeaderHealthzAdaptor(watchdogGrace)

	// What runs beside the election ends with it.
	ctx, cancel := context.WithCancel(ctx)
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel()
	group.Go(func() {
		cluster.Follow(ctx, c.Interface, o.Log, "nodes", &corev1.Node{}, cluster.Selector{}, c.CoreV1().Nodes(), w.nodes)
	})
	group.Go(func() {
		cluster.Follow(ctx, c.Interface, o.Log, "pods", &corev1.Pod{}, cluster.Selector{Labels: o.Agents}, c.CoreV1().Pods(o.Namespace), w.agents)
	})
	routes.follow(ctx, &group, c, o.Log)
	served := make(chan error, 1)
	if listener != nil {
		group.Go(func() {
			served <- serveHealth(ctx, listener, watchdog, func() bool { return w.synced() && routes.synced() }, counts.handler())
			cancel()
		})
	}
	err := lead(ctx, o, c, watchdog, func(ctx context.Context) {
		var all sync.WaitGroup
		all.Go(func() { t.run(ctx) })
		all.Go(func() { s.run(ctx) })
		if s.census != nil {
			all.Go(func() { s.census.run(ctx) })
		}
		if !o.TrustDomain.IsZero() {
			all.Go(func() { sign(ctx, o, c.Interface, s.census, counts) })
		}
		all.Wait()
	})
	cancel()
	if listener != nil {
		err = errors.Join(err, <-served)
	}
	return err
}

// sign keeps the CA and answers requests for certificates until ctx is done. agents may
// be nil.
func sign(ctx context.Context, o Options, client kubernetes.Interface, agents *census, counts *metrics) {
	ca := &caKeeper{
		client: client, namespace: o.Namespace, domain: o.TrustDomain, ttl: o.TTL, trusted: agents.trusted, usable: counts.ca, log: o.Log,
		publish: func(ctx context.Context, roots []byte) error { return publishRoots(ctx, client, o.Namespace, roots) },
	}
	s := &signer{
		client: client, domain: o.TrustDomain, ttl: o.TTL, authority: ca.authority, count: counts.request, log: o.Log,
		agent: "system:serviceaccount:" + o.Namespace + ":" + o.AgentAccount,
	}
	var both sync.WaitGroup
	both.Go(func() { ca.run(ctx) })
	both.Go(func() { s.run(ctx) })
	both.Wait()
	counts.cas.Reset()
}
