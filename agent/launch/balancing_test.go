package launch_test

import (
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weirmesh/weir/plugin/capture/nstest"
)

// TestDestination: what a pod dials is what the rules meet, unless a program of
// the pods' cgroup has another address dialled instead.
func TestDestination(t *testing.T) {
	n := newNode(t)
	pods := nstest.NewCgroup(t)
	n.opts.PodsCgroup = pods.Bypass.Path
	n.manager.Close()
	n.open()
	for family, c := range map[string]struct{ service, endpoint netip.AddrPort }{
		"IPv4": {netip.MustParseAddrPort("10.96.0.1:443"), netip.MustParseAddrPort("10.0.7.9:6443")},
		"IPv6": {netip.MustParseAddrPort("[fd00:96::1]:443"), netip.MustParseAddrPort("[fd00:7::9]:6443")},
	} {
		t.Run(family, func(t *testing.T) {
			expect := func(when string, dialled, want netip.AddrPort) {
				t.Helper()
				if got, err := n.manager.Destination(t.Context(), dialled); err != nil || got != want {
					t.Errorf("%s: %v, %v; want %s", when, got, err, want)
				}
			}
			expect("without a program", c.service, c.service)
			t.Run("attached", func(t *testing.T) {
				nstest.RewriteConnects(t, pods.Dir, c.service, c.endpoint)
				expect("with one", c.service, c.endpoint)
				other := netip.AddrPortFrom(c.service.Addr().Next(), 80)
				expect("an address it does not know", other, other)
			})
			expect("after it", c.service, c.service)
		})
	}
	if left, err := filepath.Glob(pods.Dir + "/*/"); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestDestinationSaysWhatCgroupThereIsNot(t *testing.T) {
	n := newNode(t)
	n.opts.PodsCgroup = "weir-no-such/kubepods"
	n.manager.Close()
	n.open()
	_, err := n.manager.Destination(t.Context(), netip.MustParseAddrPort("10.96.0.1:443"))
	if err == nil || !strings.Contains(err.Error(), "--pods-cgroup") {
		t.Errorf("%v", err)
	}
}
