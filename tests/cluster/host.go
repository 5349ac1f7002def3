package cluster

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// hostPrograms are what the cluster uses of the host, and the Debian packages
// they come from.
var hostPrograms = []struct{ program, debian string }{
	{"/usr/bin/etcd", "etcd-server"},
	{"runc", "runc"},
	{"nft", "nftables"},
	{"iptables", "iptables"},
	{"conntrack", "conntrack"},
	{"ip", "iproute2"},
	{"nsenter", "util-linux"},
	{"mount", "mount"},
}

func checkRoot() error {
	if os.Geteuid() != 0 {
		return errors.New("the cluster needs root: it makes namespaces, mounts and cgroups")
	}
	return nil
}

// CheckHost says what this host lacks to run a cluster: root, programs (with the
// apt-get command that brings them) or cgroup v2. Tests skip on its error.
func CheckHost() error {
	if err := checkRoot(); err != nil {
		return err
	}
	var packages []string
	for _, p := range hostPrograms {
		if _, err := exec.LookPath(p.program); err != nil {
			packages = append(packages, p.debian)
		}
	}
	if len(packages) > 0 {
		return fmt.Errorf("programs are missing: run `apt-get install --no-install-recommends %s`", strings.Join(packages, " "))
	}
	_, err := hierarchies()
	return err
}

// keepLogs copies a cluster's logs to a folder that outlives it, replacing
// those of an earlier failure.
func keepLogs(from, to string) error {
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		return err
	}
	return os.CopyFS(to, os.DirFS(from))
}
