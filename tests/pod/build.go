package pod

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Binaries are the programs a node runs.
type Binaries struct {
	Plugin, Agent, Proxy string // weir-cni, weir-agent, weir-proxy
	CNI                  string // folder of bridge, host-local and portmap
	Install, Pause       string // weir-install, pause: only after BuildMore
}

// binariesIn names the programs in a folder, "out/bin".
func binariesIn(dir string) Binaries {
	return Binaries{
		Plugin:  filepath.Join(dir, "weir-cni"),
		Agent:   filepath.Join(dir, "weir-agent"),
		Proxy:   filepath.Join(dir, "weir-proxy"),
		CNI:     filepath.Join(dir, "cni"),
		Install: filepath.Join(dir, "weir-install"),
		Pause:   filepath.Join(dir, "pause"),
	}
}

// Folders are where a chain looks for its plugins.
func (b Binaries) Folders() []string { return []string{filepath.Dir(b.Plugin), b.CNI} }

// Find returns the programs in dir, and an error that names the first one that
// is not there.
func Find(dir string) (Binaries, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return Binaries{}, err
	}
	b := binariesIn(dir)
	for _, path := range []string{b.Plugin, b.Agent, b.Proxy, filepath.Join(b.CNI, "bridge"), filepath.Join(b.CNI, "host-local"), filepath.Join(b.CNI, "portmap")} {
		if _, err := os.Stat(path); err != nil {
			return Binaries{}, fmt.Errorf("a program is missing: %w", err)
		}
	}
	return b, nil
}

// FindBuilt returns the programs that Build made.
func FindBuilt() (Binaries, error) {
	root, err := repository()
	if err != nil {
		return Binaries{}, err
	}
	return Find(filepath.Join(root, "out", "bin"))
}

// cniModule is the folder, in the repository, of the module that pins the CNI
// plugins.
const cniModule = "tests/cluster/build/cniplugins"

// cniPackages are built from it.
var cniPackages = []string{
	"github.com/containernetworking/plugins/plugins/main/bridge",
	"github.com/containernetworking/plugins/plugins/ipam/host-local",
	"github.com/containernetworking/plugins/plugins/meta/portmap",
}

// Modules of their own, in the repository.
const (
	flannelModule = "tests/cluster/build/flannel"
	pauseModule   = "tests/cluster/build/pause"
)

// BuildMore makes what only some tests need beside what Build makes: the primary
// plugins ptp and flannel; for a container runtime loopback, the pause program and
// weir-install.
func BuildMore(ctx context.Context, b Binaries) error {
	root, err := repository()
	if err != nil {
		return fmt.Errorf("build: %w", err)
	}
	const plugins = "github.com/containernetworking/plugins/plugins/"
	cni := b.CNI + string(filepath.Separator)
	return errors.Join(
		goBuild(ctx, filepath.Join(root, cniModule), cni, plugins+"main/ptp", plugins+"main/loopback"),
		goBuild(ctx, filepath.Join(root, flannelModule), cni, plugins+"meta/flannel"),
		goBuild(ctx, filepath.Join(root, pauseModule), b.Pause, "."),
		goBuild(ctx, root, b.Install, "./install"),
	)
}

// BuildTools makes programs that a module of its own pins, static, in a folder of
// that name in out/bin, and returns the folder. module is a folder in the
// repository: "tests/interop/grpc".
func BuildTools(ctx context.Context, module, name string, packages ...string) (string, error) {
	root, err := repository()
	if err != nil {
		return "", fmt.Errorf("build: %w", err)
	}
	dir := filepath.Join(root, "out", "bin", name)
	return dir, goBuild(ctx, filepath.Join(root, module), dir+string(filepath.Separator), packages...)
}

// Build makes the programs, static, in out/bin of the repository that the
// working directory is in. What is up to date is not built again. Several may
// build at once: the second waits for the first.
func Build(ctx context.Context) (Binaries, error) {
	root, err := repository()
	if err != nil {
		return Binaries{}, err
	}
	dir := filepath.Join(root, "out", "bin")
	b := binariesIn(dir)
	if err := os.MkdirAll(b.CNI, 0o755); err != nil {
		return Binaries{}, fmt.Errorf("build: %w", err)
	}
	lock, err := lock(ctx, filepath.Join(dir, ".lock"))
	if err != nil {
		return Binaries{}, err
	}
	defer lock.Close()

	group, ctx := errgroup.WithContext(ctx)
	for output, source := range map[string]string{b.Plugin: "./plugin", b.Agent: "./agent", b.Proxy: "./proxy"} {
		group.Go(func() error { return goBuild(ctx, root, output, source) })
	}
	group.Go(func() error {
		return goBuild(ctx, filepath.Join(root, cniModule), b.CNI+string(filepath.Separator), cniPackages...)
	})
	return b, group.Wait()
}

// buildTags are the Makefile's TAGS: what is measured is what is shipped.
const buildTags = "grpcnotrace"

// goBuild builds static programs in a module's folder.
func goBuild(ctx context.Context, module, output string, packages ...string) error {
	args := append([]string{"build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-tags=" + buildTags, "-ldflags=-s -w", "-o", output}, packages...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = module
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // it ends its compilers itself
	cmd.WaitDelay = 10 * time.Second
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("go build %s: %w\n%s", strings.Join(packages, " "), err, said.String())
	}
	return nil
}

// repository is the folder of this module, from the working directory upwards.
func repository() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, cniModule, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("the working directory is not in Weir's repository")
		}
		dir = parent
	}
}

// lock waits for the only lock on a file, which closing it gives back.
func lock(ctx context.Context, path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("build: %w", err)
	}
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return file, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			file.Close()
			return nil, fmt.Errorf("build: lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			file.Close()
			return nil, context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
