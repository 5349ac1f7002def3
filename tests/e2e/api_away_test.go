package e2e

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/tests/cluster"
	"github.com/weirmesh/weir/tests/e2e/app/report"
)

// apiAway takes the API server away. Meanwhile the agents are killed and start
// again, and so do proxies on both sides, and others are upgraded: all of them on what was
// known last, and with the certificates that they had, as whoever shows none is refused all
// the time. What is run in pods is run by the machine, as kubectl exec would need the server.
func apiAway(t *testing.T) {
	ns := newNamespace(t, captured())
	next := buildProxy(t)
	back, echo, unseen := service(t, ns, "back", 8080), service(t, ns, "echo", 9000), service(t, ns, "unseen", 8080)
	pods := startAll(t, ns, onNode(appPod("back", "serve"), 1), onNode(appPod("echo", "serve", "-echo", ":9000"), 1),
		onNode(appPod("unseen", "serve"), 1), onNode(appPod("front", "serve"), 0), onNode(appPod("crashes", "serve"), 0))
	plain := start(t, ns, onNode(labelled(appPod("plain", "serve"), captureLabel, "disabled"), 0))
	front, crashes := pods[3], pods[4]
	// A callee's proxy, that of one who is not called, and a caller's.
	victims := []*corev1.Pod{pods[0], pods[2], crashes}
	expectCaptured(t, pods...)
	for _, pod := range pods {
		identified(t, pod)
	}
	urlOf := func(svc *corev1.Service) string { return "http://" + svc.Spec.ClusterIP + ":8080/" }
	must(t, createPolicy(t, ns, authorizationPolicy, "mesh", `{"action":"ALLOW","rules":[{"sources":[{"type":"ServiceAccount","serviceAccount":{"name":"default"}}]}]}`))
	strangerRefused := func() {
		t.Helper()
		eventually(t, soon, "a stranger to be refused", func() error {
			for _, svc := range []*corev1.Service{back, unseen} {
				if r := getLocally(t, plain, urlOf(svc))[0]; r.Status != http.StatusForbidden {
					return fmt.Errorf("%s: status %d, %s", svc.Name, r.Status, r.Error)
				}
			}
			return nil
		})
	}
	strangerRefused()
	allServed(t, "before", getLocally(t, front, "-n", "3", "-retry", "10s", urlOf(back)))
	waitKept(t, bed.Nodes[0], ns, "back", "echo", "unseen")
	for _, node := range bed.Nodes {
		waitPolicyKept(t, node, ns, "mesh")
	}

	agents, err := bed.agentPods(t.Context())
	must(t, err)
	loads := []load{beginLoadLocally(t, front, urlOf(back)), beginLoadLocally(t, crashes, urlOf(back))}
	waitForEach(t, loads, 5)
	certificates := leavesOf(t, victims)
	talk := beginLocally(t, front, "talk", echo.Spec.ClusterIP+":9000")
	waitSaid(t, talk, "connected")

	t.Cleanup(func() {
		if err := startAPI(context.Background()); err != nil {
			t.Error(err)
		}
	})
	must(t, bed.Fabric.Stop(t.Context(), "kube-apiserver"))
	away := time.Now()
	waitForEach(t, loads, 20)

	for _, pod := range agents {
		node := bed.node(pod.Spec.NodeName)
		before := agentOf(t, node)
		_, err := output(node.Command(t.Context(), "ctr", "--namespace", "k8s.io", "tasks", "kill", "--signal", "SIGKILL", agentContainer(t, &pod)))
		must(t, err)
		eventually(t, startLimit, "another agent on "+node.Name, func() error {
			if now := findAgent(node); now.pid == 0 || now.pid == before.pid {
				return errors.New("there is none")
			}
			return nil
		})
	}
	killing, killed := crash(t, victims)
	// A destination that none of the proxies has heard of, and one whose proxy is new.
	for _, from := range []*corev1.Pod{front, crashes} {
		began := time.Now()
		allServed(t, from.Name+", to what its proxy has not seen", getLocally(t, from, "-n", "3", urlOf(unseen)))
		t.Logf("%s reached what its proxy had not seen after %s", from.Name, time.Since(began).Round(time.Millisecond))
	}
	waitForEach(t, loads, 20)
	sameLeaves(t, "after a crash", victims, certificates)
	strangerRefused()
	upgrade(t, victims, next)
	waitForEach(t, loads, 20)
	sameLeaves(t, "after an upgrade", victims, certificates)
	strangerRefused()
	expectCaptured(t, pods...)
	waitForEach(t, loads, 20)
	t.Logf("the API server was away for %s", time.Since(away).Round(100*time.Millisecond))
	must(t, startAPI(t.Context()))
	for _, load := range loads {
		allServed(t, "while the API server was away, "+load.what, slices.DeleteFunc(load.end(t), func(r report.Result) bool {
			return r.Start.Before(killed) && r.Start.Add(r.Took).After(killing) // under way at a proxy that crashed
		}))
	}
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	if said, err := talk.finish(ctx); err != nil {
		t.Errorf("the connection that stays: %q, %v", said, err)
	}

	// The news flow again, to the agents that started without.
	eventually(t, startLimit, "the agents", func() error { return bed.agentsReady(t.Context(), len(bed.Nodes)) })
	// The cluster's own way to the server is first: its Service has no endpoint before
	// kube-proxy hears of one. Who watches asks again after up to a minute (client-go), so
	// do the agents, and without them nobody knows the pod's probes.
	for _, node := range bed.Nodes {
		eventually(t, 2*startLimit, "the API server's Service on "+node.Name, func() error {
			_, err := output(node.Command(t.Context(), "bash", "-c", "exec 3<>/dev/tcp/10.96.0.1/443"))
			return err
		})
	}
	added := create(t, ns, onNode(labelled(appPod("back-later", "serve"), "app", "back"), 0))
	expectCaptured(t, waitPodFor(t, 2*startLimit, added, "to be ready", isReady))
	eventually(t, startLimit, "an answer of the new pod", func() error {
		if got := answeredBy(getLocally(t, front, "-n", "20", urlOf(back))); got["back-later"] == 0 {
			return fmt.Errorf("answers came from %v", got)
		}
		return nil
	})
	// And to the cluster's DNS, which takes its time, for namespaces as for Services: the
	// next tests need it.
	later := newNamespace(t, captured())
	service(t, later, "later", 8080)
	start(t, later, labelled(appPod("later", "serve"), "app", "later"))
	eventually(t, 2*startLimit, "the cluster's DNS to know a new Service in a new namespace", func() error {
		if failed := failures(get(t, front, "http://later."+later+":8080/")); len(failed) > 0 {
			return errors.New(failed[0])
		}
		return nil
	})
}

