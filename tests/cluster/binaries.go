package cluster

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Versions of what is built. The go.mod files below build/ pin them; these
// name the cache's folders and are what the programs report.
const (
	kubernetesVersion = "v1.37.2"
	containerdVersion = "v2.4.2"
	corednsVersion    = "v1.15.0"
	pluginsVersion    = "v1.9.1"
	pauseVersion      = "v1"
)

// ErrNotBuilt says that a binary is not in the cache yet.
var ErrNotBuilt = errors.New("the cluster's binaries are not built: run `go run ./tests/cluster/cmd/weir-cluster build`")

// Binaries are the folders that hold the programs of one set of versions.
type Binaries struct {
	Kubernetes string // kube-apiserver, …, kubelet, kube-proxy, kubectl
	Containerd string // containerd, containerd-shim-runc-v2, ctr
	CoreDNS    string // coredns
	Plugins    string // bridge, host-local, loopback, portmap, ptp
	Pause      string // pause
}

// component is one nested module below build/ and what is built from it.
type component struct {
	name, version string
	packages      string // what go build is given: "." or "tool"
	ldflags       string
	links         []string // further names of the one binary
	folder        func(*Binaries) *string
}

func components() []component {
	const (
		k8s  = " -X k8s.io/component-base/version."
		ctrd = " -X github.com/containerd/containerd/v2/version."
		dns  = " -X github.com/coredns/coredns/coremain."
	)
	return []component{
		{
			name: "pause", version: pauseVersion, packages: ".",
			folder: func(b *Binaries) *string { return &b.Pause },
		},
		{
			name: "cniplugins", version: pluginsVersion, packages: "tool",
			ldflags: " -X github.com/containernetworking/plugins/pkg/utils/buildversion.BuildVersion=" + pluginsVersion,
			folder:  func(b *Binaries) *string { return &b.Plugins },
		},
		{
			name: "coredns", version: corednsVersion, packages: ".",
			ldflags: dns + "GitCommit=none",
			folder:  func(b *Binaries) *string { return &b.CoreDNS },
		},
		{
			name: "containerd", version: containerdVersion, packages: "tool",
			ldflags: ctrd + "Version=" + strings.TrimPrefix(containerdVersion, "v"),
			folder:  func(b *Binaries) *string { return &b.Containerd },
		},
		{
			name: "kubernetes", version: kubernetesVersion, packages: ".",
			// kubectl and the API server parse their own version: without
			// these it is v0.0.0-master and version skew checks fail.
			ldflags: k8s + "gitVersion=" + kubernetesVersion + k8s + "gitMajor=1" + k8s + "gitMinor=37" + k8s + "gitTreeState=clean",
			links:   []string{"kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl"},
			folder:  func(b *Binaries) *string { return &b.Kubernetes },
		},
	}
}

// DefaultCacheDir is where binaries are kept: weir/cluster in the user's cache
// folder ($XDG_CACHE_HOME, else ~/.cache).
func DefaultCacheDir() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("cache folder: %w", err)
	}
	return filepath.Join(dir, "weir", "cluster"), nil
}

// Build makes the binaries that are not in cacheDir yet (empty: the default)
// from the modules below tests/cluster/build, which it looks for from the
// working directory upwards. The first build takes 10 to 20 minutes on two
// cores; later ones only hash the modules' files. progress gets a line per
// component. Several builders may run at once: the second waits for the first.
func Build(ctx context.Context, cacheDir string, progress func(string)) (Binaries, error) {
	var b Binaries
	err := eachComponent(cacheDir, func(c component, source, target string) error {
		*c.folder(&b) = filepath.Join(target, "bin")
		return c.build(ctx, source, target, progress)
	})
	return b, err
}

// FindBinaries returns the binaries from cacheDir (empty: the default), or
// ErrNotBuilt.
func FindBinaries(cacheDir string) (Binaries, error) {
	var b Binaries
	err := eachComponent(cacheDir, func(c component, _, target string) error {
		*c.folder(&b) = filepath.Join(target, "bin")
		if _, err := os.Stat(*c.folder(&b)); err != nil {
			return fmt.Errorf("%s %s: %w", c.name, c.version, ErrNotBuilt)
		}
		return nil
	})
	return b, err
}

func eachComponent(cacheDir string, do func(c component, source, target string) error) error {
	if cacheDir == "" {
		dir, err := DefaultCacheDir()
		if err != nil {
			return err
		}
		cacheDir = dir
	}
	sources, err := findSources()
	if err != nil {
		return err
	}
	for _, c := range components() {
		source := filepath.Join(sources, c.name)
		key, err := c.key(source)
		if err != nil {
			return fmt.Errorf("hash the %s module: %w", c.name, err)
		}
		target := filepath.Join(cacheDir, c.name+"-"+c.version+"-"+key)
		if err := do(c, source, target); err != nil {
			return err
		}
	}
	return nil
}

// findSources looks for the nested modules from the working directory upwards:
// tests run in their package's folder, commands in the repository's root.
func findSources() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("working directory: %w", err)
	}
	for {
		candidate := filepath.Join(dir, "tests", "cluster", "build")
		if _, err := os.Stat(filepath.Join(candidate, "kubernetes", "go.mod")); err == nil {
			return candidate, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("tests/cluster/build is in no folder above the working directory: run inside Weir's repository")
		}
		dir = parent
	}
}

// key identifies what would be built: the module's files and the flags.
func (c component) key(source string) (string, error) {
	files, err := filepath.Glob(filepath.Join(source, "*"))
	if err != nil {
		return "", err
	}
	sort.Strings(files)
	hash := sha256.New()
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(hash, "%s %d\n", filepath.Base(file), len(content))
		hash.Write(content)
	}
	fmt.Fprintf(hash, "%s\n%s\n%s\n", c.packages, c.ldflags, strings.Join(c.links, " "))
	return hex.EncodeToString(hash.Sum(nil))[:12], nil
}

// build makes target/bin, unless it is there: the folder appears complete, by
// rename, so its existence is the stamp.
func (c component) build(ctx context.Context, source, target string, progress func(string)) error {
	if _, err := os.Stat(target); err == nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	lock, err := lockFile(ctx, filepath.Join(filepath.Dir(target), c.name+".lock"))
	if err != nil {
		return err
	}
	defer lock.Close()
	if _, err := os.Stat(target); err == nil {
		return nil
	}

	began := time.Now()
	progress(fmt.Sprintf("building %s %s", c.name, c.version))
	tmp, err := os.MkdirTemp(filepath.Dir(target), ".building-"+c.name+"-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	bin := filepath.Join(tmp, "bin") + string(filepath.Separator)
	if err := os.Mkdir(bin, 0o755); err != nil {
		return err
	}
	args := []string{"build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w" + c.ldflags, "-o", bin, c.packages}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = source
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
	// go build ends its compilers itself when it is interrupted.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", c.name, err, lastLines(output.String(), 20))
	}
	for _, link := range c.links {
		if err := os.Symlink(c.name, filepath.Join(bin, link)); err != nil {
			return err
		}
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	if err := os.Rename(tmp, target); err != nil {
		return err
	}
	progress(fmt.Sprintf("built %s %s in %s", c.name, c.version, time.Since(began).Round(time.Second)))
	return nil
}

// lockFile waits for an exclusive lock on path, which it creates; closing the
// file releases it.
func lockFile(ctx context.Context, path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return file, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			file.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if err := sleep(ctx, 200*time.Millisecond); err != nil {
			file.Close()
			return nil, fmt.Errorf("wait for another build to release %s: %w", path, err)
		}
	}
}
