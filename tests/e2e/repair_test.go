package e2e

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// capturedInPlace labels pods that run, with a connection between them that
// stays, and takes the label away again.
func capturedInPlace(t *testing.T) {
	ns := newNamespace(t, nil)
	service(t, ns, "echo", 9000)
	service(t, ns, "server", 8080)
	pods := startAll(t, ns, onNode(appPod("client", "serve"), 0), onNode(appPod("echo", "serve", "-echo", ":9000"), 1), onNode(appPod("server", "serve"), 1))
	client, echo := pods[0], pods[1]
	expectNotCaptured(t, pods...)
	waitEcho(t, client)
	before := begin(t, client, "talk", "echo:9000")
	load := beginLoad(t, client, "http://server:8080/")
	load.waitFor(t, 5)

	for _, pod := range pods {
		patch(t, pod, `{"metadata":{"labels":{"weirmesh.io/capture":"enabled"}}}`)
	}
	for _, pod := range pods {
		waitEvent(t, pod, "CaptureRepaired", "without a restart")
	}
	expectCaptured(t, pods...)
	followAll(t, get(t, client, "-n", "3", "http://server:8080/"))
	during := begin(t, client, "talk", "echo:9000")
	waitSaid(t, during, "connected")

	for _, pod := range []*corev1.Pod{client, echo} {
		patch(t, pod, `{"metadata":{"labels":{"weirmesh.io/capture":null}}}`)
		waitEvent(t, pod, "CaptureReleased", "no longer captured")
	}
	load.waitFor(t, 20)
	allServed(t, "while pods were captured and released in place", load.end(t))

	// What was there before and what the proxies took have both gone on.
	for name, talk := range map[string]*command{"from before the capture": before, "through the proxies": during} {
		ctx, cancel := context.WithTimeout(t.Context(), soon)
		said, err := talk.finish(ctx)
		cancel()
		if err != nil {
			t.Errorf("the connection %s: %q, %v", name, said, err)
		}
	}
	// With the last connection the proxies go, and the rules.
	eventually(t, endLimit, "the released pods to be left alone", func() error {
		all, err := processes()
		if err != nil {
			return err
		}
		for _, pod := range []*corev1.Pod{client, echo} {
			if err := isNotCaptured(all, pod); err != nil {
				return err
			}
		}
		return nil
	})
	for _, pod := range pods {
		now, err := fresh(t.Context(), pod)
		must(t, err)
		if n := now.Status.ContainerStatuses[0].RestartCount; n > 0 {
			t.Errorf("pod %s was restarted %d times", pod.Name, n)
		}
	}
	// A pod that was captured in place leaves as little as any other.
	left := tracesOf(t, pods[2])
	remove(t, pods[2])
	left.expectNone(t)
}

// waitSaid waits until a program has written something.
func waitSaid(t *testing.T, c *command, what string) {
	t.Helper()
	eventually(t, soon, fmt.Sprintf("%s to say %q", c.what, what), func() error {
		if said := c.said(&c.stdout); !strings.Contains(said, what) {
			return fmt.Errorf("it said %q", said)
		}
		return nil
	})
}

// driftRepaired has somebody who may do so break the rules of a pod.
func driftRepaired(t *testing.T) {
	ns := newNamespace(t, captured())
	service(t, ns, "server", 8080)
	pods := startAll(t, ns, appPod("client", "serve"), appPod("server", "serve"))
	client := pods[0]
	expectCaptured(t, pods...)
	s := sandboxOf(t, client)
	for _, c := range []struct{ nft, difference string }{
		{"flush chain inet weir out", "chain out: rule 1 is missing"},
		{"delete table inet weir", "there are no rules"},
	} {
		nft := append([]string{"--net=" + s.pause.path("ns", "net"), "nft"}, strings.Fields(c.nft)...)
		out, err := exec.CommandContext(t.Context(), "nsenter", nft...).CombinedOutput()
		if err != nil {
			t.Fatalf("nft %s: %v: %s", c.nft, err, out)
		}
		waitEvent(t, client, "DriftRepaired", c.difference)
		expectCaptured(t, client)
		followAll(t, get(t, client, "-n", "2", "http://server:8080/"))
	}
}

// annotationChanged changes which traffic of a running pod is turned aside.
func annotationChanged(t *testing.T) {
	ns := newNamespace(t, captured())
	pod := start(t, ns, appPod("changes", "serve"))
	expectCaptured(t, pod)
	patch(t, pod, `{"metadata":{"annotations":{"weirmesh.io/exclude-outbound-ports":"5432"}}}`)
	eventually(t, startLimit, "the port to be left alone", func() error {
		shown, err := sandboxOf(t, pod).rules()
		if err != nil || strings.Contains(shown.Rules, "5432") {
			return err
		}
		return fmt.Errorf("the rules are %s", shown.Rules)
	})
	expectCaptured(t, pod)
}
