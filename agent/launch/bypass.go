package launch

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/plugin/capture"
)

// DialCommand is the subcommand of weir-agent that TestNode starts in the
// proxies' cgroup: it dials once and exits.
const DialCommand = "bypass-dial"

// probeAddr is where the test dials: an address of TEST-NET-1 (RFC 5737) behind
// an interface of the scratch namespace, where nobody answers and nobody has to.
var probeAddr = netip.MustParseAddrPort("192.0.2.2:9")

// TestNode shows that this node can do what the rules need, and says whether it
// can keep callers' addresses, if keep asks for that. Where it cannot, which is
// logged, it is settled for every pod of the node, before the first: rules for it
// without a proxy that does it would change nothing, but a proxy without the rules
// has every inbound connection hang.
func (m *Manager) TestNode(ctx context.Context, keep bool) (bool, error) {
	if keep {
		err := m.testRules(ctx, true)
		if err == nil || ctx.Err() != nil {
			return err == nil, err
		}
		m.opts.Log.Warn("this node cannot keep clients' addresses: applications will see the address of their own pod", "error", err)
	}
	return false, m.testRules(ctx, false)
}

// testRules shows that on this node the rules tell a proxy's connections from
// an application's: in a scratch network namespace with the rules in it, a dial
// from the proxies' cgroup must be let by and one from outside turned aside. A
// bypass that does not match is a storm (the proxy calls itself), and its rules
// look no different.
func (m *Manager) testRules(ctx context.Context, keepClient bool) error {
	err := m.inScratch(ctx, keepClient, func(here string, spec capture.Spec) error { return m.testBypass(ctx, here, spec) })
	if err != nil {
		return fmt.Errorf("bypass: %w", err)
	}
	return nil
}

// inScratch runs f on a thread in a network namespace of its own, which has the
// rules in it and ends with f. The thread is in the host's cgroup namespace.
func (m *Manager) inScratch(ctx context.Context, keepClient bool, f func(here string, spec capture.Spec) error) error {
	bypass, err := m.Bypass()
	if err != nil {
		return err
	}
	spec := capture.Spec{
		OutboundPort: capture.DefaultOutboundPort,
		InboundPort:  capture.DefaultInboundPort,
		Bypass:       bypass,
		KeepClient:   keepClient,
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the namespace ends with the thread
		here, err := m.scratch(ctx, spec)
		if err == nil {
			err = f(here, spec)
		}
		done <- err
	}()
	return <-done
}

// scratch makes the namespace of inScratch and returns its path.
func (m *Manager) scratch(ctx context.Context, spec capture.Spec) (string, error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return "", fmt.Errorf("scratch network namespace: %w", err)
	}
	if err := probeInterface(); err != nil {
		return "", fmt.Errorf("scratch network namespace: %w", err)
	}
	if err := enterCgroupNS(m.opts.HostCgroupNS); err != nil {
		return "", err
	}
	here := fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
	done, err := m.Rules(ctx, []Task{{Netns: here, Do: Apply, Spec: spec}})
	if err == nil {
		err = done[0].Err()
	}
	return here, err
}

func (m *Manager) testBypass(ctx context.Context, here string, spec capture.Spec) error {
	if err := Dial(probeAddr); err != nil {
		return err
	}
	name := fmt.Sprintf("bypass-test-%d", os.Getpid())
	if err := m.dialInCgroup(ctx, name, probeAddr.String()); err != nil {
		return err
	}

	shown, err := m.plugin(ctx, nil, "show", "--netns", here, "--json")
	if err != nil {
		return err
	}
	var report struct {
		Counters map[string]struct{ Packets uint64 }
	}
	if err := json.Unmarshal(shown, &report); err != nil {
		return fmt.Errorf("%s show: %w", m.opts.Plugin, err)
	}
	turned, own := report.Counters["out_turned"].Packets, report.Counters["out_own"].Packets
	switch {
	case turned == 0:
		return errors.New("a connection from outside the proxies' cgroup was not turned aside; this node's kernel lacks what the rules need")
	case turned > 1 || own == 0:
		return fmt.Errorf("the rules do not recognise connections from cgroup %q (inode %d): the agent must see the host's cgroups, and the rules be loaded from the host's cgroup namespace", spec.Bypass.Path, spec.Bypass.ID)
	}
	if spec.KeepClient {
		return m.testClient(ctx, name)
	}
	return nil
}

// probeInterface gives the thread's new namespace an interface with a route to
// probeAddr.
func probeInterface() error {
	la := netlink.NewLinkAttrs()
	la.Name = "weir0"
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: la, PeerName: "weir1"}); err != nil {
		return err
	}
	for _, name := range []string{"weir0", "weir1"} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if name == "weir0" {
			addr := &netlink.Addr{IPNet: &net.IPNet{IP: probeAddr.Addr().Prev().AsSlice(), Mask: net.CIDRMask(24, 32)}}
			if err := netlink.AddrAdd(link, addr); err != nil {
				return err
			}
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
	}
	return nil
}

// enterCgroupNS moves this thread to the cgroup namespace at path, where it is
// another one. Kernels before 6.11 and their stable trees look cgroups up from
// the root, later ones from the namespace of whoever loads the rules.
func enterCgroupNS(path string) error {
	f, err := openOther(path, "/proc/thread-self/ns/cgroup")
	if f == nil {
		return err
	}
	defer f.Close()
	if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("enter the host's cgroup namespace: %w", err)
	}
	return nil
}

// dialInCgroup runs DialCommand in a process that was started in a cgroup below
// the proxies' parent.
func (m *Manager) dialInCgroup(ctx context.Context, name string, args ...string) error {
	dir, err := m.cgroups.begin(name, Limits{}, m.opts.Limits).v2()
	if err != nil {
		return err
	}
	defer func() { _ = m.cgroups.remove(name) }()
	defer dir.Close()
	if err := runDial(ctx, dir, args...); err != nil {
		return fmt.Errorf("dial from the proxies' cgroup: %w", err)
	}
	return nil
}

// runDial runs DialCommand in a process that is started in an open cgroup.
func runDial(ctx context.Context, cgroup *os.File, args ...string) error {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", append([]string{DialCommand}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// Dial starts a TCP connection and does not wait for it: what is looked for is
// its first packet.
func Dial(addr netip.AddrPort) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	err = unix.Connect(fd, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()})
	if err != nil && !errors.Is(err, unix.EINPROGRESS) && !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("dial %s: %w", addr, err)
	}
	return nil
}
