package main

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/proxy/route"
)

// TestMemory: many proxies, 20 destinations each.
func TestMemory(t *testing.T) {
	const proxies, destinations = 10, 20
	first := newTestPod(t, captured)
	first.agent.destinations = map[netip.AddrPort]route.Destination{}
	for i := range destinations {
		first.agent.destinations[netip.MustParseAddrPort(fmt.Sprintf("10.96.1.%d:80", i))] = endpoints("10.9.0.11:8080", "10.9.0.12:8080")
	}
	first.world.listen(t, "10.9.0.11:8080", sayName)
	first.world.listen(t, "10.9.0.12:8080", sayName)
	first.agent.connect(t, first.proxy.control)
	for addr := range first.agent.destinations {
		conn := first.pod.dial(t, addr.String())
		line(t, conn)
		conn.Close()
	}
	for range proxies - 1 {
		agent := &fakeAgent{}
		agent.connect(t, start(t, newNamespace(t), newCgroups(t), nil).control)
	}
	time.Sleep(200 * time.Millisecond)
	idle := first.proxy.pss(t)
	t.Logf("PSS of one of %d, with %d destinations: %d KiB, goroutine threads %s", proxies, destinations, idle, first.proxy.status(t)["Threads"])
	if idle > 4<<10 {
		t.Errorf("%d KiB of its own while idle, want at most 4 MiB", idle)
	}
	const open = 500
	conns := make([]io.Closer, 0, open)
	for range open {
		conn := first.pod.dial(t, "10.96.1.0:80")
		line(t, conn)
		conns = append(conns, conn)
	}
	loaded := first.proxy.pss(t)
	fds, err := os.ReadDir(first.proxy.proc("fd"))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("with %d idle connections: %d KiB, %d bytes each, %d descriptors", open, loaded, (loaded-idle)<<10/open, len(fds))
	if n := len(fds); n > 2*open+100 {
		t.Errorf("%d descriptors for %d idle connections", n, open)
	}
	for _, c := range conns {
		c.Close()
	}
}

// pss is the process's share of memory, in KiB.
func (p *launched) pss(t testing.TB) int {
	t.Helper()
	b, err := os.ReadFile(p.proc("smaps_rollup"))
	if err != nil {
		t.Fatal(err)
	}
	lines := slices.Collect(strings.Lines(string(b)))
	for _, l := range lines {
		if f := strings.Fields(l); f[0] == "Pss:" {
			n, err := strconv.Atoi(f[1])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no Pss in %s", b)
	return 0
}
