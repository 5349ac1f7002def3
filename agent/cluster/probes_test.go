package cluster

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/proxy/route"
)

// probed is a pod with every way to be asked by the network.
const probed = `
apiVersion: v1
kind: Pod
metadata: {namespace: shop, name: front}
spec:
  initContainers:
  - name: sidecar
    restartPolicy: Always
    ports: [{name: web, containerPort: 9000}]
    startupProbe: {httpGet: {path: /started, port: web}}
  containers:
  - name: app
    ports: [{name: web, containerPort: 8080}, {name: admin, containerPort: 8081}]
    livenessProbe: {httpGet: {path: '/healthz?full=1#now', port: web}}
    readinessProbe: {tcpSocket: {port: admin}}
    startupProbe: {grpc: {port: 8082, service: shop}}
    lifecycle:
      postStart: {httpGet: {path: up, port: 8083}}
      preStop: {httpGet: {path: '/a b', port: 8083}}
  - name: twice
    livenessProbe: {httpGet: {path: /same, port: 8084}}
    readinessProbe: {httpGet: {path: /same, port: 8084}}
    startupProbe: {httpGet: {port: 8084}}
  - name: nothing
    livenessProbe: {httpGet: {path: /x, port: 8443, scheme: HTTPS}}
    readinessProbe: {httpGet: {path: /x, port: 80, host: example.com}}
    startupProbe: {httpGet: {path: /x, port: web}}
    lifecycle: {postStart: {exec: {command: [a]}}}
  - name: nothing-either
    livenessProbe: {tcpSocket: {port: 80, host: example.com}}
    readinessProbe: {exec: {command: [a]}}
    startupProbe: {httpGet: {path: /x, port: 65536}}
`

func TestProbesAreWhatKubeletAsks(t *testing.T) {
	v, err := readDir(withFile(t, probed))
	if err != nil {
		t.Fatal(err)
	}
	want := []route.Probe{
		{Port: 9000, Target: "/started"},
		{Port: 8080, Target: "/healthz?full=1"},
		{Port: 8082, GRPC: true},
		{Port: 8083, Target: "/up"},
		{Port: 8083, Target: "/a%20b"},
		{Port: 8084, Target: "/same"},
		{Port: 8084, Target: "/"},
	}
	if diff := cmp.Diff(want, v.pods[key{"shop", "front"}].expand().Probes); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestProbesAreThoseOfThePodThatIsThere(t *testing.T) {
	v, err := readDir(withFile(t, probed))
	if err != nil {
		t.Fatal(err)
	}
	s := NewStore()
	s.replace(v)
	addrs := []netip.Addr{netip.MustParseAddr("10.0.0.1")}
	changes := s.changes.Load()
	s.SetNodeAddresses(addrs)
	if s.changes.Load() == changes {
		t.Error("nobody is told that the node has other addresses")
	}
	changes = s.changes.Load()
	s.SetNodeAddresses(slices.Clone(addrs))
	if s.changes.Load() != changes {
		t.Error("it is told of the same addresses")
	}
	for name, want := range map[string]int{"front": 7, "gone": 0} {
		probes, node := s.Probes("shop", name, "")
		if len(probes) != want || !slices.Equal(node, addrs) {
			t.Errorf("%s: %v from %v", name, probes, node)
		}
	}
}
