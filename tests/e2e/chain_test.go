package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"

	"github.com/weirmesh/weir/tests/cluster"
)

const (
	confFolder = "/etc/cni/net.d"
	dropInFile = "podnet/zz-weir-cni.conf" // of the cluster's network
	listFile   = "10-podnet.conflist"
)

// chainForms has the runtime load the plugin as a drop-in, which is what the
// installer finds that it can, and as an entry of the list.
func chainForms(t *testing.T) {
	ns := newNamespace(t, captured())
	both := func(name string) {
		t.Helper()
		expectCaptured(t, startAll(t, ns, onNode(appPod(name+"-0", "serve"), 0), onNode(appPod(name+"-1", "serve"), 1))...)
	}
	expectForm(t, true)
	both("found")
	for _, form := range []struct {
		flag   string
		dropIn bool
	}{
		{"entry", false},
		{"auto", false}, // an entry that is there stays one
		{"dropin", true},
		{"auto", true},
	} {
		chainAs(t, form.flag)
		expectForm(t, form.dropIn)
		both(fmt.Sprintf("as-%s-%v", form.flag, form.dropIn))
	}
}

// chainAs has the installers started anew with another --chain.
func chainAs(t *testing.T, form string) {
	t.Helper()
	must(t, bed.changeAgents(t.Context(), func(ds *appsv1.DaemonSet) {
		for i := range ds.Spec.Template.Spec.Containers {
			args := ds.Spec.Template.Spec.Containers[i].Args
			for j, arg := range args {
				if strings.HasPrefix(arg, "--chain=") {
					args[j] = "--chain=" + form
				}
			}
		}
	}))
	must(t, bed.waitInstalled(t.Context()))
}

// expectForm looks where the plugin is on each node: in one place.
func expectForm(t *testing.T, dropIn bool) {
	t.Helper()
	eventually(t, soon, fmt.Sprintf("weir-cni to be a drop-in: %v", dropIn), func() error {
		for _, node := range bed.Nodes {
			list, err := os.ReadFile(filepath.Join(node.Path(confFolder), listFile))
			if err != nil {
				return err
			}
			_, err = os.Stat(filepath.Join(node.Path(confFolder), dropInFile))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			if is := err == nil; is != dropIn || strings.Contains(string(list), pluginName) == dropIn {
				return fmt.Errorf("on %s the drop-in is there: %v; the list is %s", node.Name, is, list)
			}
		}
		return nil
	})
}

// restarted replaces every pod of the DaemonSet while the chain's files are
// watched: they are the same all the time.
func restarted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	changes := make(chan error)
	go watchChains(ctx, bed.Nodes, changes)
	_, err := bed.Kubectl(t.Context(), "-n", weirNamespace, "rollout", "restart", "daemonset/"+agentName)
	must(t, err)
	must(t, bed.waitInstalled(t.Context()))
	cancel()
	must(t, <-changes)
}

// watchChains compares the nodes' chains with what they were until ctx is done. It
// tells the first difference, or nil.
func watchChains(ctx context.Context, nodes []*cluster.Node, changes chan<- error) {
	var change error
	before, err := chainFiles(nodes)
	if err != nil {
		change = err
	}
	for n := 0; ctx.Err() == nil; n++ {
		now, err := chainFiles(nodes)
		if change == nil && err != nil {
			change = err
		}
		if change == nil && !slices.Equal(before, now) {
			change = fmt.Errorf("at look %d the chain was %q, before it was %q", n, now, before)
		}
		time.Sleep(2 * time.Millisecond)
	}
	changes <- change
}

// chainFiles are the files that make the chain, with the plugin: which ones, and
// when each was written.
func chainFiles(nodes []*cluster.Node) ([]string, error) {
	var out []string
	for _, node := range nodes {
		for _, name := range []string{confFolder + "/" + listFile, confFolder + "/" + dropInFile, "/opt/cni/bin/" + pluginName} {
			path := node.Path(name)
			info, err := os.Stat(path)
			if errors.Is(err, fs.ErrNotExist) {
				out = append(out, fmt.Sprint(node.Name, name, " is not there"))
				continue
			}
			if err != nil {
				return nil, err
			}
			inode := info.Sys().(*syscall.Stat_t).Ino
			out = append(out, fmt.Sprint(node.Name, name, " ", inode, " ", info.ModTime()))
		}
	}
	return out, nil
}
