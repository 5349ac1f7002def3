package environments

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/tests/pod"
)

// TestPodsWithAUserNamespaceAreCaptured: with hostUsers: false a pod's network
// namespace is owned by a user namespace of its own, in which neither plugin nor
// proxy are.
func TestPodsWithAUserNamespaceAreCaptured(t *testing.T) {
	onNode(t)
	agentOf(t, programs)
	chain := chained(t)
	owned := func(name string) (string, error) { return ownedNamespace(t, name) }
	client, server := start(t, chain, "userns-client", owned), start(t, chain, "userns-server", owned)
	address := echo(t, server)
	expectCaptured(t, client, server, address)
	rules, err := server.ShowRules(t.Context(), programs)
	if err != nil || rules.Backend != "nftables" {
		t.Errorf("backend %q, %v", rules.Backend, err)
	}
	if err := chain.Check(t.Context(), client); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	if err := syscall.Kill(proxyOf(t, server), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	expectCaptured(t, client, server, address)
}

// ownedNamespace makes a network namespace that is not this user namespace's.
func ownedNamespace(t *testing.T, name string) (string, error) {
	holder := exec.CommandContext(t.Context(), "sleep", "60")
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 1 << 20, Size: 1 << 16}}
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET, UidMappings: ids, GidMappings: ids}
	if err := holder.Start(); err != nil {
		return "", err
	}
	defer func() {
		_ = holder.Process.Kill()
		_ = holder.Wait()
	}()
	path := filepath.Join(pod.NodeDir, "netns", name)
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		return "", err
	}
	if err := unix.Mount(fmt.Sprintf("/proc/%d/ns/net", holder.Process.Pid), path, "", unix.MS_BIND, ""); err != nil {
		return "", err
	}
	ns, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer ns.Close()
	owner, err := unix.IoctlRetInt(int(ns.Fd()), unix.NS_GET_USERNS)
	if err != nil {
		return "", err
	}
	file := os.NewFile(uintptr(owner), "owner")
	defer file.Close()
	theirs, err := file.Stat()
	if err != nil {
		return "", err
	}
	ours, err := os.Stat("/proc/self/ns/user")
	if err == nil && os.SameFile(ours, theirs) {
		err = errors.New("the namespace is this user namespace's")
	}
	return path, err
}
