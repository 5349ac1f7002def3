package pod

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

// Ranges of the pods' addresses on a node. The first address of each is the
// bridge's, and so the node's.
var (
	PodRange4 = netip.MustParsePrefix("10.244.0.0/16")
	PodRange6 = netip.MustParsePrefix("fd00:10:244::/64")
)

// Pod is a pod as a container runtime sees it: a sandbox with a network
// namespace.
type Pod struct {
	Namespace, Name string
	ContainerID     string
	Netns           string       // path
	Addresses       []netip.Addr // filled in by Add

	App     string // its label app; empty: none
	Account string // its service account; empty: the namespace's default
}

// ID is "namespace/name".
func (p *Pod) ID() string { return p.Namespace + "/" + p.Name }

// Address is the pod's address of one family, or the zero Addr.
func (p *Pod) Address(v6 bool) netip.Addr {
	for _, a := range p.Addresses {
		if a.Is6() == v6 {
			return a
		}
	}
	return netip.Addr{}
}

// Ran is what is seen of one plugin's run.
type Ran struct {
	Plugin string        // its type: "bridge"
	Took   time.Duration // from exec to exit
	CPU    time.Duration // of the plugin and the plugins it ran, user and system
}

// Chain is a node's CNI chain: bridge, with addresses of both families by
// host-local, then weir-cni.
type Chain struct {
	list *libcni.NetworkConfigList
	cni  *libcni.CNIConfig
}

// NewChain makes the chain from the plugins in folders. ran, if not nil, is told
// of each plugin of the chain that ran.
func (n *Node) NewChain(folders []string, ran func(command string, r Ran)) (*Chain, error) {
	return n.newChain("1.1.0", folders, ran, map[string]any{"type": "weir-cni"})
}

// NewChainIn makes the chain in a version of the CNI specification: "0.3.1".
func (n *Node) NewChainIn(version string, folders []string) (*Chain, error) {
	return n.newChain(version, folders, nil, map[string]any{"type": "weir-cni"})
}

// NewBareChain makes the chain without weir-cni, to compare with.
func (n *Node) NewBareChain(folders []string) (*Chain, error) {
	return n.newChain("1.1.0", folders, nil)
}

// newChain puts plugins behind the bridge.
func (n *Node) newChain(version string, folders []string, ran func(command string, r Ran), plugins ...any) (*Chain, error) {
	return chainOf(version, folders, ran, append([]any{Bridge()}, plugins...)...)
}

// NewChainOf makes a chain of plugins' configurations, in a version of the CNI
// specification.
func (n *Node) NewChainOf(version string, folders []string, plugins ...any) (*Chain, error) {
	return chainOf(version, folders, nil, plugins...)
}

// Addresses has host-local give a pod an address of each family.
func Addresses() map[string]any {
	return map[string]any{
		"type": "host-local", "dataDir": filepath.Join(NodeDir, "cni/networks"),
		"ranges": []any{
			[]any{map[string]string{"subnet": PodRange4.String()}},
			[]any{map[string]string{"subnet": PodRange6.String()}},
		},
	}
}

// Bridge is a node's usual primary plugin.
func Bridge() map[string]any {
	return map[string]any{
		"type": "bridge", "bridge": "pods0", "isGateway": true, "isDefaultGateway": true, "ipam": Addresses(),
	}
}

func chainOf(version string, folders []string, ran func(command string, r Ran), plugins ...any) (*Chain, error) {
	conf := map[string]any{
		"cniVersion": version,
		"name":       "weir-pods",
		"plugins":    plugins,
	}
	content, err := json.Marshal(conf)
	if err != nil {
		return nil, fmt.Errorf("chain: %w", err)
	}
	list, err := libcni.NetworkConfFromBytes(content)
	if err != nil {
		return nil, fmt.Errorf("chain: %w", err)
	}
	run := &runner{ran: ran}
	return &Chain{
		list: list,
		cni:  libcni.NewCNIConfigWithCacheDir(folders, filepath.Join(NodeDir, "cni/cache"), run),
	}, nil
}

// Create makes a pod: a namespace, which it is told of, and its ADD.
func (n *Node) Create(ctx context.Context, c *Chain, p *Pod) error {
	var err error
	if p.Netns, err = n.NewNamespace(p.ContainerID); err != nil {
		return err
	}
	return c.Add(ctx, p)
}

