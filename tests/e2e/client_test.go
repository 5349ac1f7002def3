package e2e

import (
	"net"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// clientSeen asks back, which has a pod on each node, from pods that are captured
// and from one that is not: the application sees the address of whoever asks.
func clientSeen(t *testing.T) {
	ns, plain := newNamespace(t, captured()), newNamespace(t, nil)
	pods := backs(t, ns, 2)
	front := start(t, ns, onNode(appPod("front", "serve"), 0))
	stranger := start(t, plain, onNode(appPod("stranger", "serve"), 1))
	networks := []string{"tcp4"}
	if len(front.Status.PodIPs) > 1 {
		networks = append(networks, "tcp6")
	}
	url := "http://back." + ns + ".svc.cluster.local:8080/"
	waitAnswers(t, front, url, pods)
	waitAnswers(t, stranger, url, pods)
	for _, network := range networks {
		for _, client := range []*corev1.Pod{front, stranger} {
			results := get(t, client, "-network", network, "-n", "20", url)
			allServed(t, client.Name+" to back", results)
			for _, r := range results {
				host, _, err := net.SplitHostPort(r.Answer.Client)
				must(t, err)
				if !hasAddress(client, host) {
					t.Errorf("%s: %s was asked by %s, and saw %s", network, r.Answer.Pod, client.Name, r.Answer.Client)
				}
			}
		}
	}
}
