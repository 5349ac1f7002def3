package interop

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/tests/pod"
)

// namespace is where the captured pods of these tests are.
const namespace = "shop"

// What the tests of one run share. node is nil where they cannot run, for want of
// root.
var (
	node     *pod.Node
	programs pod.Binaries
	agent    *pod.Agent

	// accessLog is of both proxies.
	accessLog = &output{}

	// caller has the clients, called the servers.
	caller = &pod.Pod{Namespace: namespace, Name: "caller", ContainerID: "caller"}
	called = &pod.Pod{Namespace: namespace, Name: "called", ContainerID: "called", App: "called"}
	// counted has clients of whose every connection it is known what becomes.
	counted = &pod.Pod{Namespace: namespace, Name: "counted", ContainerID: "counted"}
	// starved has clients whose proxy is left without what it needs.
	starved = &pod.Pod{Namespace: namespace, Name: "starved", ContainerID: "starved"}
)

// grpcTools is the folder of gRPC's client and server, in out/bin.
const grpcTools = "interop"

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(pod.Main("interop", build, ready, m.Run))
}

func build(ctx context.Context, _ pod.Binaries) error {
	_, err := pod.BuildTools(ctx, "tests/interop/grpc", grpcTools,
		"google.golang.org/grpc/interop/client", "google.golang.org/grpc/interop/server")
	return err
}

// ready starts the agent and the two pods. They end with the node.
func ready(ctx context.Context, entered *pod.Node, found pod.Binaries) error {
	node, programs = entered, found
	if err := node.Write("called.yaml", pod.CapturedNamespace(namespace), called.Manifest(), pod.PlaintextPorts(namespace, called.App, plain...)); err != nil {
		return err
	}
	chain, err := node.NewChain(programs.Folders(), nil)
	if err != nil {
		return err
	}
	if agent, err = node.StartAgent(ctx, programs, accessLog, "--host-cgroup-ns", "/proc/1/ns/cgroup"); err != nil {
		return err
	}
	if err := node.Create(ctx, chain, called); err != nil {
		return err
	}
	// One file: an agent that knows the pod knows the Services.
	manifests := []any{caller.Manifest(), counted.Manifest(), starved.Manifest()}
	for _, s := range services {
		manifests = append(append(manifests, s.Manifest()), s.Slices(s.port, called)...)
	}
	if err := node.Write("caller.yaml", manifests...); err != nil {
		return err
	}
	for i, p := range []*pod.Pod{caller, counted, starved} {
		if err := node.Create(ctx, chain, p); err != nil {
			return err
		}
		manifests[i] = p.Running(nil) // by its addresses it is known whose workload it is
	}
	return node.Write("caller.yaml", manifests...)
}

// onNode skips a test that has no node, and shows the logs of one that fails.
func onNode(t *testing.T) {
	t.Helper()
	if node == nil {
		t.Skip("a node of one's own needs root")
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of the agent's log:\n%s", end(agent.Log()))
			t.Logf("the end of the access log, of what failed:\n%s", end(failures(accessLog.String())))
		}
	})
}

// throughBoth is onNode. At the test's end it looks whether caller's connections were turned aside, and what came in to called was recorded:
// the connection between the two proxies may be one that was there before.
func throughBoth(t *testing.T) {
	t.Helper()
	onNode(t)
	before, logged := turned(t), len(accessLog.String())
	t.Cleanup(func() {
		if now := turned(t); now == before {
			t.Errorf("no connection of caller's was turned aside (%d before, %d now)", before, now)
		}
		eventually(t, patience, "what came in to called", func() error {
			if !strings.Contains(accessLog.String()[logged:], `"weir.direction":"inbound","weir.pod":"`+called.ID()+`"`) {
				return errors.New("there is no record of it")
			}
			return nil
		})
	})
}

// end is the last of a log.
func end(log string) string { return log[max(0, len(log)-4000):] }

// failures are the records that have a reason, one a line.
func failures(log string) string {
	var failed strings.Builder
	for line := range strings.Lines(log) {
		if strings.Contains(line, `"error.type"`) {
			failed.WriteString(line)
		}
	}
	return failed.String()
}

// turned is how many of caller's connections the rules have turned aside.
func turned(t *testing.T) uint64 {
	t.Helper()
	rules, err := caller.ShowRules(context.Background(), programs)
	if err != nil {
		t.Fatal(err)
	}
	return rules.Counters["out_turned"].Packets
}

// services are of called's ports. All are known before caller is there, so that
// its first connection finds them.
var services []declaration

// declaration is a Service and the port behind it.
type declaration struct {
	pod.Service
	port uint16
}

// declare makes a Service, of both families, of a port of called. It returns where
// that is dialled.
func declare(name string, port uint16, appProtocol string) netip.AddrPort {
	address := netip.AddrFrom4([4]byte{10, 96, 7, byte(len(services) + 1)})
	at := netip.AddrPortFrom(address, 80)
	services = append(services, declaration{pod.Service{
		Namespace: namespace, Name: name, Port: 80, AppProtocol: appProtocol, ClusterIPs: []netip.Addr{address, over6(at).Addr()},
	}, port})
	return at
}

// over6 is a Service's other address.
func over6(service netip.AddrPort) netip.AddrPort {
	v6 := netip.MustParseAddr("fd00:10:96::7:0").As16()
	v6[15] = service.Addr().As4()[3]
	return netip.AddrPortFrom(netip.AddrFrom16(v6), service.Port())
}

// on is a port of called, which nobody declares.
func on(port uint16) netip.AddrPort { return netip.AddrPortFrom(called.Address(false), port) }

// on6 is the same by the other family.
func on6(port uint16) netip.AddrPort { return netip.AddrPortFrom(called.Address(true), port) }

// listen listens on a port of called until the test ends.
func listen(t *testing.T, port uint16) net.Listener {
	t.Helper()
	var l net.Listener
	err := pod.In(called.Netns, func() error {
		var err error
		l, err = net.Listen("tcp4", on(port).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// dial connects from caller.
func dial(ctx context.Context, to string) (net.Conn, error) { return dialFrom(ctx, caller, to) }

func dialFrom(ctx context.Context, p *pod.Pod, to string) (net.Conn, error) {
	var conn net.Conn
	err := pod.In(p.Netns, func() error {
		var err error
		conn, err = (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", to)
		return err
	})
	return conn, err
}

// folder makes a folder for the files of a program that runs as nobody. It goes
// with the test: it is in memory.
func folder(t *testing.T) string {
	t.Helper()
	dir := folderIn(t, pod.NodeDir, "interop", t.Name())
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// folderIn makes one more, in another.
func folderIn(t *testing.T, path ...string) string {
	t.Helper()
	dir := filepath.Join(path...)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	return dir
}

// write writes a file that everybody may read.
func write(t *testing.T, content string, path ...string) string {
	t.Helper()
	file := filepath.Join(path...)
	if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// eventually asks again and again until there is no error.
func eventually(t *testing.T, limit time.Duration, what string, ask func() error) {
	t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		err := ask()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// listens waits until a pod's own program listens on an address of that pod.
func listens(t *testing.T, p *pod.Pod, addr netip.AddrPort) {
	t.Helper()
	eventually(t, 20*time.Second, fmt.Sprintf("nothing listens on %s of %s", addr, p.ID()), func() error {
		return pod.In(p.Netns, func() error {
			conn, err := net.DialTimeout("tcp", addr.String(), time.Second)
			if err == nil {
				conn.Close()
			}
			return err
		})
	})
}
