package e2e

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/tests/cluster"
	"github.com/weirmesh/weir/tests/e2e/app/report"
)

// proxyKilled kills the proxy of the caller, then that of a callee, under a loop
// of new connections. Those that begin after the kill must all be served, and
// all by two proxies: none may have left the pod directly, or reached back so.
func proxyKilled(t *testing.T) {
	ns := newNamespace(t, captured())
	pods := backs(t, ns, 2)
	front := start(t, ns, onNode(appPod("front", "serve"), 0))
	waitAnswers(t, front, "http://back:8080/", pods)
	for _, c := range []struct {
		whose  string
		victim *corev1.Pod
	}{{"the caller's", front}, {"a callee's", pods["back-0"]}} {
		t.Run(c.whose, func(t *testing.T) {
			before := proxyOf(t, c.victim)
			requests := beginLoad(t, front, "http://back:8080/")
			requests.waitFor(t, 20)
			must(t, before.kill())
			killed := time.Now()
			requests.waitFor(t, 100)
			var after []report.Result
			for _, r := range requests.end(t) {
				if r.Start.After(killed) {
					after = append(after, r)
				}
			}
			allServed(t, "after the kill", after)
			followAll(t, after)
			if got := answeredBy(after); got["back-0"] == 0 || got["back-1"] == 0 {
				t.Errorf("after the kill answers came from %v, want both", got)
			}
			if now := proxyOf(t, c.victim); now.pid == before.pid {
				t.Errorf("proxy %d is still there: it was not killed", now.pid)
			}
			expectCaptured(t, c.victim)
			waitEvent(t, c.victim, "ProxyRestarted")
			t.Logf("the slowest of %d requests after the kill took %s", len(after), slowest(after).Round(time.Millisecond))
		})
	}
}

func slowest(results []report.Result) time.Duration {
	var most time.Duration
	for _, r := range results {
		most = max(most, r.Took)
	}
	return most
}

// failsClosed takes the proxy's binary from the first node, so that no proxy can
// start there, and nothing else fails.
func failsClosed(t *testing.T) {
	ns := newNamespace(t, captured())
	pods := backs(t, ns, 2)
	front := start(t, ns, onNode(appPod("front", "serve"), 0))
	waitAnswers(t, front, "http://back:8080/", pods)

	putBack := takeProxyBinary(t, bed.Nodes[0])
	victim := create(t, ns, onNode(appPod("victim", "serve"), 0))
	expectCaptured(t, start(t, ns, onNode(appPod("control", "serve"), 1)))

	// A pod that runs, and whose proxy cannot come back, must wait as well.
	must(t, proxyOf(t, front).kill())
	for _, r := range get(t, front, "-n", "2", "-timeout", "1s", "http://back:8080/") {
		if r.Error == "" {
			t.Errorf("a request of a pod without a proxy was answered: %+v", r.Answer)
		}
	}
	waitEvent(t, victim, sandboxFailed, "WEIR-C007")
	neverRan(t, victim)
	eventually(t, soon, "nothing half done to be left", func() error { return halfDone(victim) })
	neverRan(t, victim)

	putBack()
	allServed(t, "with its proxy again", get(t, front, "-n", "5", "-retry", "10s", "http://back:8080/"))
	expectCaptured(t, waitReady(t, victim), front)
}

// takeProxyBinary moves the proxy's binaries of a node away, until the function
// it returns is called or the test ends.
func takeProxyBinary(t *testing.T, node *cluster.Node) func() {
	t.Helper()
	move := func(ctx context.Context, script string) {
		t.Helper()
		if _, err := output(node.Command(ctx, "sh", "-euc", script)); err != nil {
			t.Error(err)
		}
	}
	done := false
	putBack := func() {
		if !done {
			done = true
			ctx, cancel := context.WithTimeout(context.Background(), soon)
			defer cancel()
			move(ctx, `for f in /opt/weir/bin/*.away; do mv "$f" "${f%.away}"; done`)
		}
	}
	t.Cleanup(putBack)
	move(t.Context(), `for f in /opt/weir/bin/weir-proxy-*; do mv "$f" "$f.away"; done`)
	return putBack
}

// halfDone finds what a failed attachment of the pod has left with the agent.
func halfDone(pod *corev1.Pod) error {
	node := bed.node(pod.Spec.NodeName)
	attachments, err := readAttachments(node)
	if err != nil {
		return err
	}
	known := map[string]bool{}
	for _, a := range attachments {
		if a.PodUID == string(pod.UID) {
			return fmt.Errorf("there is an attachment of pod %s, container %s", pod.Name, a.ContainerID)
		}
		known[a.ContainerID] = true
	}
	all, err := processes()
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range all {
		if p.isProxy() && p.in(node.Name) && !belongs(p, known) {
			errs = append(errs, fmt.Errorf("proxy %d in %v has no attachment", p.pid, p.cgroups))
		}
	}
	return errors.Join(errs...)
}

func belongs(p process, ids map[string]bool) bool {
	for id := range ids {
		if p.in(id) {
			return true
		}
	}
	return false
}
