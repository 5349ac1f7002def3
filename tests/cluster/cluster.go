package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Options say what cluster to run. The zero value is a good one.
type Options struct {
	// Name prefixes whatever is the host's: cgroups, the link's interface, and
	// nodes. Up to eight lower-case letters and digits; empty: "weir". Two
	// clusters of different names can run at once.
	Name string
	// StateDir is where the cluster keeps its files, on a disk that overlayfs
	// can write to; empty: DefaultStateDir(Name). It must not exist, or be
	// empty.
	StateDir string
	// CacheDir holds the binaries; empty: DefaultCacheDir.
	CacheDir string
	// Nodes is how many nodes to run; 0: two.
	Nodes int
	// IPv4Only leaves IPv6 out; otherwise nodes, pods and services have both.
	IPv4Only bool
	// Progress gets a line per step; nil: none.
	Progress func(string) `json:"-"`
}

// DefaultStateDir is the state folder of the cluster of that name (empty:
// "weir").
func DefaultStateDir(name string) string {
	if name == "" {
		name = "weir"
	}
	return filepath.Join("/var/tmp/weir-cluster", name)
}

// Cluster is a running cluster.
type Cluster struct {
	// Kubeconfig is the path of a file with which programs on the host reach
	// the API server as cluster-admin.
	Kubeconfig string
	// Fabric is the machine that carries the control plane and joins the
	// nodes. To them it is the outside: a test's client from beyond the cluster
	// runs there.
	Fabric *Machine
	Nodes  []*Node

	options  Options
	net      network
	binaries Binaries
	ca       *authority
	api      *apiClient
}

// note is what the state folder says of the cluster.
type note struct {
	Options
	Link     netip.Prefix
	Binaries Binaries
	Complete bool // Up has come to its end
}

const noteFile = "cluster.json"

func (n note) write() error {
	content, err := json.MarshalIndent(n, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(n.StateDir, noteFile), content, 0o600)
}

var validName = regexp.MustCompile(`^[a-z][a-z0-9]{0,7}$`)

func (o Options) withDefaults() (Options, error) {
	if o.Name == "" {
		o.Name = "weir"
	}
	if !validName.MatchString(o.Name) {
		return o, fmt.Errorf("cluster name %q: want up to eight lower-case letters and digits", o.Name)
	}
	if o.Nodes == 0 {
		o.Nodes = 2
	}
	if o.Nodes < 1 || o.Nodes > 9 {
		return o, fmt.Errorf("%d nodes: want 1 to 9", o.Nodes)
	}
	if o.StateDir == "" {
		o.StateDir = DefaultStateDir(o.Name)
	}
	dir, err := filepath.Abs(o.StateDir)
	if err != nil {
		return o, err
	}
	o.StateDir = dir
	for _, hidden := range append(slices.Concat(laidOver, hiding), "/run", "/proc", "/sys") {
		if dir == hidden || strings.HasPrefix(dir, hidden+"/") {
			return o, fmt.Errorf("state folder %s: nodes have a %s of their own; choose a folder elsewhere", dir, hidden)
		}
	}
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	return o, nil
}

// newCluster lays the cluster out and starts nothing.
func newCluster(n note) *Cluster {
	c := &Cluster{
		options: n.Options, binaries: n.Binaries,
		net:        newNetwork(n.IPv4Only, n.Link),
		Kubeconfig: filepath.Join(n.StateDir, "kubeconfig"),
	}
	b := n.Binaries
	path := strings.Join([]string{b.Kubernetes, b.Containerd, "/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"}, ":")
	c.Fabric = newMachine(n.StateDir, n.Name+"-fabric", path)
	for i := 1; i <= n.Nodes; i++ {
		name := fmt.Sprintf("%s-n%d", n.Name, i)
		c.Nodes = append(c.Nodes, &Node{
			Machine: newMachine(n.StateDir, name, path),
			Addrs:   c.net.node(i), PodRanges: c.net.podRange(i),
			index: i, dir: filepath.Join(n.StateDir, "nodes", name),
		})
	}
	return c
}