func startAPI(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	if err := bed.Fabric.Start(ctx, "kube-apiserver"); err != nil {
		return err
	}
	return bed.WaitAPI(ctx)
}

// waitKept waits until a node's agent has written down that Services' pods are ready,
// each named as its Service.
func waitKept(t *testing.T, node *cluster.Node, ns string, services ...string) {
	t.Helper()
	eventually(t, startLimit, fmt.Sprintf("the agent's last good view to have %v", services), func() error {
		content, err := lastGood(node)
		if err != nil {
			return err
		}
		for _, service := range services {
			ready := 0
			for line := range strings.Lines(content) {
				if !strings.Contains(line, `"Slice"`) || !strings.Contains(line, `"Pod":"`+ns+"/"+service+`"`) {
					continue
				}
				if !strings.Contains(line, `"Ready":true`) {
					return fmt.Errorf("%s is not ready there", service)
				}
				ready++
			}
			if ready == 0 {
				return fmt.Errorf("%s is not there", service)
			}
		}
		return nil
	})
}

// lastGood is what a node's agent has written down, one object a line.
func lastGood(node *cluster.Node) (string, error) {
	file, err := os.Open(node.Path("/run/weir/last-good.gz"))
	if err != nil {
		return "", err
	}
	defer file.Close()
	zip, err := gzip.NewReader(file)
	if err != nil {
		return "", err
	}
	content, err := io.ReadAll(zip)
	return string(content), err
}