// Add takes p through the chain and fills in its addresses.
func (c *Chain) Add(ctx context.Context, p *Pod) error {
	result, err := c.cni.AddNetworkList(ctx, c.list, p.runtimeConf())
	if err != nil {
		return fmt.Errorf("ADD %s: %w", p.ID(), err)
	}
	r, err := current.GetResult(result)
	if err != nil {
		return fmt.Errorf("ADD %s: %w", p.ID(), err)
	}
	p.Addresses = nil
	for _, ip := range r.IPs {
		addr, ok := netip.AddrFromSlice(ip.Address.IP)
		if !ok {
			return fmt.Errorf("ADD %s: address %v", p.ID(), ip.Address.IP)
		}
		p.Addresses = append(p.Addresses, addr.Unmap())
	}
	return nil
}

// Del takes p out of the chain again.
func (c *Chain) Del(ctx context.Context, p *Pod) error {
	if err := c.cni.DelNetworkList(ctx, c.list, p.runtimeConf()); err != nil {
		return fmt.Errorf("DEL %s: %w", p.ID(), err)
	}
	return nil
}

// Check has the chain's plugins look whether p is as ADD left it (CNI 0.4.0).
func (c *Chain) Check(ctx context.Context, p *Pod) error {
	if err := c.cni.CheckNetworkList(ctx, c.list, p.runtimeConf()); err != nil {
		return fmt.Errorf("CHECK %s: %w", p.ID(), err)
	}
	return nil
}

// GC has the chain's plugins drop what belongs to none of pods (CNI 1.1.0).
func (c *Chain) GC(ctx context.Context, pods ...*Pod) error {
	args := &libcni.GCArgs{ValidAttachments: []types.GCAttachment{}}
	for _, p := range pods {
		args.ValidAttachments = append(args.ValidAttachments, types.GCAttachment{ContainerID: p.ContainerID, IfName: ifName})
	}
	if err := c.cni.GCNetworkList(ctx, c.list, args); err != nil {
		return fmt.Errorf("GC: %w", err)
	}
	return nil
}

// Status asks the chain's plugins whether they can ADD (CNI 1.1.0).
func (c *Chain) Status(ctx context.Context) error {
	if err := c.cni.GetStatusNetworkList(ctx, c.list); err != nil {
		return fmt.Errorf("STATUS: %w", err)
	}
	return nil
}

// ifName is the pods' interface.
const ifName = "eth0"

func (p *Pod) runtimeConf() *libcni.RuntimeConf {
	return &libcni.RuntimeConf{
		ContainerID: p.ContainerID,
		NetNS:       p.Netns,
		IfName:      ifName,
		Args: [][2]string{
			{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", p.Namespace},
			{"K8S_POD_NAME", p.Name},
			{"K8S_POD_INFRA_CONTAINER_ID", p.ContainerID},
		},
	}
}

// runner executes plugins for libcni, and looks at the watch. It is an
// invoke.Exec.
type runner struct {
	version.PluginDecoder
	ran func(command string, r Ran)
}

// FindInPath finds a plugin's binary.
func (*runner) FindInPath(plugin string, folders []string) (string, error) {
	return invoke.FindInPath(plugin, folders)
}

// ExecPlugin runs a plugin to its end. A plugin that fails says why on its
// standard output (CNI specification 1.1.0, section "Error").
func (x *runner) ExecPlugin(ctx context.Context, path string, stdin []byte, env []string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, path)
	cmd.Env = env
	cmd.Stdin = bytes.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	began := time.Now()
	err := cmd.Run()
	took := time.Since(began)
	if err != nil {
		return nil, pluginError(path, err, stdout.Bytes(), stderr.String())
	}
	if x.ran != nil {
		x.ran(command(env), Ran{
			Plugin: filepath.Base(path), Took: took,
			CPU: cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(),
		})
	}
	return stdout.Bytes(), nil
}

// command is what a plugin with that environment is asked to do: "ADD".
func command(env []string) string {
	for _, v := range env {
		if c, ok := strings.CutPrefix(v, "CNI_COMMAND="); ok {
			return c
		}
	}
	return ""
}

func pluginError(path string, err error, stdout []byte, stderr string) error {
	var said types.Error
	if json.Unmarshal(stdout, &said) == nil && said.Msg != "" {
		return fmt.Errorf("%s: %w", filepath.Base(path), &said)
	}
	return fmt.Errorf("%s: %w", filepath.Base(path), errors.Join(err, errors.New(strings.TrimSpace(string(stdout)+stderr))))
}