func (c *Cluster) path(parts ...string) string {
	return filepath.Join(append([]string{c.options.StateDir}, parts...)...)
}

func (c *Cluster) machines() []*Machine {
	machines := []*Machine{c.Fabric}
	for _, node := range c.Nodes {
		machines = append(machines, node.Machine)
	}
	return machines
}

// Up starts a cluster and returns when its nodes are ready and its DNS answers.
// It builds nothing: see Build. The cluster outlives the caller; end it with
// Down. When Up fails, or ctx ends, nothing of it stays but the logs, in the
// folder the error names.
func Up(ctx context.Context, options Options) (*Cluster, error) {
	options, err := options.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := CheckHost(); err != nil {
		return nil, err
	}
	binaries, err := FindBinaries(options.CacheDir)
	if err != nil {
		return nil, err
	}
	link, err := hostLink(options.Name)
	if err != nil {
		return nil, err
	}
	lock, err := claim(options)
	if err != nil {
		return nil, err
	}
	defer lock.Close()

	n := note{Options: options, Link: link, Binaries: binaries}
	if err := n.write(); err != nil {
		return nil, err
	}
	c := newCluster(n)
	if err := c.up(ctx); err != nil {
		logs := options.StateDir + ".logs"
		copyErr := keepLogs(c.path("logs"), logs)
		downCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		downErr := remove(downCtx, n.Options)
		if downErr == nil {
			downErr = c.waitEnded(downCtx)
		}
		return nil, fmt.Errorf("%w (logs: %s)", errors.Join(err, copyErr, downErr), logs)
	}
	n.Complete = true
	if err := n.write(); err != nil {
		return nil, err
	}
	return c, nil
}

// claim makes the state folder and locks it for this process.
func claim(options Options) (*os.File, error) {
	if err := os.MkdirAll(options.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("state folder: %w", err)
	}
	dir, err := os.Open(options.StateDir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		dir.Close()
		return nil, fmt.Errorf("state folder %s is in use by another `up` or `down`", options.StateDir)
	}
	entries, err := dir.ReadDir(1)
	if len(entries) > 0 {
		dir.Close()
		return nil, fmt.Errorf("cluster %s is already up, or was left half-way: run `weir-cluster down -name %s` first (state folder %s)", options.Name, options.Name, options.StateDir)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		dir.Close()
		return nil, err
	}
	return dir, nil
}

func (c *Cluster) up(ctx context.Context) error {
	step := c.options.Progress
	for _, dir := range []string{"pki", "logs", "run", "images", "nodes"} {
		if err := os.Mkdir(c.path(dir), 0o700); err != nil {
			return err
		}
	}
	if err := c.makeCredentials(); err != nil {
		return err
	}
	api, err := newAPIClient(c.ca, c.hostServer(), "admin")
	if err != nil {
		return err
	}
	c.api = api

	step("starting machines")
	if err := c.startMachines(ctx); err != nil {
		return err
	}
	step("starting the control plane and containerd")
	if err := c.startEtcd(); err != nil {
		return err
	}
	if err := c.startAPIServer(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, 2*time.Minute, errors.New("not up after two minutes"))
	defer cancel()
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error { return c.startControlPlane(groupCtx) })
	group.Go(func() error { return c.startRuntimes(groupCtx) })
	if err := group.Wait(); err != nil {
		return err
	}
	step("starting kubelet and kube-proxy")
	for _, node := range c.Nodes {
		if err := node.startKubernetes(c); err != nil {
			return err
		}
	}
	if err := c.createDNS(ctx); err != nil {
		return err
	}
	if err := c.waitNodes(ctx); err != nil {
		return err
	}
	step("nodes are ready; waiting for DNS")
	return c.waitDNS(ctx)
}

