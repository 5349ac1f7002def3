package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
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

// component is a module below build/ and where its programs are noted.
type component struct {
	Module
	folder func(*Binaries) *string
}

func components() []component {
	const (
		k8s  = " -X k8s.io/component-base/version."
		ctrd = " -X github.com/containerd/containerd/v2/version."
		dns  = " -X github.com/coredns/coredns/coremain."
	)
	return []component{
		{
			Module{Name: "pause", Version: pauseVersion, Packages: "."},
			func(b *Binaries) *string { return &b.Pause },
		},
		{
			Module{
				Name: "cniplugins", Version: pluginsVersion, Packages: "tool",
				LDFlags: " -X github.com/containernetworking/plugins/pkg/utils/buildversion.BuildVersion=" + pluginsVersion,
			},
			func(b *Binaries) *string { return &b.Plugins },
		},
		{
			Module{Name: "coredns", Version: corednsVersion, Packages: ".", LDFlags: dns + "GitCommit=none"},
			func(b *Binaries) *string { return &b.CoreDNS },
		},
		{
			Module{
				Name: "containerd", Version: containerdVersion, Packages: "tool",
				LDFlags: ctrd + "Version=" + strings.TrimPrefix(containerdVersion, "v"),
			},
			func(b *Binaries) *string { return &b.Containerd },
		},
		{
			Module{
				Name: "kubernetes", Version: kubernetesVersion, Packages: ".",
				// kubectl and the API server parse their own version: without
				// these it is v0.0.0-master and version skew checks fail.
				LDFlags: k8s + "gitVersion=" + kubernetesVersion + k8s + "gitMajor=1" + k8s + "gitMinor=37" + k8s + "gitTreeState=clean",
				Links:   []string{"kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl"},
			},
			func(b *Binaries) *string { return &b.Kubernetes },
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
			return fmt.Errorf("%s %s: %w", c.Name, c.Version, ErrNotBuilt)
		}
		return nil
	})
	return b, err
}

func eachComponent(cacheDir string, do func(c component, source, target string) error) error {
	sources, err := findSources()
	if err != nil {
		return err
	}
	for _, c := range components() {
		source := filepath.Join(sources, c.Name)
		target, err := c.target(source, cacheDir)
		if err != nil {
			return err
		}
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
