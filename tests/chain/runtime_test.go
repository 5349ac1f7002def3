package chain

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/weirmesh/weir/install/unary"
	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/tests/cluster"
	"github.com/weirmesh/weir/tests/pod"
)

// The old runtime is Debian's containerd, 1.6: it offers no cgroupPath, calls no
// STATUS, and its libcni passes over drop-ins.
const (
	runtimeDir    = pod.NodeDir + "/old"
	runtimeSocket = pod.NodeDir + "/containerd/containerd.sock"
	pauseImage    = "weir.test/pause:old"
	confDir       = runtimeDir + "/net.d"
	binDir        = runtimeDir + "/bin"
)

// runtimeConfig: without CAP_SYS_RESOURCE no process may lower its oom_score_adj,
// and on a tmpfs nothing is gained by overlays.
const runtimeConfig = `version = 2
root = "` + runtimeDir + `/root"
state = "` + pod.NodeDir + `/containerd/state"
disabled_plugins = ["io.containerd.internal.v1.opt"]

[grpc]
  address = "` + runtimeSocket + `"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + pauseImage + `"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
  [plugins."io.containerd.grpc.v1.cri".cni]
    conf_dir = "` + confDir + `"
    bin_dir = "` + binDir + `"
`

// TestOldRuntime has weir-install chain the plugin where an old runtime reads it,
// and that runtime make a pod's sandbox.
func TestOldRuntime(t *testing.T) {
	onNode(t)
	bin := debianContainerd(t)
	target := listenOutside(t)
	prepareRuntime(t)
	background(t, filepath.Join(bin, "containerd"), "--config", filepath.Join(runtimeDir, "config.toml"))
	within(t, 20*time.Second, "containerd to answer", func() error {
		_, err := cri(t.Context(), "Version", nil)
		return err
	})
	if out, err := command(t, filepath.Join(bin, "ctr"), "--address", runtimeSocket, "--namespace", "k8s.io",
		"images", "import", "--snapshotter", "native", runtimeDir+"/pause.tar").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}

	list := filepath.Join(confDir, "10-old.conflist")
	background(t, programs.Install, "run", "--cni-conf-dir="+confDir, "--cni-bin-dir="+binDir, "--plugin="+programs.Plugin,
		"--run-dir="+pod.NodeDir+"/weir", "--runtime-socket="+runtimeSocket)
	within(t, 20*time.Second, "the plugin to be an entry of the list", func() error {
		content, err := os.ReadFile(list)
		if err == nil && !strings.Contains(string(content), "weir-cni") {
			err = fmt.Errorf("it is %s", content)
		}
		return err
	})
	if left, err := filepath.Glob(filepath.Join(confDir, "*", "*.conf")); err != nil || len(left) > 0 {
		t.Errorf("this runtime reads no drop-ins, and there are %v, %v", left, err)
	}

	p := pods(t, "old", 1)[0]
	// The runtime takes the list in a moment after it was written.
	within(t, 10*time.Second, "a captured sandbox", func() error { return runSandbox(t, p) })
	if pids, err := node.CgroupPIDs(p.ContainerID); err != nil || len(pids) != 1 {
		t.Errorf("proxies of the sandbox: %v, %v, want one", pids, err)
	}
	if err := pod.In(p.Netns, func() error { return dial(target) }); err != nil {
		t.Error(err)
	}
	rules, err := p.ShowRules(t.Context(), programs)
	if err != nil || rules.Counters[capture.OutTurned].Packets != 1 {
		t.Errorf("of one connection %d were turned aside, %v", rules.Counters[capture.OutTurned].Packets, err)
	}

	removeSandbox(t, p.ContainerID)
	if pids, err := node.CgroupPIDs(p.ContainerID); err == nil {
		t.Errorf("after the sandbox the proxies %v are there", pids)
	}
	if files, err := filepath.Glob(filepath.Join(pod.NodeDir, "weir/*", p.ContainerID+"*")); err != nil || len(files) > 0 {
		t.Errorf("after the sandbox %v are there, %v", files, err)
	}
}

// debianContainerd is the folder of programs that .ci/packages unpacks.
func debianContainerd(t *testing.T) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(cache, "weir/debian/containerd/usr/bin")
	out, err := command(t, filepath.Join(bin, "containerd"), "--version").Output()
	if err != nil {
		t.Skipf("Debian's containerd is not unpacked: run .ci/packages: %v", err)
	}
	t.Logf("%s", bytes.TrimSpace(out))
	return bin
}

// prepareRuntime writes what the runtime reads: its configuration, a primary of a
// version that it knows, programs and the sandbox's image.
func prepareRuntime(t *testing.T) {
	t.Helper()
	for _, dir := range []string{confDir, binDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	list, err := json.Marshal(map[string]any{"cniVersion": "1.0.0", "name": "old", "plugins": []any{pod.Bridge()}})
	if err != nil {
		t.Fatal(err)
	}
	errs := []error{
		os.WriteFile(filepath.Join(runtimeDir, "config.toml"), []byte(runtimeConfig), 0o644),
		os.WriteFile(filepath.Join(confDir, "10-old.conflist"), list, 0o644),
		cluster.BuildImage(runtimeDir+"/pause.tar", cluster.Image{
			Ref: pauseImage, Entrypoint: []string{"/pause"}, Files: map[string]string{"/pause": programs.Pause},
		}),
	}
	for _, plugin := range []string{"bridge", "host-local", "loopback"} {
		errs = append(errs, os.Symlink(filepath.Join(programs.CNI, plugin), filepath.Join(binDir, plugin)))
	}
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func command(t *testing.T, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(t.Context(), program, args...)
	// Its shim is beside it.
	cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(program)+":"+os.Getenv("PATH"))
	return cmd
}

// background runs a program until the test ends, and shows its last words if that
// failed.
func background(t *testing.T, program string, args ...string) {
	t.Helper()
	cmd := command(t, program, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Wait() // t's context is done
		if t.Failed() {
			lines := strings.Split(said.String(), "\n")
			t.Logf("the end of what %s said:\n%s", filepath.Base(program), strings.Join(lines[max(0, len(lines)-15):], "\n"))
		}
	})
}

func within(t *testing.T, limit time.Duration, what string, ready func() error) {
	t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(50 * time.Millisecond) {
		err := ready()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// cri calls the runtime. Messages are CRI v1's, api.proto of k8s.io/cri-api; what
// is needed of them is little, and its module brings gRPC's service of all of it.
func cri(ctx context.Context, method string, message []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	return unary.Call(ctx, runtimeSocket, "/runtime.v1.RuntimeService/"+method, message)
}

// text is a string field, or a message in a message.
func text[S string | []byte](number protowire.Number, value S) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), []byte(value))
}

// runSandbox has the runtime make p's sandbox, and fails if it is not captured.
func runSandbox(t *testing.T, p *pod.Pod) error {
	known, err := filepath.Glob(pod.NodeDir + "/netns/cni-*")
	if err != nil {
		return err
	}
	metadata := bytes.Join([][]byte{text(1, p.Name), text(2, "5d3c0c86-old"), text(3, p.Namespace)}, nil)
	config := bytes.Join([][]byte{text(1, metadata), text(8, text(1, "/"+node.Name+"/pods"))}, nil)
	answer, err := cri(t.Context(), "RunPodSandbox", text(1, config))
	if err != nil {
		return err
	}
	number, _, size := protowire.ConsumeTag(answer)
	id, idSize := protowire.ConsumeString(answer[max(size, 0):])
	if number != 1 || idSize < 0 {
		return fmt.Errorf("RunPodSandbox answered %q", answer)
	}
	now, err := filepath.Glob(pod.NodeDir + "/netns/cni-*")
	if err != nil || len(now) != len(known)+1 {
		return fmt.Errorf("namespaces before %v, after %v, %w", known, now, err)
	}
	p.ContainerID, p.Netns = id, now[0]
	rules, err := p.ShowRules(t.Context(), programs)
	if err == nil && rules.Rules == "" {
		err = errors.New("it is not captured")
	}
	if err != nil {
		removeSandbox(t, id)
	}
	return err
}

func removeSandbox(t *testing.T, id string) {
	t.Helper()
	for _, method := range []string{"StopPodSandbox", "RemovePodSandbox"} {
		if _, err := cri(t.Context(), method, text(1, id)); err != nil {
			t.Errorf("%s: %v", method, err)
		}
	}
}
