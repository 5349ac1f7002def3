package main

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"testing"
)

// TestTheNodesAddressesAreThoseThatOnlyItHas: what others may have too is none.
func TestTheNodesAddressesAreThoseThatOnlyItHas(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var told []netip.Addr
	followAddresses(ctx, func(addrs []netip.Addr) {
		told = addrs
		cancel()
	}, slog.New(slog.DiscardHandler))
	own := map[netip.Addr]bool{}
	all, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range all {
		own[netip.MustParsePrefix(a.String()).Addr()] = true
	}
	for _, addr := range told {
		if !own[addr] || addr.IsLoopback() || addr.IsLinkLocalUnicast() {
			t.Errorf("%s", addr)
		}
		delete(own, addr)
	}
	for addr := range own {
		if !addr.IsLoopback() && !addr.IsLinkLocalUnicast() {
			t.Errorf("%s is left out", addr)
		}
	}
}
