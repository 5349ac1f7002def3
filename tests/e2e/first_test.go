package e2e

import (
	"flag"
	"fmt"
	"net"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/tests/e2e/app/report"
	"github.com/weirmesh/weir/tests/probe"
)

var firstPacketPods = flag.Int("first-packet-pods", 20, "pods whose first packets are watched")

const sinkPort = ":9000"

// floodAt is the probe's command line that floods the sink of a pod, at all its
// addresses.
func floodAt(t *testing.T, sinkPod *corev1.Pod) []string {
	t.Helper()
	flood := []string{"flood"}
	for _, ip := range sinkPod.Status.PodIPs {
		flood = append(flood, net.JoinHostPort(ip.IP, sinkPort[1:]))
	}
	return flood
}

// sunk is what has come to a pod's sink so far.
func sunk(t *testing.T, sinkPod *corev1.Pod) report.Sink {
	t.Helper()
	results := get(t, sinkPod, "http://127.0.0.1:8080/")
	if len(results) != 1 || results[0].Answer == nil {
		t.Fatalf("the sink says %+v", results)
	}
	return results[0].Answer.Sink
}

// firstPackets starts pods whose init container does nothing but flood
// connections, at a sink that is not captured: none of them gets there by itself.
// Without capture all of them do.
func firstPackets(t *testing.T) {
	sinkPod := start(t, newNamespace(t, nil), appPod("sink", "serve", "-sink", sinkPort))
	flood := floodAt(t, sinkPod)
	connections := probe.Connections * (len(flood) - 1)
	probePod := func(i int) *corev1.Pod {
		pod := onNode(appPod(fmt.Sprintf("probe-%d", i), "sleep", "1h"), i%len(bed.Nodes))
		pod.Spec.InitContainers = []corev1.Container{appContainer("probe", flood...)}
		return pod
	}
	var probes []*corev1.Pod
	for i := range *firstPacketPods {
		probes = append(probes, probePod(i))
	}
	probes = startAll(t, newNamespace(t, captured()), probes...)
	expectCaptured(t, probes...)
	got := sunk(t, sinkPod)
	t.Logf("%d pods, %d connections each: at the sink %d by proxies, %d uncaptured", *firstPacketPods, connections, got.Others, got.Uncaptured)
	if got.Uncaptured != 0 {
		t.Errorf("%d first packets got away uncaptured", got.Uncaptured)
	}
	if want := *firstPacketPods * connections / 2; got.Others < want {
		t.Errorf("%d connections came through proxies, want %d at least", got.Others, want)
	}

	start(t, newNamespace(t, nil), probePod(0))
	if control := sunk(t, sinkPod).Uncaptured; control == 0 {
		t.Error("control: the connections of a pod that is not captured are not seen")
	}
}
