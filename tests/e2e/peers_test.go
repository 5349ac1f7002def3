package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/weirmesh/weir/agent/telemetry"
	"github.com/weirmesh/weir/tests/cluster"
)

// callersShow has a namespace demand mTLS, while plaintext goes on, and then expect
// plaintext, on all ports but one. Beside a caller of the mesh calls a stranger, in all
// ways; kubelet probes in all of its own, and is never refused.
func callersShow(t *testing.T) {
	ns := newNamespace(t, captured())
	wire := watchWire(t, bed.Nodes[0])
	serviceAll(t, ns, "back")
	pods := startAll(t, ns, onNode(probed(serveAll("back")), 1), onNode(appPod("member", "sleep", "1h"), 0),
		onNode(labelled(appPod("stranger", "sleep", "1h"), captureLabel, "disabled"), 0))
	back, member, stranger, callers := pods[0], pods[1], pods[2], pods[1:]
	expectCaptured(t, back, member)
	expectNotCaptured(t, stranger)
	identified(t, back)
	identified(t, member)
	caller := "URI=spiffe://cluster.local/ns/" + ns + "/sa/default"
	all := expectedOutcomes(func(string) bool { return true })
	outcomesBecome(t, "without a policy", callers, map[string]string{"member": all, "stranger": all})
	callerShown(t, member, caller, "back")

	stays, ends := begin(t, member, "talk", "back:9000"), begin(t, stranger, "talk", "back:9000")
	waitSaid(t, stays, "connected")
	waitSaid(t, ends, "connected")
	must(t, createPolicy(t, ns, peerAuthentication, "all", `{"mode":"Strict"}`))
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	// It talks until it is told to end, which it is not.
	if said, err := ends.wait(ctx); outcomeOfTalk(err) != "reset" {
		t.Errorf("the stranger's connection that stays got %v, want a reset; it said %q", err, said)
	}
	outcomesBecome(t, "in Strict", callers, map[string]string{
		"member": all, "stranger": plaintextOutcomes(func(string) bool { return false })})
	callerShown(t, member, caller, "back")
	plaintextSeen(t, back, stranger)
	onlyProbesPass(t, back)
	waitProbed(t, back, time.Now())
	ctx, cancel = context.WithTimeout(t.Context(), soon)
	defer cancel()
	if said, err := stays.finish(ctx); err != nil {
		t.Errorf("the member's connection that stays: %q, %v", said, err)
	}

	must(t, createPolicy(t, ns, peerAuthentication, "calls", `{"podSelector":{"matchLabels":{"app":"back"}},"ports":[{"port":9001,"mode":"Strict"}]}`))
	must(t, deletePolicy(t, ns, peerAuthentication, "all"))
	must(t, createPolicy(t, ns, peerAuthentication, "all", `{"mode":"Disable"}`))
	plain := func(way string) bool { return way != "gRPC" }
	outcomesBecome(t, "in Disable", callers, map[string]string{"member": all, "stranger": plaintextOutcomes(plain)})
	eventually(t, soon, "the member's words to be read where plaintext is expected", func() error { return readable(t, wire, plain, member, "back") })
	callerShown(t, member, "", "back")
	waitProbed(t, back, time.Now())
	stayedReady(t, back)
}

// probed has kubelet probe a pod of serveAll's for whether it is ready and whether it
// lives, in all ways there are; what answers is the first container. One probe that fails
// makes it unready.
func probed(pod *corev1.Pod) *corev1.Pod {
	get := func(path string) corev1.ProbeHandler {
		return corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: path, Port: intstr.FromInt32(8080)}}
	}
	call, connect := corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: 9001}}, corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(9000)}}
	exec := corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"/app", "get", "http://localhost:8080/"}}}
	probe := func(handler corev1.ProbeHandler, failures int32) *corev1.Probe {
		return &corev1.Probe{ProbeHandler: handler, PeriodSeconds: 1, TimeoutSeconds: 5, FailureThreshold: failures}
	}
	for i, handlers := range [][2]corev1.ProbeHandler{{get("/healthz"), get("/livez")}, {call, call}, {connect, connect}, {exec, exec}} {
		if i > 0 {
			pod.Spec.Containers = append(pod.Spec.Containers, appContainer(fmt.Sprintf("probed-%d", i), "sleep", "1h"))
		}
		c := &pod.Spec.Containers[i]
		c.ReadinessProbe, c.LivenessProbe = probe(handlers[0], 1), probe(handlers[1], 3)
	}
	return pod
}

