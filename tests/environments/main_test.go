package environments

import (
	"context"
	"errors"
	"flag"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/tests/pod"
)

// namespace is where the captured pods of these tests are.
const namespace = "shop"

// Node and programs that the tests of one run share. node is nil where the tests
// cannot run, for want of root.
var (
	node     *pod.Node
	programs pod.Binaries
)

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(pod.Main("environments", nil, ready, m.Run))
}

func ready(_ context.Context, entered *pod.Node, found pod.Binaries) error {
	node, programs = entered, found
	return entered.Write("namespace.yaml", pod.CapturedNamespace(namespace))
}

// onNode skips a test that has no node.
func onNode(t *testing.T) {
	t.Helper()
	if node == nil {
		t.Skip("a node of one's own needs root")
	}
}

// agentOf starts an agent, which ends with the test if nobody ended it before; on
// failure its last words follow.
func agentOf(t *testing.T, b pod.Binaries, flags ...string) *pod.Agent {
	t.Helper()
	a, err := node.StartAgent(context.Background(), b, io.Discard, append([]string{"--host-cgroup-ns", "/proc/1/ns/cgroup"}, flags...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.End(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			lines := strings.Split(a.Log(), "\n")
			t.Logf("the end of the agent's log:\n%s", strings.Join(lines[max(0, len(lines)-20):], "\n"))
		}
	})
	return a
}

// chained is a CNI chain with weir-cni in it.
func chained(t *testing.T) *pod.Chain {
	t.Helper()
	chain, err := node.NewChain(programs.Folders(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return chain
}

// start takes a pod of the test through the chain, and out of it with the test.
// makeNamespace is nil, or makes its network namespace.
func start(t *testing.T, chain *pod.Chain, name string, makeNamespace func(name string) (string, error)) *pod.Pod {
	t.Helper()
	if makeNamespace == nil {
		makeNamespace = node.NewNamespace
	}
	p := &pod.Pod{Namespace: namespace, Name: name, ContainerID: name}
	if err := node.Write(name+".yaml", p.Manifest()); err != nil {
		t.Fatal(err)
	}
	var err error
	if p.Netns, err = makeNamespace(name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(chain.Del(context.Background(), p), node.RemoveNamespace(p.Netns)); err != nil {
			t.Error(err)
		}
	})
	if err := chain.Add(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	return p
}

// echo has something in the pod send back what it gets, until the test ends.
func echo(t *testing.T, p *pod.Pod) netip.AddrPort {
	t.Helper()
	var l net.Listener
	err := pod.In(p.Netns, func() error {
		var err error
		l, err = net.Listen("tcp4", netip.AddrPortFrom(p.Address(false), 7).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go acceptAll(l)
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func acceptAll(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go sendBack(conn)
	}
}

func sendBack(conn net.Conn) {
	defer conn.Close()
	_, _ = io.Copy(conn, conn)
}

// dial connects from a pod, and talks once.
func dial(p *pod.Pod, to netip.AddrPort) (net.Conn, error) {
	var conn net.Conn
	err := pod.In(p.Netns, func() error {
		var err error
		conn, err = net.DialTimeout("tcp4", to.String(), 5*time.Second)
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := talk(conn); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// talk sends a word and waits for it.
func talk(conn net.Conn) error {
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte("word")); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, make([]byte, 4))
	return err
}

// proxyOf is the one proxy of a pod.
func proxyOf(t *testing.T, p *pod.Pod) int {
	t.Helper()
	pids, err := node.CgroupPIDs(p.ContainerID)
	if err != nil || len(pids) != 1 {
		t.Fatalf("proxies of %s: %v, %v", p.ID(), pids, err)
	}
	return pids[0]
}

// expectCaptured dials from one pod to another, and says that rules turned the
// connection aside, in both.
func expectCaptured(t *testing.T, from, to *pod.Pod, addr netip.AddrPort) {
	t.Helper()
	count := func() (uint64, uint64) {
		out, err := from.ShowRules(t.Context(), programs)
		in, inErr := to.ShowRules(t.Context(), programs)
		if err := errors.Join(err, inErr); err != nil {
			t.Fatal(err)
		}
		return out.Counters["out_turned"].Packets, in.Counters["in_turned"].Packets
	}
	outBefore, inBefore := count()
	conn, err := dial(from, addr)
	if err != nil {
		t.Errorf("%s to %s: %v", from.ID(), to.ID(), err)
		return
	}
	conn.Close()
	if out, in := count(); out == outBefore || in == inBefore {
		t.Errorf("%s to %s: the connection was not turned aside (out %d → %d, in %d → %d)", from.ID(), to.ID(), outBefore, out, inBefore, in)
	}
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
