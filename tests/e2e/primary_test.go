package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/tests/cluster"
)

const (
	singleFile  = "10-podnet.conf"          // as an old primary writes its configuration
	derivedFile = "10-podnet-weir.conflist" // what follows it
	asideFile   = "10-podnet.conflist.aside"
)

// chainedAgain is how soon the plugin is in the chain again after the primary has
// written its list without it.
const chainedAgain = time.Second

// singlePrimary gives the nodes a primary of the old form, one plugin in a .conf,
// which stays as it is. Runtimes read no drop-ins beside one.
func singlePrimary(t *testing.T) {
	ns := newNamespace(t, captured())
	for _, form := range []string{"dropin", "entry"} {
		chainAs(t, form)
		before := make(map[*cluster.Node][]byte)
		for _, node := range bed.Nodes {
			before[node] = becomeSingle(t, node)
		}
		expectDerived(t, true)
		expectCaptured(t, startAll(t, ns, onNode(appPod("single-"+form+"-0", "serve"), 0), onNode(appPod("single-"+form+"-1", "serve"), 1))...)
		for _, node := range bed.Nodes {
			if now, err := os.ReadFile(filepath.Join(node.Path(confFolder), singleFile)); err != nil || string(now) != string(before[node]) {
				t.Errorf("%s on %s is %s, %v; the primary wrote %s", singleFile, node.Name, now, err, before[node])
			}
			becomeList(t, node)
		}
		expectDerived(t, false)
		expectForm(t, form == "dropin")
		expectCaptured(t, startAll(t, ns, onNode(appPod("list-"+form+"-0", "serve"), 0), onNode(appPod("list-"+form+"-1", "serve"), 1))...)
	}
	chainAs(t, "auto")
}

// becomeSingle puts the bridge alone in the place of a node's list, until the test
// ends or becomeList. It returns what it wrote.
func becomeSingle(t *testing.T, node *cluster.Node) []byte {
	t.Helper()
	folder := node.Path(confFolder)
	var list struct {
		Name, CNIVersion string
		Plugins          []map[string]any
	}
	must(t, readJSON(filepath.Join(folder, listFile), &list))
	single := list.Plugins[0]
	single["name"], single["cniVersion"] = list.Name, list.CNIVersion
	content, err := json.MarshalIndent(single, "", "\t")
	must(t, err)
	t.Cleanup(func() { becomeList(t, node) })
	must(t, os.WriteFile(filepath.Join(folder, singleFile), content, 0o600))
	must(t, os.Rename(filepath.Join(folder, listFile), filepath.Join(folder, asideFile)))
	return content
}

// becomeList undoes becomeSingle.
func becomeList(t *testing.T, node *cluster.Node) {
	folder := node.Path(confFolder)
	err := os.Rename(filepath.Join(folder, asideFile), filepath.Join(folder, listFile))
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err := errors.Join(err, os.Remove(filepath.Join(folder, singleFile))); err != nil {
		t.Error(err)
	}
}

// expectDerived looks whether the plugin is chained by a list that follows a .conf,
// and nowhere else.
func expectDerived(t *testing.T, derived bool) {
	t.Helper()
	eventually(t, soon, fmt.Sprintf("weir-cni to be in %s: %v", derivedFile, derived), func() error {
		for _, node := range bed.Nodes {
			content, err := os.ReadFile(filepath.Join(node.Path(confFolder), derivedFile))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			if strings.Contains(string(content), pluginName) != derived {
				return fmt.Errorf("on %s it is %q", node.Name, content)
			}
			if _, err := os.Stat(filepath.Join(node.Path(confFolder), dropInFile)); derived && err == nil {
				return fmt.Errorf("%s has a drop-in that is of no use", node.Name)
			}
		}
		return nil
	})
}

// primaryRewrites has the primary write its list without Weir, as it does when it
// is updated: first with the installer at work, then with one that is too slow.
func primaryRewrites(t *testing.T) {
	ns := newNamespace(t, captured())
	chainAs(t, "entry")
	expectForm(t, false)
	node := bed.Nodes[0]

	for range 2 {
		rewritten := rewriteList(t, node)
		healed := waitChained(t, node, rewritten)
		t.Logf("chained again after %s", healed.Round(time.Millisecond))
		if healed > chainedAgain {
			t.Errorf("it took %s until the plugin was chained again, want at most %s", healed, chainedAgain)
		}
	}

	goOn := halt(t, installerOf(t, node).pid)
	rewriteList(t, node)
	slipped := start(t, ns, onNode(appPod("slipped", "serve"), 0))
	waitEvent(t, slipped, "CaptureRepaired", "without a restart")
	expectCaptured(t, slipped)
	expectNoRestart(t, slipped)
	must(t, goOn())
	waitChained(t, node, time.Now())
	expectCaptured(t, start(t, ns, onNode(appPod("after", "serve"), 0)))
	chainAs(t, "auto")
}

