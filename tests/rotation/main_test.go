package rotation

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/weirmesh/weir/tests/pod"
)

// namespace is where the captured pods of these tests are.
const namespace = "shop"

var (
	rotations = flag.Int("rotations", 100, "certificates that are renewed while pods call each other")
	takeovers = flag.Int("takeovers", 1, "CAs that take over meanwhile")
	size      = flag.Int("pods", 30, "pods that call each other")
)

// What the test needs. node is nil where it cannot run, for want of root.
var (
	node  *pod.Node
	agent *pod.Agent
	ring  []*member
)

// member is a captured pod of the ring. Each has a service account of its own.
type member struct {
	*pod.Pod
	web, echo pod.Service // what it serves
}

// Ports of a member's applications.
const webPort, echoPort = 8080, 9000

func newMember(i int) *member {
	name := fmt.Sprintf("member-%d", i)
	service := func(of string, third byte, protocol string) pod.Service {
		return pod.Service{
			Namespace: namespace, Name: name + "-" + of, Port: 80, AppProtocol: protocol,
			ClusterIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 96, third, byte(i + 1)})},
		}
	}
	return &member{
		Pod: &pod.Pod{Namespace: namespace, Name: name, ContainerID: name, Account: name},
		web: service("web", 1, "http"), echo: service("echo", 2, "tcp"),
	}
}

// identity is who the member is to those it calls.
func (m *member) identity() string {
	return "URI=spiffe://cluster.local/ns/" + namespace + "/sa/" + m.Account
}

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(pod.Main("rotation", nil, ready, m.Run))
}

// failures are the lines of an access log that have a reason to fail, the last of them.
type failures struct {
	mu    sync.Mutex
	part  []byte
	lines []string
}

// mostFailures is how many lines are kept.
const mostFailures = 50

// Write takes what the agent logs.
func (f *failures) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.part = append(f.part, p...)
	for {
		line, rest, whole := bytes.Cut(f.part, []byte("\n"))
		if !whole {
			return len(p), nil
		}
		if bytes.Contains(line, []byte(`"error.type"`)) {
			f.lines = append(f.lines[max(0, len(f.lines)+1-mostFailures):], string(line))
		}
		f.part = rest
	}
}

func (f *failures) String() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(f.lines, "\n")
}

// accessLog is of all proxies.
var accessLog failures

// issuerDir is where the operator's CA is, optionsFile has the mesh options.
var (
	issuerDir   = filepath.Join(pod.NodeDir, "issuer")
	optionsFile = filepath.Join(pod.NodeDir, "options.yaml")
)

// ready starts the agent, and the pods with what they serve. All of it ends with the node.
func ready(ctx context.Context, entered *pod.Node, programs pod.Binaries) error {
	if *size < 2 || *size > 250 {
		return fmt.Errorf("-pods %d is none of 2 to 250", *size)
	}
	if err := os.MkdirAll(issuerDir, 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(optionsFile, fmt.Appendf(nil, "certificateTTL: %s\n", ttl), 0o600); err != nil {
		return err
	}
	if _, err := giveCA(0); err != nil {
		return err
	}
	var waiting, running []any
	for i := range *size {
		m := newMember(i)
		ring, waiting = append(ring, m), append(waiting, m.Manifest(), m.web.Manifest(), m.echo.Manifest())
	}
	namespaces := []any{pod.CapturedNamespace(namespace), strict}
	if err := entered.Write("pods.yaml", append(namespaces, waiting...)...); err != nil {
		return err
	}
	var err error
	if agent, err = entered.StartAgent(ctx, programs, &accessLog, "--options", optionsFile, "--issuer", issuerDir); err != nil {
		return err
	}
	chain, err := entered.NewChain(programs.Folders(), nil)
	if err != nil {
		return err
	}
	for _, m := range ring {
		if err := entered.Create(ctx, chain, m.Pod); err != nil {
			return err
		}
		if err := m.serve(); err != nil {
			return err
		}
		running = append(append(running, m.Running(nil), m.web.Manifest(), m.echo.Manifest()), m.web.Slices(webPort, m.Pod)...)
		running = append(running, m.echo.Slices(echoPort, m.Pod)...)
	}
	node = entered
	return entered.Write("pods.yaml", append(namespaces, running...)...)
}

// strict has plaintext refused: what is answered has been encrypted.
var strict = map[string]any{
	"apiVersion": "policy.weirmesh.io/v1alpha1", "kind": "PeerAuthentication",
	"metadata": map[string]any{"namespace": namespace, "name": "strict"},
	"spec":     map[string]any{"mode": "Strict"},
}
