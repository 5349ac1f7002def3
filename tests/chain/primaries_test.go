package chain

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/tests/pod"
)

// outside is an address of the node's that is in no pod's range: what pods dial
// there goes by their default route.
const outside = "192.0.2.1"

// subnetEnv is what Flannel's daemon writes about its node: with ranges of its own,
// as the bridge of the others stays on the node.
const subnetEnv = `FLANNEL_NETWORK=10.245.0.0/16
FLANNEL_SUBNET=10.245.0.1/16
FLANNEL_IPV6_NETWORK=fd00:10:245::/64
FLANNEL_IPV6_SUBNET=fd00:10:245::1/64
FLANNEL_MTU=1450
FLANNEL_IPMASQ=true
`

// TestEveryPrimary puts weir-cni behind plugins that make a pod's network in ways
// of their own, and dials from a pod.
func TestEveryPrimary(t *testing.T) {
	onNode(t)
	env := filepath.Join(pod.NodeDir, "flannel/subnet.env")
	if err := errors.Join(os.MkdirAll(filepath.Dir(env), 0o755), os.WriteFile(env, []byte(subnetEnv), 0o644)); err != nil {
		t.Fatal(err)
	}
	ptp := pod.Addresses()
	ptp["routes"] = []any{map[string]string{"dst": "0.0.0.0/0"}, map[string]string{"dst": "::/0"}}
	target := listenOutside(t)
	for _, c := range []struct {
		name, version string
		primary       map[string]any
	}{
		{"bridge", "1.1.0", pod.Bridge()},
		{"ptp", "1.1.0", map[string]any{"type": "ptp", "ipam": ptp}},
		{"flannel", "0.3.1", map[string]any{
			"type": "flannel", "subnetFile": env, "dataDir": filepath.Join(pod.NodeDir, "cni/flannel"),
			"ipam":     map[string]any{"type": "host-local", "dataDir": filepath.Join(pod.NodeDir, "cni/networks")},
			"delegate": map[string]any{"bridge": "flannel0", "isDefaultGateway": true, "hairpinMode": true},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx := t.Context()
			chain, err := node.NewChainOf(c.version, programs.Folders(), c.primary, map[string]any{"type": "weir-cni"})
			if err != nil {
				t.Fatal(err)
			}
			p := pods(t, "primary-"+c.name, 1)[0]
			// What the first pod of a node brings, a bridge, stays.
			if err := cycle(ctx, chain, p, p.Name+"-first"); err != nil {
				t.Fatal(err)
			}
			before := settled(t, nil)
			if err := errors.Join(sandbox(p, p.Name), chain.Add(ctx, p)); err != nil {
				t.Fatal(err)
			}
			if len(p.Addresses) != 2 {
				t.Errorf("the result has the addresses %v, want one of each family", p.Addresses)
			}
			if err := pod.In(p.Netns, func() error { return dial(target) }); err != nil {
				t.Error(err)
			}
			rules, err := p.ShowRules(ctx, programs)
			if err != nil || rules.Counters[capture.OutTurned].Packets != 1 {
				t.Errorf("of one connection %d were turned aside, %v", rules.Counters[capture.OutTurned].Packets, err)
			}
			if err := errors.Join(chain.Del(ctx, p), node.RemoveNamespace(p.Netns), chain.Del(ctx, p)); err != nil {
				t.Error(err)
			}
			if diff := cmp.Diff(before, settled(t, &before)); diff != "" {
				t.Errorf("left after DEL (-before, +after):\n%s", diff)
			}
		})
	}
}

// TestAPodWithoutAddressesIsCaptured: what gives addresses later (a DHCP client in
// the pod) finds the rules of both families there.
func TestAPodWithoutAddressesIsCaptured(t *testing.T) {
	onNode(t)
	primary := pod.Bridge()
	delete(primary, "ipam")
	delete(primary, "isGateway")
	delete(primary, "isDefaultGateway")
	chain, err := node.NewChainOf("1.1.0", programs.Folders(), primary, map[string]any{"type": "weir-cni"})
	if err != nil {
		t.Fatal(err)
	}
	p := pods(t, "no-address", 1)[0]
	if err := errors.Join(sandbox(p, p.Name), chain.Add(t.Context(), p)); err != nil {
		t.Fatal(err)
	}
	rules, err := p.ShowRules(t.Context(), programs)
	if err != nil || rules.Backend == "" || len(p.Addresses) > 0 {
		t.Errorf("rules %+v, addresses %v, %v", rules, p.Addresses, err)
	}
	if err := errors.Join(chain.Del(t.Context(), p), node.RemoveNamespace(p.Netns)); err != nil {
		t.Error(err)
	}
}

// listenOutside answers at an address of the node's, and returns where.
func listenOutside(t *testing.T) string {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	addr, err := netlink.ParseAddr(outside + "/32")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.AddrAdd(lo, addr); err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", outside+":0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(conn, "hello")
			conn.Close()
		}
	}()
	t.Cleanup(func() {
		listener.Close()
		<-served
		if err := netlink.AddrDel(lo, addr); err != nil {
			t.Error(err)
		}
	})
	return listener.Addr().String()
}

// dial wants to be greeted: that a proxy accepts says nothing.
func dial(target string) error {
	conn, err := net.DialTimeout("tcp", target, 5*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	greeting := make([]byte, 5)
	_, err = conn.Read(greeting)
	return err
}
