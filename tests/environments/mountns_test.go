package environments

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestIptablesIsTheHosts: the agent's container has none, and its plugin is where
// the host has something else. By the test at its start, the agent shows that it
// has rules put in all the same; without the host's mount namespace it refuses.
func TestIptablesIsTheHosts(t *testing.T) {
	onNode(t)
	dir := t.TempDir()
	// Of "repair" alone it can be said which backend to take.
	plugin := filepath.Join(dir, "weir-cni")
	agent := filepath.Join(dir, "weir-agent")
	const inside = "/usr/sbin/weir-cni"
	write(t, plugin, fmt.Sprintf("#!/bin/sh\nif [ \"$1\" = repair ]; then exec %[1]s \"$@\" --backend iptables; fi\nexec %[1]s \"$@\"\n", programs.Plugin))
	write(t, agent, fmt.Sprintf("#!/bin/sh\nexec unshare --mount sh -c 'mount -t tmpfs none /usr/sbin && cp %s %s && exec \"$@\"' sh %s \"$@\"\n", plugin, inside, programs.Agent))
	contained := programs
	contained.Agent = agent

	started := agentOf(t, contained, "--plugin", inside, "--host-mount-ns", "/proc/1/ns/mnt")
	if _, err := os.Stat(fmt.Sprintf("/proc/%d/root%s", started.PID(), inside)); err != nil {
		t.Errorf("the agent is not in a mount namespace of its own: %v", err)
	}
	if _, err := os.Stat(inside); err == nil {
		t.Errorf("the host has %s too", inside)
	}
	if err := started.End(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}

	_, err := node.StartAgent(context.Background(), contained, io.Discard, "--plugin", inside, "--host-mount-ns", filepath.Join(dir, "none"))
	if err == nil || !strings.Contains(err.Error(), "iptables") || !strings.Contains(err.Error(), "not found") {
		t.Errorf("without the host's mount namespace: %v", err)
	}
}

func write(t *testing.T, path, script string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
}