func (c *Cluster) startMachines(ctx context.Context) error {
	pause := filepath.Join(c.binaries.Pause, "pause")
	for _, machine := range c.machines() {
		if err := machine.create(pause); err != nil {
			return err
		}
	}
	var pids []int
	for _, node := range c.Nodes {
		pids = append(pids, node.PID())
	}
	if err := run(ctx, c.net.hostBatch(c.options.Name, c.Fabric.PID(), pids), "ip", "-batch", "-"); err != nil {
		return fmt.Errorf("links: %w", err)
	}
	fabric := machineScript + "echo " + c.Fabric.Name + " >/proc/sys/kernel/hostname\n"
	if err := c.Fabric.script(ctx, fabric); err != nil {
		return fmt.Errorf("set up %s: %w", c.Fabric.Name, err)
	}
	if err := output(c.Fabric.Command(ctx, "ip", "-batch", "-"), c.net.fabricBatch(len(c.Nodes))); err != nil {
		return fmt.Errorf("network of %s: %w", c.Fabric.Name, err)
	}
	for _, node := range c.Nodes {
		if err := node.prepare(c); err != nil {
			return fmt.Errorf("prepare %s: %w", node.Name, err)
		}
		if err := node.setup(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// startControlPlane brings the API server up and what works through it.
func (c *Cluster) startControlPlane(ctx context.Context) error {
	if err := c.WaitAPI(ctx); err != nil {
		return err
	}
	if err := c.startControllers(); err != nil {
		return err
	}
	for _, node := range c.Nodes {
		if err := c.api.create(ctx, "/api/v1/nodes", node.object()); err != nil {
			return fmt.Errorf("create node %s: %w", node.Name, err)
		}
	}
	return nil
}

// startRuntimes brings containerd up on each node, with the cluster's images.
func (c *Cluster) startRuntimes(ctx context.Context) error {
	for _, node := range c.Nodes {
		if err := node.startContainerd(c); err != nil {
			return err
		}
	}
	images, err := c.buildImages()
	if err != nil {
		return err
	}
	for _, node := range c.Nodes {
		if err := node.waitContainerd(ctx); err != nil {
			return err
		}
	}
	for _, image := range images {
		if err := c.LoadImage(ctx, image); err != nil {
			return err
		}
	}
	return nil
}

// Attach finds the running cluster of a state folder (empty: the default).
func Attach(stateDir string) (*Cluster, error) {
	n, err := readNote(stateDir)
	if err != nil {
		return nil, err
	}
	if !n.Complete {
		return nil, fmt.Errorf("%w: it is starting, or was left half-way: run `weir-cluster down -name %s`", errNotRunning, n.Name)
	}
	c := newCluster(n)
	for _, machine := range c.machines() {
		if err := machine.attach(); err != nil {
			return nil, fmt.Errorf("%w: %w", errNotRunning, err)
		}
		if !machine.init.alive() {
			return nil, fmt.Errorf("%w: machine %s has ended", errNotRunning, machine.Name)
		}
	}
	c.ca = &authority{dir: c.path("pki")}
	api, err := newAPIClient(c.ca, c.hostServer(), "admin")
	if err != nil {
		return nil, err
	}
	c.api = api
	return c, nil
}

func readNote(stateDir string) (note, error) {
	if stateDir == "" {
		stateDir = DefaultStateDir("")
	}
	var n note
	content, err := os.ReadFile(filepath.Join(stateDir, noteFile))
	if errors.Is(err, fs.ErrNotExist) {
		return n, fmt.Errorf("%w: %s has no %s", errNotRunning, stateDir, noteFile)
	}
	if err != nil {
		return n, err
	}
	if err := json.Unmarshal(content, &n); err != nil {
		return n, fmt.Errorf("%s: %w", filepath.Join(stateDir, noteFile), err)
	}
	return n, nil
}

// Down ends the cluster: processes, namespaces, mounts, cgroups, links, files.
func (c *Cluster) Down(ctx context.Context) error {
	if err := Down(ctx, c.options); err != nil {
		return err
	}
	return c.waitEnded(ctx)
}

// waitEnded waits for killed machines to end: a PID namespace does when the
// last process in it is reaped, and those that this process has started are its
// own to reap.
func (c *Cluster) waitEnded(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return poll(ctx, "the machines to end", func(context.Context) error {
		for _, machine := range c.machines() {
			for _, p := range append(slices.Collect(maps.Values(machine.processes)), machine.init) {
				if p.alive() {
					return fmt.Errorf("%s on %s is still running", p.Name, machine.Name)
				}
			}
		}
		return nil
	})
}

// Down ends the cluster of options' Name and StateDir, whatever state it is in:
// running, half started, or without the process that started it. No such
// cluster is no error.
func Down(ctx context.Context, options Options) error {
	options, err := options.withDefaults()
	if err != nil {
		return err
	}
	if err := checkRoot(); err != nil {
		return err
	}
	n, err := readNote(options.StateDir)
	switch {
	case errors.Is(err, errNotRunning):
		// Nothing is started before the note is written; but the folder's
		// files may have been removed by hand.
	case err != nil:
		return err
	default:
		options = n.Options
	}
	dir, err := os.Open(options.StateDir)
	if err == nil {
		defer dir.Close()
		lockCtx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		if err := poll(lockCtx, "another `up` or `down`", func(context.Context) error {
			return unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		}); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(options.StateDir + ".logs"); err != nil {
		return err
	}
	return remove(ctx, options)
}

// remove kills every machine and removes what they leave. The machines' first
// processes are in their cgroups, and with them goes all that is in their PID
// namespaces, wherever it moved to; mounts and links go with the namespaces.
func remove(ctx context.Context, options Options) error {
	names := []string{options.Name + "-fabric"}
	for i := 1; i <= options.Nodes; i++ {
		names = append(names, fmt.Sprintf("%s-n%d", options.Name, i))
	}
	for _, name := range names {
		if err := killCgroup(name); err != nil {
			return fmt.Errorf("kill %s: %w", name, err)
		}
	}
	for _, name := range names {
		cgroupCtx, cancel := context.WithTimeout(ctx, 20*time.Second)
		err := removeCgroup(cgroupCtx, name)
		cancel()
		if err != nil {
			return err
		}
	}
	// The kernel takes namespaces down at its leisure; the link is asked for.
	iface := hostInterface(options.Name)
	if _, err := os.Stat("/sys/class/net/" + iface); err == nil {
		if err := run(ctx, "", "ip", "link", "del", iface); err != nil {
			if _, statErr := os.Stat("/sys/class/net/" + iface); statErr == nil {
				return err
			}
		}
	}
	if err := os.RemoveAll(options.StateDir); err != nil {
		return fmt.Errorf("state folder: %w", err)
	}
	// The default's parent is ours, too; others' are not empty.
	if parent := filepath.Dir(options.StateDir); parent == filepath.Dir(DefaultStateDir("")) {
		_ = os.Remove(parent)
	}
	return nil
}

// LoadImage imports an image archive on every node.
func (c *Cluster) LoadImage(ctx context.Context, archive string) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, node := range c.Nodes {
		group.Go(func() error { return node.LoadImage(ctx, archive) })
	}
	return group.Wait()
}

// Kubectl runs kubectl on the host and returns its stdout; an error carries its
// stderr.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(c.binaries.Kubernetes, "kubectl"), append([]string{"--kubeconfig", c.Kubeconfig}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		return stdout.Bytes(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, lastLines(stderr.String(), 10))
	}
	return stdout.Bytes(), nil
}

// Bin is the folder of kubectl and the other Kubernetes programs on the host.
func (c *Cluster) Bin() string { return c.binaries.Kubernetes }

// LogDir is the folder of all processes' logs, on the host.
func (c *Cluster) LogDir() string { return c.path("logs") }