// waitPolicyKept waits until a node's agent has written down an AuthorizationPolicy.
func waitPolicyKept(t *testing.T, node *cluster.Node, ns, name string) {
	t.Helper()
	eventually(t, startLimit, "the last good view of the agent on "+node.Name+" to have policy "+name, func() error {
		content, err := lastGood(node)
		if err != nil {
			return err
		}
		for line := range strings.Lines(content) {
			if strings.Contains(line, `"Authz"`) && strings.Contains(line, `"Namespace":"`+ns+`","Name":"`+name+`"`) {
				return nil
			}
		}
		return errors.New("it is not there")
	})
}

// waitIdentityKept waits until a node's agent has a descriptor of the memory file in
// which a proxy has its certificate.
func waitIdentityKept(t *testing.T, node *cluster.Node, proxy process) {
	t.Helper()
	eventually(t, soon, fmt.Sprintf("the agent on %s to have the certificate of proxy %d", node.Name, proxy.pid), func() error {
		kept, err := memoryFiles(findAgent(node))
		if err != nil {
			return err
		}
		own, err := memoryFiles(proxy)
		if err != nil {
			return err
		}
		for file := range own {
			if kept[file] {
				return nil
			}
		}
		return fmt.Errorf("it has %d files, none of the proxy's %d", len(kept), len(own))
	})
}

// memoryFiles are the numbers of the files with certificates that a process has open.
func memoryFiles(p process) (map[uint64]bool, error) {
	entries, err := os.ReadDir(p.path("fd"))
	if err != nil {
		return nil, err
	}
	files := map[uint64]bool{}
	for _, entry := range entries {
		path := p.path("fd", entry.Name())
		if target, err := os.Readlink(path); err != nil || !strings.Contains(target, "weir-identity") {
			continue // closed meanwhile, or another
		}
		number, err := inode(path)
		if err != nil {
			return nil, err
		}
		files[number] = true
	}
	return files, nil
}

func agentOf(t *testing.T, node *cluster.Node) process {
	t.Helper()
	p := findAgent(node)
	if p.pid == 0 {
		t.Fatalf("no agent runs on %s", node.Name)
	}
	return p
}

// findAgent finds a node's agent, or the zero process.
func findAgent(node *cluster.Node) process {
	all, err := processes()
	if err != nil {
		return process{}
	}
	for _, p := range all {
		// Not `weir-agent ready` and not `weir-agent controller`, which may be there, too.
		if p.in(node.Name) && p.args[0] == "/weir-agent" && len(p.args) > 1 && strings.HasPrefix(p.args[1], "--") {
			return p
		}
	}
	return process{}
}

// beginLocally is begin without the API server: a process of the machine's in the
// pod's network namespace.
func beginLocally(t *testing.T, pod *corev1.Pod, args ...string) *command {
	t.Helper()
	s := sandboxOf(t, pod)
	words := append([]string{"--net=" + s.pause.path("ns", "net"), filepath.Join(bed.work, "app")}, args...)
	cmd := exec.CommandContext(t.Context(), "nsenter", words...)
	c := &command{what: fmt.Sprintf("app %s beside pod %s", strings.Join(args, " "), pod.Name), done: make(chan error, 1)}
	cmd.Stdout, cmd.Stderr = lockedWriter{&c.mu, &c.stdout}, lockedWriter{&c.mu, &c.stderr}
	stdin, err := cmd.StdinPipe()
	must(t, err)
	c.stdin = stdin
	must(t, cmd.Start())
	go func() { c.done <- cmd.Wait() }()
	t.Cleanup(func() { stdin.Close() })
	return c
}

// beginLoadLocally is beginLoad without the API server.
func beginLoadLocally(t *testing.T, pod *corev1.Pod, url string) load {
	t.Helper()
	return load{beginLocally(t, pod, "get", "-n", "0", "-interval", "20ms", url)}
}

// waitForEach waits until each loop has got n results more.
func waitForEach(t *testing.T, loads []load, n int) {
	t.Helper()
	for _, l := range loads {
		l.waitFor(t, n)
	}
}

// getLocally is get without the API server.
func getLocally(t *testing.T, pod *corev1.Pod, args ...string) []report.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startLimit)
	defer cancel()
	out, err := beginLocally(t, pod, append([]string{"get"}, args...)...).wait(ctx)
	results := parseResults(t, out)
	if err != nil && len(results) == 0 {
		t.Fatal(err)
	}
	return results
}
