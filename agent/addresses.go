package main

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"time"
)

// addressesEvery is how often it is looked whether the node has other addresses.
const addressesEvery = 10 * time.Second

// nodeAddresses are those from which the node's own connections to its pods come: of all
// its interfaces, as the agent, which is in the node's network, has them. Those of
// loopback and of a single link are left out: they are others' too.
func nodeAddresses() ([]netip.Addr, error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	var out []netip.Addr
	for _, a := range all {
		network, ok := a.(*net.IPNet)
		if !ok {
			continue
		}
		addr, ok := netip.AddrFromSlice(network.IP)
		if addr = addr.Unmap(); ok && !addr.IsLoopback() && !addr.IsLinkLocalUnicast() {
			out = append(out, addr)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out), nil
}

// followAddresses tells of the node's addresses, at once and when they are others, until
// ctx is done.
func followAddresses(ctx context.Context, tell func([]netip.Addr), log *slog.Logger) {
	for {
		addrs, err := nodeAddresses()
		if err != nil {
			log.Warn("the node's addresses are not known: kubelet's probes may be refused", "error", err)
		} else {
			tell(addrs)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(addressesEvery):
		}
	}
}
