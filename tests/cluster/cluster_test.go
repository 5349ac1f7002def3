package cluster

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestCluster runs a cluster beside any other that runs, and asks one pod from
// another by the Service's name, across nodes, in both IP families.
func TestCluster(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a whole cluster: not with -short")
	}
	if err := CheckHost(); err != nil {
		t.Skip(err)
	}
	if _, err := FindBinaries(""); err != nil {
		t.Skip(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()

	options := Options{Name: "weirtest", StateDir: filepath.Join(t.TempDir(), "state"), Progress: func(line string) { t.Log(line) }}
	c, err := Up(ctx, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Down(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
		checkGone(t, c)
	})
	if _, err := Up(ctx, options); err == nil || !strings.Contains(err.Error(), "already up") {
		t.Errorf("a second Up: got %v, want one that says it is already up", err)
	}
	// All that follows is done from what the state folder says.
	c, err = Attach(options.StateDir)
	if err != nil {
		t.Fatal(err)
	}

	loadWeb(ctx, t, c)
	applyWeb(ctx, t, c)
	for _, family := range []string{"tcp4", "tcp6"} {
		args := []string{"exec", "client", "--", "/web", "get", family, "http://web.default.svc.cluster.local/"}
		// The node's kube-proxy may hear of a pod that is ready a moment after we do.
		out, err := c.Kubectl(ctx, args...)
		for deadline := time.Now().Add(10 * time.Second); err != nil && time.Now().Before(deadline); {
			time.Sleep(200 * time.Millisecond)
			out, err = c.Kubectl(ctx, args...)
		}
		if err != nil {
			t.Fatalf("%s: %v", family, err)
		}
		checkAnswer(t, string(out), c.Nodes[1])
	}
	t.Run("NodeFolders", func(t *testing.T) { testNodeFolders(ctx, t, c) })
	t.Run("RestartContainerd", func(t *testing.T) {
		if err := c.Nodes[1].RestartContainerd(ctx); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("RestartAPIServer", func(t *testing.T) {
		if err := errors.Join(c.Fabric.Stop(ctx, "kube-apiserver"), c.Fabric.Start(ctx, "kube-apiserver")); err != nil {
			t.Fatal(err)
		}
		if err := c.WaitAPI(ctx); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("Reboot", func(t *testing.T) { testReboot(ctx, t, c) })
	if _, err := c.Kubectl(ctx, "delete", "pod", "client", "--timeout=30s"); err != nil {
		t.Error(err)
	}
}

func loadWeb(ctx context.Context, t *testing.T, c *Cluster) {
	t.Helper()
	dir := t.TempDir()
	build := exec.CommandContext(ctx, "go", "build", "-o", filepath.Join(dir, "web"), "./testdata/web")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build web: %v\n%s", err, out)
	}
	image := Image{Ref: "weir.test/web:test", Entrypoint: []string{"/web"}, Files: map[string]string{"/web": filepath.Join(dir, "web")}}
	if err := BuildImage(filepath.Join(dir, "web.tar"), image); err != nil {
		t.Fatal(err)
	}
	if err := c.LoadImage(ctx, filepath.Join(dir, "web.tar")); err != nil {
		t.Fatal(err)
	}
}

func applyWeb(ctx context.Context, t *testing.T, c *Cluster) {
	t.Helper()
	manifest, err := os.ReadFile("testdata/web.yaml")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.NewReplacer("NODE1", c.Nodes[0].Name, "NODE2", c.Nodes[1].Name).Replace(string(manifest))
	file := filepath.Join(t.TempDir(), "web.yaml")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Kubectl(ctx, "apply", "-f", file); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Kubectl(ctx, "wait", "--for=condition=Ready", "pods", "--all", "--timeout=60s"); err != nil {
		t.Fatal(err)
	}
}

// checkAnswer wants the answer of the pod "web", which saw a pod of client's
// node, not the node itself: the network hides no one.
func checkAnswer(t *testing.T, answer string, client *Node) {
	t.Helper()
	name, from, _ := strings.Cut(strings.TrimSpace(answer), " ")
	addr, err := netip.ParseAddr(from)
	if err != nil || name != "web" {
		t.Errorf("got answer %q", answer)
		return
	}
	for _, prefix := range client.PodRanges {
		if prefix.Contains(addr) {
			return
		}
	}
	t.Errorf("the server saw %s, which is none of %v", addr, client.PodRanges)
}

// testNodeFolders checks that a pod's hostPath volumes are its node's folders,
// not the host's, and that it sees the network namespaces mounted there.
func testNodeFolders(ctx context.Context, t *testing.T, c *Cluster) {
	node := c.Nodes[1]
	if _, err := os.Stat(node.Path("/opt/weir")); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat("/opt/weir"); err == nil {
		t.Error("the node's /opt/weir shows up on the host")
	}
	namespaces, err := os.ReadDir(node.Path("/run/netns"))
	if err != nil || len(namespaces) == 0 {
		t.Errorf("network namespaces of %s: %d, %v", node.Name, len(namespaces), err)
	}
	out, err := node.Command(ctx, "hostname").Output()
	if err != nil || strings.TrimSpace(string(out)) != node.Name {
		t.Errorf("hostname in %s: %q, %v", node.Name, out, err)
	}
}

// testReboot wants the node's pods to run again, and nothing of before but what is
// on its disk.
func testReboot(ctx context.Context, t *testing.T, c *Cluster) {
	node := c.Nodes[1]
	bootID := func() string {
		out, err := c.Kubectl(ctx, "get", "node", node.Name, "-o", "jsonpath={.status.nodeInfo.bootID}")
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}
	before, first := node.PID(), bootID()
	for _, path := range []string{"/run/marker", "/etc/marker"} {
		if err := os.WriteFile(node.Path(path), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Reboot(ctx, node); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join("/proc", strconv.Itoa(before))); err == nil {
		t.Errorf("process %d is still there", before)
	}
	if _, err := os.Stat(node.Path("/run/marker")); err == nil {
		t.Error("/run is as it was")
	}
	if _, err := os.Stat(node.Path("/etc/marker")); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	err := poll(ctx, "the pod on the rebooted node", func(ctx context.Context) error {
		if bootID() == first {
			return errors.New("kubelet has not noticed that the node booted")
		}
		for _, family := range []string{"tcp4", "tcp6"} {
			out, err := c.Kubectl(ctx, "exec", "client", "--", "/web", "get", family, "http://web.default.svc.cluster.local/")
			if err != nil {
				return err
			}
			checkAnswer(t, string(out), node)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// checkGone wants nothing of the cluster on the host.
func checkGone(t *testing.T, c *Cluster) {
	t.Helper()
	if _, err := os.Stat(c.options.StateDir); err == nil {
		t.Errorf("%s is still there", c.options.StateDir)
	}
	if _, err := net.InterfaceByName(hostInterface(c.options.Name)); err == nil {
		t.Error("the link to the host is still there")
	}
	all, err := hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	for _, machine := range c.machines() {
		if machine.init.alive() {
			t.Errorf("machine %s is still running", machine.Name)
		}
		for _, h := range all {
			if _, err := os.Stat(filepath.Join(h.mount, machine.Name)); err == nil {
				t.Errorf("cgroup %s is still in %s", machine.Name, h.mount)
			}
		}
	}
}
