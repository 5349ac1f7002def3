// Package iptables puts a capture.Ruleset into a network namespace with iptables
// and ip6tables, for kernels without what package nft needs.
//
// It means the same as package nft, by other means, but for its Refusals: chains
// WEIR_IN, WEIR_OUT, WEIR_GUARD and WEIR_GUARD_OUT that the builtin ones jump to first, both
// families apart, one exec per rule. A change is therefore not one transaction: new
// chains are filled aside, then jumped to, then the old ones go, so that at no time less
// is captured than before or after. It manages those chains and nothing else.
//
// It needs the cgroup match with --path (Linux 4.5), the socket
// match and, unless the kernel has no IPv6 at all, ip6tables: half a pod is never
// captured.
package iptables

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/coreos/go-iptables/iptables"
	"github.com/weirmesh/weir/plugin/capture"
)

// Backend works on the network namespace of the calling thread, which the caller
// has locked.
type Backend struct {
	// LockFile is the lock that legacy iptables takes; empty is the common one of
	// the node. It is removed afterwards. As iptables is told by the environment,
	// two Backends of one process must not work at the same time.
	LockFile string
	// Variant is "-nft" or "-legacy"; empty takes the node's default, and legacy
	// where that does not work.
	Variant string
}

// Name is what the backend is called in configuration and records.
func (Backend) Name() string { return "iptables" }

// lockEnv names the lock file to iptables.
const lockEnv = "XTABLES_LOCKFILE"

// lockWait is how many seconds a command waits for the lock.
const lockWait = 2

// family is one address family's command.
type family struct {
	v6  bool
	ipt *iptables.IPTables
}

// families finds the commands. The second is missing only where the kernel has no
// IPv6.
func (b Backend) families() ([]family, error) {
	variants := []string{b.Variant}
	if b.Variant == "" {
		variants = []string{"", "-legacy"}
	}
	var tried []error
	for _, variant := range variants {
		out, err := commands(variant)
		if err == nil {
			return out, nil
		}
		tried = append(tried, err)
	}
	return nil, fmt.Errorf("iptables: %w", errors.Join(tried...))
}

func commands(variant string) ([]family, error) {
	v4, err := command("iptables"+variant, iptables.ProtocolIPv4)
	if err != nil {
		return nil, err
	}
	out := []family{{ipt: v4}}
	// Not /proc/net, which is the process's first thread's.
	if _, err := os.Stat("/proc/thread-self/net/if_inet6"); err != nil {
		return out, nil
	}
	v6, err := command("ip6tables"+variant, iptables.ProtocolIPv6)
	if err != nil {
		return nil, fmt.Errorf("the kernel has IPv6, so it is needed: %w", err)
	}
	return append(out, family{v6: true, ipt: v6}), nil
}

// command finds a command and sees that it works with this kernel.
func command(name string, proto iptables.Protocol) (*iptables.IPTables, error) {
	path, err := lookPath(name)
	if err != nil {
		return nil, err
	}
	ipt, err := iptables.New(iptables.Path(path), iptables.IPFamily(proto), iptables.Timeout(lockWait))
	if err != nil {
		return nil, err
	}
	if _, err := ipt.List("nat", "OUTPUT"); err != nil {
		return nil, err
	}
	return ipt, nil
}

// lookPath looks in the usual folders too: runtimes start plugins with whatever
// PATH they have, and some have none.
func lookPath(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", err
}

// locked runs f with the lock file of this container.
func (b Backend) locked(f func() error) error {
	if b.LockFile == "" {
		return f()
	}
	if err := os.MkdirAll(filepath.Dir(b.LockFile), 0o700); err != nil {
		return fmt.Errorf("iptables: %w", err)
	}
	before, set := os.LookupEnv(lockEnv)
	if err := os.Setenv(lockEnv, b.LockFile); err != nil {
		return fmt.Errorf("iptables: %w", err)
	}
	defer func() {
		if set {
			_ = os.Setenv(lockEnv, before)
		} else {
			_ = os.Unsetenv(lockEnv)
		}
	}()
	defer os.Remove(b.LockFile) // is not there if no legacy command ran
	return f()
}

// errClient: half of what it takes (routes, sysctls, a proxy that uses callers'
// addresses) would have every inbound connection hang.
var errClient = errors.New("iptables: it cannot keep the caller's address, which needs nf_tables with socket cgroupv2 (Linux 5.13); set the mesh option keepClientAddress: false")

// Apply makes the namespace hold the rules and says whether it had to change
// anything. After an error what was there before is in force still.
func (b Backend) Apply(want capture.Ruleset) (bool, error) {
	if want.KeepsClient() {
		return false, errClient
	}
	changed := false
	err := b.locked(func() error {
		families, err := b.families()
		if err != nil {
			return err
		}
		equal, err := allEqual(families, want)
		if err != nil || equal {
			return err
		}
		changed = true
		return replace(families, want)
	})
	return changed && err == nil, err
}

// Difference says whether the namespace's rules are not as want. Empty: they are.
// In what they differ iptables cannot tell: it prints rules in other words than
// it takes.
func (b Backend) Difference(want capture.Ruleset) (string, error) {
	difference := ""
	err := b.locked(func() error {
		families, err := b.families()
		if err != nil {
			return err
		}
		equal, err := allEqual(families, want)
		if err != nil || equal {
			return err
		}
		difference = capture.NoRules
		for _, f := range families {
			for _, c := range ours {
				exists, err := f.ipt.ChainExists(c.table, c.name)
				if err != nil {
					return fmt.Errorf("iptables: %w", err)
				}
				if exists {
					difference = "the rules of iptables are not those that were put in"
				}
			}
		}
		return nil
	})
	return difference, err
}

// Delete takes the rules away, if there are any.
func (b Backend) Delete() error {
	return b.locked(func() error {
		families, err := b.families()
		if err != nil {
			return err
		}
		var failed []error
		for _, f := range families {
			for _, c := range ours {
				failed = append(failed, f.drop(c, c.name), f.drop(c, c.fresh()))
			}
		}
		return errors.Join(failed...)
	})
}
