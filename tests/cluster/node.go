package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	containerdSocket = "/run/containerd/containerd.sock"
	pauseImage       = "weir.test/pause:" + pauseVersion
)

// Node is a machine that runs containerd, kubelet and kube-proxy.
type Node struct {
	*Machine
	// Addrs are the node's addresses, IPv4 first.
	Addrs []netip.Addr
	// PodRanges are the ranges its pods get their addresses from.
	PodRanges []netip.Prefix

	index int    // from 1
	dir   string // on the host: the node's own folders and configuration
}

// A node has folders of its own, kept in its part of the state folder: some are
// laid over the host's (what is not in them is the host's), others hide it.
var (
	laidOver = []string{"/etc", "/opt"}
	hiding   = []string{"/var/lib", "/var/log"}
)

func (n *Node) own(folder string) string {
	return filepath.Join(n.dir, strings.ReplaceAll(folder[1:], "/", "-"))
}

// Path is where a file of the node can be read and written from the host, while
// the node runs.
func (n *Node) Path(path string) string {
	return fmt.Sprintf("/proc/%d/root%s", n.PID(), path)
}

// prepare writes the node's folders and configuration, before it is started.
func (n *Node) prepare(c *Cluster) error {
	for _, folder := range laidOver {
		for _, dir := range []string{n.own(folder), n.own(folder) + ".work"} {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
		}
	}
	cni, bin := filepath.Join(n.own("/etc"), "cni", "net.d"), filepath.Join(n.own("/opt"), "cni", "bin")
	for _, dir := range []string{cni, bin, n.own("/var/lib"), filepath.Join(n.own("/var/log"), "pods")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := copyPlugins(c.binaries.Plugins, bin); err != nil {
		return fmt.Errorf("CNI plugins: %w", err)
	}
	conflist, err := json.MarshalIndent(n.conflist(), "", "  ")
	if err != nil {
		return err
	}
	kubelet, err := json.MarshalIndent(n.kubeletConfig(c), "", "  ")
	if err != nil {
		return err
	}
	proxy, err := json.MarshalIndent(n.proxyConfig(c), "", "  ")
	if err != nil {
		return err
	}
	for path, content := range map[string][]byte{
		filepath.Join(cni, "10-podnet.conflist"):   conflist,
		filepath.Join(n.dir, "kubelet.json"):       kubelet,
		filepath.Join(n.dir, "kube-proxy.json"):    proxy,
		filepath.Join(n.dir, "containerd.toml"):    []byte(containerdConfig),
		filepath.Join(n.dir, "pods-resolv.conf"):   nil, // no name is known outside the cluster
		filepath.Join(n.own("/etc"), "hostname"):   []byte(n.Name + "\n"),
		filepath.Join(n.own("/etc"), "machine-id"): []byte(fmt.Sprintf("%032x\n", n.index)),
	} {
		if err := os.WriteFile(path, content, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// copyPlugins copies, as a node's plugin folder is written to by installers and
// mounted into pods: links would be dangling there, or shared with the cache.
func copyPlugins(from, to string) error {
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		content, err := os.ReadFile(filepath.Join(from, entry.Name()))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(to, entry.Name()), content, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// kernelTunables are set by kubelet and shared by the whole host. A node gets
// files of its own in their place, so that the host's stay as they are.
var kernelTunables = []string{
	"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
	"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
}

// machineScript is what every machine runs first, in its own namespaces.
const machineScript = `
mount --make-rprivate /
mount -t proc proc /proc
# sysfs shows the interfaces of the network namespace it was mounted in.
mount -t tmpfs -o mode=755 run /run
mkdir /run/cgroup /run/lock /run/netns
mount --rbind /sys/fs/cgroup /run/cgroup
mount -t sysfs sysfs /sys
mount --rbind /run/cgroup /sys/fs/cgroup
umount -l /run/cgroup
rmdir /run/cgroup
`

// setup makes the created machine the node: file system, kernel settings, network.
func (n *Node) setup(ctx context.Context, c *Cluster) error {
	if err := n.script(ctx, n.setupScript()); err != nil {
		return fmt.Errorf("set up %s: %w", n.Name, err)
	}
	if err := output(n.Command(ctx, "ip", "-batch", "-"), c.net.nodeBatch(n.index, len(c.Nodes))); err != nil {
		return fmt.Errorf("network of %s: %w", n.Name, err)
	}
	if err := output(n.Command(ctx, "nft", "-f", "-"), c.net.nodeRules()); err != nil {
		return fmt.Errorf("rules of %s: %w", n.Name, err)
	}
	return nil
}

// setupScript makes the node's file system and its kernel settings.
func (n *Node) setupScript() string {
	var b strings.Builder
	b.WriteString(machineScript)
	fmt.Fprintf(&b, "echo %s >/proc/sys/kernel/hostname\n", n.Name)
	// By this kubelet knows that the machine has booted. Containers see the host's.
	b.WriteString("cat /proc/sys/kernel/random/uuid >/run/boot_id; mount --bind /run/boot_id /proc/sys/kernel/random/boot_id\n")
	b.WriteString("mkdir /run/tunables\n")
	for _, tunable := range kernelTunables {
		file := "/run/tunables/" + filepath.Base(tunable)
		fmt.Fprintf(&b, "cat /proc/sys/%s >%s; mount --bind %s /proc/sys/%s\n", tunable, file, file, tunable)
	}
	for _, folder := range laidOver {
		own := n.own(folder)
		fmt.Fprintf(&b, "mount -t overlay -o lowerdir=%s,upperdir=%s,workdir=%s.work overlay %s\n", folder, own, own, folder)
	}
	for _, folder := range hiding {
		fmt.Fprintf(&b, "mount --bind %s %s\n", n.own(folder), folder)
	}
	// Shared, as on a real node: what is mounted later shows up in pods that
	// asked for it by mountPropagation.
	b.WriteString("mount --make-rshared /\n")
	b.WriteString("echo 1 >/proc/sys/net/ipv4/ip_forward\n")
	if len(n.Addrs) > 1 {
		b.WriteString("echo 1 >/proc/sys/net/ipv6/conf/all/forwarding\n")
	}
	return b.String()
}

// conflist is the primary network: a bridge on each node, routes between them.
// containerd calls a plugin's STATUS from cniVersion 1.1.0 on.
func (n *Node) conflist() any {
	type object = map[string]any
	var ranges [][]object
	for _, prefix := range n.PodRanges {
		ranges = append(ranges, []object{{"subnet": prefix.String()}})
	}
	return object{
		"cniVersion": "1.1.0", "name": "podnet",
		"plugins": []object{
			{
				"type": "bridge", "bridge": "cni0", "isGateway": true, "isDefaultGateway": true, "hairpinMode": true,
				"ipam": object{"type": "host-local", "ranges": ranges},
			},
			{"type": "portmap", "capabilities": object{"portMappings": true}},
		},
	}
}

// containerdConfig is the same on each node, as each has its own folders.
// restrict_oom_score_adj: without CAP_SYS_RESOURCE no process may lower it.
const containerdConfig = `version = 3

[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '` + pauseImage + `'

[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
    SystemdCgroup = false
`

func (n *Node) kubeletConfig(c *Cluster) any {
	type object = map[string]any
	return object{
		"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
		"containerRuntimeEndpoint": "unix://" + containerdSocket,
		"authentication": object{
			"anonymous": object{"enabled": false},
			"webhook":   object{"enabled": true},
			"x509":      object{"clientCAFile": c.pki("ca.crt")},
		},
		"authorization":     object{"mode": "Webhook"},
		"tlsCertFile":       c.pki(n.Name + ".crt"),
		"tlsPrivateKeyFile": c.pki(n.Name + ".key"),

		"cgroupDriver": "cgroupfs", "cgroupRoot": n.Cgroup(), "enforceNodeAllocatable": []string{},
		"failCgroupV1": false, "failSwapOn": false,
		"clusterDNS": []string{c.net.dns()[0].String()}, "clusterDomain": "cluster.local",
		"resolvConf": filepath.Join(n.dir, "pods-resolv.conf"),
		"maxPods":    110, "serializeImagePulls": false,
		"volumePluginDir":           "/var/lib/kubelet/volume-plugins",
		"syncFrequency":             "5s",
		"nodeStatusUpdateFrequency": "2s",
		// The disk is the host's, and how full it is none of a test's business.
		"imageGCHighThresholdPercent": 100,
		"evictionHard":                object{"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%", "nodefs.inodesFree": "1%"},
	}
}

func (n *Node) proxyConfig(c *Cluster) any {
	type object = map[string]any
	return object{
		"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
		"mode": "nftables", "hostnameOverride": n.Name,
		"clientConnection": object{"kubeconfig": c.pki("kube-proxy.kubeconfig")},
		"clusterCIDR":      c.net.pods.String(), "detectLocalMode": "ClusterCIDR",
		"nftables": object{"minSyncPeriod": "100ms"},
		// The maximum of tracked connections is one for the whole host.
		"conntrack": object{"maxPerCore": 0, "min": 0},
	}
}

func (n *Node) startContainerd(c *Cluster) error {
	return n.start(n.process("containerd", filepath.Join(c.binaries.Containerd, "containerd"),
		"--config", filepath.Join(n.dir, "containerd.toml")))
}

// startKubernetes starts kubelet and kube-proxy.
func (n *Node) startKubernetes(c *Cluster) error {
	var addrs []string
	for _, addr := range n.Addrs {
		addrs = append(addrs, addr.String())
	}
	kubelet := n.process("kubelet", filepath.Join(c.binaries.Kubernetes, "kubelet"),
		"--config="+filepath.Join(n.dir, "kubelet.json"),
		"--kubeconfig="+c.pki(n.Name+".kubeconfig"),
		"--hostname-override="+n.Name, "--node-ip="+strings.Join(addrs, ","),
	)
	if err := n.start(kubelet); err != nil {
		return err
	}
	return n.start(n.process("kube-proxy", filepath.Join(c.binaries.Kubernetes, "kube-proxy"),
		"--config="+filepath.Join(n.dir, "kube-proxy.json")))
}

// waitContainerd waits until containerd answers and its CRI part is up.
func (n *Node) waitContainerd(ctx context.Context) error {
	err := poll(ctx, "containerd on "+n.Name, func(ctx context.Context) error {
		if err := n.running("containerd"); err != nil {
			return err
		}
		return output(n.Command(ctx, "ctr", "--address", containerdSocket, "version"), "")
	})
	if err != nil {
		return fmt.Errorf("%w; %s", err, n.processes["containerd"].logTail())
	}
	return nil
}

// RestartContainerd stops containerd and starts it again, waiting until it
// answers. Containers go on running.
func (n *Node) RestartContainerd(ctx context.Context) error {
	if err := n.Stop(ctx, "containerd"); err != nil {
		return err
	}
	if err := n.Start(ctx, "containerd"); err != nil {
		return err
	}
	return n.waitContainerd(ctx)
}

// LoadImage imports an image archive (OCI layout or docker's) into the node's
// containerd and waits until kubelet can see it.
func (n *Node) LoadImage(ctx context.Context, archive string) error {
	ctr := func(args ...string) ([]byte, error) {
		cmd := n.Command(ctx, "ctr", append([]string{"--address", containerdSocket, "--namespace", "k8s.io"}, args...)...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			return nil, fmt.Errorf("ctr %s: %w: %s", strings.Join(args, " "), err, lastLines(string(out), 5))
		}
		return out, nil
	}
	file, err := filepath.Abs(archive)
	if err != nil {
		return err
	}
	if _, err := ctr("images", "import", file); err != nil {
		return fmt.Errorf("node %s: %w", n.Name, err)
	}
	// The CRI part learns of an image by an event, and marks it then.
	waitCtx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return poll(waitCtx, "node "+n.Name+" to take in "+archive, func(context.Context) error {
		all, err := ctr("images", "ls", "-q")
		if err != nil {
			return err
		}
		managed, err := ctr("images", "ls", "-q", `labels."io.cri-containerd.image"==managed`)
		if err != nil {
			return err
		}
		if len(all) != len(managed) {
			return errors.New("not all images are marked as the CRI's")
		}
		return nil
	})
}

// object is the Node, made before kubelet registers: it carries the pod ranges,
// which no controller here hands out, and a zone for each node.
func (n *Node) object() any {
	type object = map[string]any
	var ranges []string
	for _, prefix := range n.PodRanges {
		ranges = append(ranges, prefix.String())
	}
	return object{
		"apiVersion": "v1", "kind": "Node",
		"metadata": object{"name": n.Name, "labels": object{
			"kubernetes.io/hostname":        n.Name,
			"topology.kubernetes.io/region": "weir",
			"topology.kubernetes.io/zone":   fmt.Sprintf("zone-%d", n.index),
		}},
		"spec": object{"podCIDR": ranges[0], "podCIDRs": ranges},
	}
}