// rewriteList writes a node's list without our entry, the way primaries do, by
// rename. It returns when.
func rewriteList(t *testing.T, node *cluster.Node) time.Time {
	t.Helper()
	path := filepath.Join(node.Path(confFolder), listFile)
	var list map[string]any
	must(t, readJSON(path, &list))
	plugins, others := list["plugins"].([]any), []any{}
	for _, p := range plugins {
		if p.(map[string]any)["type"] != pluginName {
			others = append(others, p)
		}
	}
	if len(others) == len(plugins) {
		t.Fatalf("%s of %s has no entry of Weir's", listFile, node.Name)
	}
	list["plugins"] = others
	content, err := json.MarshalIndent(list, "", "  ")
	must(t, err)
	temp := path + ".new"
	must(t, os.WriteFile(temp, content, 0o600))
	must(t, os.Rename(temp, path))
	return time.Now()
}

// waitChained waits for the entry, and returns how long after since it was there.
func waitChained(t *testing.T, node *cluster.Node, since time.Time) time.Duration {
	t.Helper()
	path := filepath.Join(node.Path(confFolder), listFile)
	for deadline := time.Now().Add(soon); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		content, err := os.ReadFile(path)
		must(t, err)
		if strings.Contains(string(content), pluginName) {
			return time.Since(since)
		}
	}
	t.Fatalf("after %s %s of %s has no entry of Weir's", soon, listFile, node.Name)
	return 0
}

// installerOf finds a node's installer.
func installerOf(t *testing.T, node *cluster.Node) process {
	t.Helper()
	all, err := processes()
	must(t, err)
	for _, p := range all {
		if p.in(node.Name) && strings.HasSuffix(p.args[0], "/weir-install") && len(p.args) > 1 && p.args[1] == "run" {
			return p
		}
	}
	t.Fatalf("no installer runs on %s", node.Name)
	return process{}
}

func expectNoRestart(t *testing.T, pods ...*corev1.Pod) {
	t.Helper()
	for _, pod := range pods {
		now, err := fresh(t.Context(), pod)
		must(t, err)
		for _, s := range now.Status.ContainerStatuses {
			if s.RestartCount > 0 {
				t.Errorf("container %s of pod %s was restarted %d times", s.Name, pod.Name, s.RestartCount)
			}
		}
	}
}

// runtimeRestarted restarts a node's containerd, and has it load its configuration
// anew again and again, while pods start on that node and others run.
func runtimeRestarted(t *testing.T) {
	ns := newNamespace(t, captured())
	x := beginTrafficFrom(t, ns, 1) // what is run by exec ends with its runtime
	node := bed.Nodes[0]
	before, err := chainFiles(bed.Nodes)
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	reloads := make(chan int)
	go reloadOften(ctx, node, reloads)

	var pods []*corev1.Pod
	for i := range 8 {
		pods = append(pods, create(t, ns, onNode(appPod(fmt.Sprintf("starts-%d", i), "serve"), 0)))
		if i == 3 {
			must(t, node.RestartContainerd(t.Context()))
		}
	}
	for i, pod := range pods {
		pods[i] = waitReady(t, pod)
	}
	cancel()
	t.Logf("the runtime was told of %d changes of its configuration", <-reloads)
	expectCaptured(t, pods...)
	expectNoRestart(t, append(pods, x.front)...)
	// No ADD hangs: of the plugins that the restart cut off, none is left.
	eventually(t, soon, "no weir-cni to run", func() error {
		all, err := processes()
		if err != nil {
			return err
		}
		for _, p := range all {
			if p.in(node.Name) && filepath.Base(p.args[0]) == pluginName {
				return fmt.Errorf("one runs: pid %d", p.pid)
			}
		}
		return nil
	})
	after, err := chainFiles(bed.Nodes)
	must(t, err)
	if fmt.Sprint(before) != fmt.Sprint(after) {
		t.Errorf("the chain was %q, and is %q", before, after)
	}
	x.end(t)
}

// reloadOften has a node's runtime read its CNI configuration anew until ctx is
// done: it does at a change of any file in the folder. It tells how often.
func reloadOften(ctx context.Context, node *cluster.Node, told chan<- int) {
	path := filepath.Join(node.Path(confFolder), "99-not-a-network.txt")
	n := 0
	for ctx.Err() == nil {
		if os.WriteFile(path, []byte(time.Now().String()), 0o600) == nil {
			n++
		}
		time.Sleep(20 * time.Millisecond)
	}
	os.Remove(path)
	told <- n
}
