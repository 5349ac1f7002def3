package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/weirmesh/weir/agent/cluster"
)

// How long until the node is looked at again. Data planes are changed, but rarely.
const (
	balancingInterval = time.Hour
	balancingRetry    = time.Minute // while no Service is known to dial
)

// balancing looks whether this node chooses a Service's endpoint while an
// application connects, before the rules see the connection.
type balancing struct {
	served      func() []netip.AddrPort // of Services, at most one of each family
	destination func(context.Context, netip.AddrPort) (netip.AddrPort, error)
	metric      func(dialled netip.Addr, balanced bool)
	event       func(eventType, reason, message string)
	log         *slog.Logger
}

// watch looks again and again until ctx is done.
func (b balancing) watch(ctx context.Context) {
	for {
		wait := balancingInterval
		if !b.look(ctx) {
			wait = balancingRetry
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// look looks once, and reports whether there was anything to dial.
func (b balancing) look(ctx context.Context) bool {
	served := b.served()
	for _, dialled := range served {
		met, err := b.destination(ctx, dialled)
		switch {
		case ctx.Err() != nil:
			return true
		case err != nil:
			b.log.Warn("whether this node balances connections before Weir sees them is not known", "error", err)
			continue
		case met != dialled:
			message := fmt.Sprintf("connections of pods to ClusterIP %s go to %s before Weir sees them: this node balances them while they connect, "+
				"and Weir's routing, balancing and policies for Services are bypassed. "+
				"Cilium: set socketLB.hostNamespaceOnly=true; Calico: set bpfConnectTimeLoadBalancing: Disabled", dialled, met)
			b.log.Warn("connect-time balancing", "dialled", dialled, "met", met)
			b.event(cluster.EventWarning, cluster.ConnectTimeBalancing, message)
		}
		b.metric(dialled.Addr(), met != dialled)
	}
	return len(served) > 0
}
