package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

var (
	service4 = netip.MustParseAddrPort("10.96.0.1:443")
	service6 = netip.MustParseAddrPort("[fd00:96::1]:443")
	endpoint = netip.MustParseAddrPort("10.0.7.9:6443")
)

// watched runs a watch for a time and returns what it said, metrics and events.
func watched(t *testing.T, d time.Duration, served func() []netip.AddrPort, destination func(netip.AddrPort) (netip.AddrPort, error)) ([]string, string) {
	var said []string
	var log bytes.Buffer
	b := balancing{
		served:      served,
		destination: func(_ context.Context, a netip.AddrPort) (netip.AddrPort, error) { return destination(a) },
		metric:      func(a netip.Addr, balanced bool) { said = append(said, fmt.Sprint(a, " ", balanced)) },
		event: func(eventType, reason, message string) {
			said = append(said, eventType+" "+reason)
			for _, word := range []string{service4.String(), endpoint.String(), "socketLB.hostNamespaceOnly=true", "bpfConnectTimeLoadBalancing: Disabled"} {
				if !strings.Contains(message, word) {
					t.Errorf("%q lacks %q", message, word)
				}
			}
		},
		log: slog.New(slog.NewTextHandler(&log, nil)),
	}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), d)
		defer cancel()
		b.watch(ctx)
	})
	return said, log.String()
}

func TestBalancingIsReportedWhileItIsThere(t *testing.T) {
	looks := 0
	both := func() []netip.AddrPort { return []netip.AddrPort{service4, service6} }
	said, _ := watched(t, balancingInterval+time.Second, both, func(a netip.AddrPort) (netip.AddrPort, error) {
		if looks++; looks == 1 {
			return endpoint, nil
		}
		return a, nil
	})
	want := []string{"Warning ConnectTimeBalancing", "10.96.0.1 true", "fd00:96::1 false", "10.96.0.1 false", "fd00:96::1 false"}
	if diff := cmp.Diff(want, said); diff != "" {
		t.Error(diff)
	}
}

func TestNothingIsReportedThatIsNotKnown(t *testing.T) {
	one := func() []netip.AddrPort { return []netip.AddrPort{service4} }
	said, log := watched(t, time.Second, one, func(netip.AddrPort) (netip.AddrPort, error) { return netip.AddrPort{}, errors.New("no cgroup") })
	if len(said) > 0 || !strings.Contains(log, "no cgroup") {
		t.Errorf("%q, log %q", said, log)
	}
}

func TestAServiceIsWaitedFor(t *testing.T) {
	asked := 0
	later := func() []netip.AddrPort {
		if asked++; asked < 3 {
			return nil
		}
		return []netip.AddrPort{service4}
	}
	said, _ := watched(t, 2*balancingRetry+time.Second, later, func(a netip.AddrPort) (netip.AddrPort, error) { return a, nil })
	if diff := cmp.Diff([]string{"10.96.0.1 false"}, said); diff != "" {
		t.Error(diff)
	}
}
