package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Reboot boots a node as after a power cut: everything that runs on it is killed at
// once, memory (/run, network, mounts, cgroups) is lost, what is on the disk (/etc,
// /opt, /var/lib, /var/log) stays, and the boot has an ID of its own. It returns
// when containerd answers and kubelet has been started.
func (c *Cluster) Reboot(ctx context.Context, node *Node) error {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("not up after a minute"))
	defer cancel()
	if err := node.powerOff(ctx); err != nil {
		return fmt.Errorf("reboot %s: %w", node.Name, err)
	}
	// The kernel takes a network namespace down when it gets round to it, and the
	// link with it. Asked to, it does so at once; that it is gone already is fine.
	_ = c.Fabric.Command(ctx, "ip", "link", "del", nodePort(node.index)).Run()
	if err := node.create(filepath.Join(c.binaries.Pause, "pause")); err != nil {
		return fmt.Errorf("reboot %s: %w", node.Name, err)
	}
	if err := run(ctx, nodeLink(node.index, c.Fabric.PID(), node.PID()), "ip", "-batch", "-"); err != nil {
		return fmt.Errorf("link of %s: %w", node.Name, err)
	}
	if err := output(c.Fabric.Command(ctx, "ip", "-batch", "-"), joinBridge(node.index)); err != nil {
		return fmt.Errorf("link of %s: %w", node.Name, err)
	}
	if err := node.setup(ctx, c); err != nil {
		return err
	}
	if err := node.startContainerd(c); err != nil {
		return err
	}
	if err := node.waitContainerd(ctx); err != nil {
		return err
	}
	return node.startKubernetes(c)
}

// powerOff kills all that is in the machine's cgroups, and with its first process
// what is in its PID namespace; links and mounts go with the last of them.
func (m *Machine) powerOff(ctx context.Context) error {
	if err := killCgroup(m.Name); err != nil {
		return err
	}
	if err := removeCgroup(ctx, m.Name); err != nil {
		return err
	}
	return poll(ctx, "its processes to end", func(context.Context) error {
		for _, p := range append(slices.Collect(maps.Values(m.processes)), m.init) {
			if p.alive() {
				return fmt.Errorf("%s is still running", p.Name)
			}
		}
		return nil
	})
}

// ConfigureKubelet changes the node's KubeletConfiguration and restarts kubelet, or
// starts it if it was stopped.
func (n *Node) ConfigureKubelet(ctx context.Context, change func(config map[string]any)) error {
	path := filepath.Join(n.dir, "kubelet.json")
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var config map[string]any
	if err := json.Unmarshal(content, &config); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	change(config)
	if content, err = json.MarshalIndent(config, "", "  "); err != nil {
		return err
	}
	if err := n.Stop(ctx, "kubelet"); err != nil {
		return err
	}
	if err := writeFile(path, content, 0o644); err != nil {
		return err
	}
	return n.Start(ctx, "kubelet")
}