// waitProbed waits until kubelet has probed a pod later than that in all ways that go by the
// network, each more often than one may fail. None was refused.
func waitProbed(t *testing.T, pod *corev1.Pod, since time.Time) {
	t.Helper()
	kubelet := bed.node(pod.Spec.NodeName).PodRanges[0].Masked().Addr().Next().String()
	eventually(t, startLimit, "kubelet's probes of pod "+pod.Name, func() error {
		all, err := records()
		if err != nil {
			return err
		}
		counts := map[string]int{}
		for _, r := range all {
			host, _, err := net.SplitHostPort(r.Client)
			if err != nil || host != kubelet || r.Pod != pod.Namespace+"/"+pod.Name || r.Direction != "inbound" || r.Timestamp.Before(since) {
				continue
			}
			what := r.Server[strings.LastIndex(r.Server, ":"):]
			if r.HTTP != nil {
				what = r.Path
			}
			if r.Reason != "" || r.HTTP != nil && r.Status != http.StatusOK {
				t.Fatalf("kubelet was refused %s: %+v", what, r)
			}
			counts[what]++
		}
		for _, what := range []string{"/healthz", "/livez", "/grpc.health.v1.Health/Check", ":9000"} {
			if counts[what] <= 3 {
				return fmt.Errorf("there were %v", counts)
			}
		}
		return nil
	})
}

// onlyProbesPass asks a pod as kubelet does, from the same address, what is declared as a
// probe, and something else.
func onlyProbesPass(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	node := bed.node(pod.Spec.NodeName)
	url := "http://" + net.JoinHostPort(pod.Status.PodIP, "8080")
	if status, _, err := askFrom(t.Context(), node.Machine, url+"/healthz"); status != http.StatusOK || err != nil {
		t.Errorf("the node asked as a probe does and got %d, %v", status, err)
	}
	if status, _, err := askFrom(t.Context(), node.Machine, url+"/undeclared"); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the node asked what is no probe and got %d, %v, want a reset", status, err)
	}
}

// plaintextSeen waits until it is recorded and counted that a stranger's connections of all
// ways were refused.
func plaintextSeen(t *testing.T, pod, stranger *corev1.Pod) {
	t.Helper()
	for _, port := range []string{":8080", ":9000", ":9001"} {
		waitRecord(t, "plaintext refused on port "+port, func(r telemetry.Record) bool {
			host, _, err := net.SplitHostPort(r.Client)
			return err == nil && hasAddress(stranger, host) && r.Pod == pod.Namespace+"/"+pod.Name && r.Direction == "inbound" &&
				strings.HasSuffix(r.Server, port) && r.Reason == "plaintext_refused" && r.PeerIdentity == ""
		})
	}
	node := bed.node(pod.Spec.NodeName)
	series := regexp.MustCompile(`(?m)^weir_tcp_connections_closed_total{destination_namespace="` + pod.Namespace +
		`",.*destination_workload="` + pod.Name + `",direction="inbound",reason="plaintext_refused",.*} (\d+)$`)
	eventually(t, soon, "plaintext that was refused to be counted", func() error {
		_, metrics, err := askFrom(t.Context(), node.Machine, "http://127.0.0.1:15090/metrics")
		if err != nil {
			return err
		}
		sum := 0
		for _, m := range series.FindAllStringSubmatch(metrics, -1) {
			n, err := strconv.Atoi(m[1])
			must(t, err)
			sum += n
		}
		// One connection for each way, and the one that had stayed.
		if want := len(ways) + 1; sum < want {
			return fmt.Errorf("%d are, want %d at least", sum, want)
		}
		return nil
	})
}

// askFrom sends one request from inside a machine, and returns status and body.
func askFrom(ctx context.Context, machine *cluster.Machine, url string) (int, string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: machine.DialContext, DisableKeepAlives: true}}
	response, err := client.Do(request)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return response.StatusCode, string(body), err
}

// readable says whether the words of a pod of the mesh are to be read on the wire, in the
// ways that are plain, and in no other.
func readable(t *testing.T, wire *wire, plain func(way string) bool, from *corev1.Pod, to string) error {
	t.Helper()
	words := map[string]string{} // by way
	for _, w := range ways {
		words[w.name] = newWord()
		if outcome := w.call(t, from, to, words[w.name]); outcome != served {
			return fmt.Errorf("%s got %s", w.name, outcome)
		}
	}
	for _, w := range ways {
		if plain(w.name) && !wire.saw(words[w.name]) {
			return errors.New("those of " + w.name + " are not on the wire")
		}
	}
	// What was said before the last of these has been looked at by now.
	for _, w := range ways {
		if !plain(w.name) && wire.saw(words[w.name]) {
			t.Errorf("the words of %s are on the wire", w.name)
		}
	}
	return nil
}

// stayedReady fails the test if a pod was anything but ready since it first was.
func stayedReady(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	now, err := fresh(t.Context(), pod)
	must(t, err)
	if then, now := readiness(pod), readiness(now); now.Status != corev1.ConditionTrue || !now.LastTransitionTime.Equal(&then.LastTransitionTime) {
		t.Errorf("pod %s was ready first as %+v, and now as %+v", pod.Name, then, now)
	}
	for _, s := range now.Status.ContainerStatuses {
		if s.RestartCount > 0 {
			t.Errorf("container %s of pod %s was started again: %+v", s.Name, pod.Name, s.LastTerminationState)
		}
	}
}

func readiness(pod *corev1.Pod) corev1.PodCondition {
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c
		}
	}
	return corev1.PodCondition{}
}
