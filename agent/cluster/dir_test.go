package cluster

import (
	"bytes"
	"context"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// logBuffer is a log that a test reads while others write it.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func (b *logBuffer) logger() *slog.Logger { return slog.New(slog.NewTextHandler(b, nil)) }

// write puts a file in place in one step.
func write(t *testing.T, dir, name, content string) {
	t.Helper()
	temp := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(temp, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(temp, filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

// runDir runs RunDir until the test ends.
func runDir(t *testing.T, dir string) (*Store, *logBuffer) {
	t.Helper()
	s, log := NewStore(), &logBuffer{}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- RunDir(ctx, s, dir, log.logger()) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	if err := s.WaitSynced(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s, log
}

func pod(name, capture string) string {
	return "apiVersion: v1\nkind: Pod\nmetadata: {namespace: shop, name: " + name + ", labels: {weirmesh.io/capture: " + capture + ", app: x}}\n"
}

const shopYAML = `# The shop.
---
apiVersion: v1
kind: Namespace
metadata:
  name: shop
  labels: {weirmesh.io/capture: enabled, team: a}
---
# Nothing but a comment.
---
apiVersion: v1
kind: Pod
metadata:
  name: back-1
  namespace: shop
  uid: "1"
  annotations:
    weirmesh.io/exclude-inbound-ports: "9090"
    example.com/other: x
spec:
  serviceAccountName: back
  nodeName: n1
  runtimeClassName: runc
  containers: [{name: app, image: app}]
status:
  phase: Running
  podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]
---
apiVersion: v1
kind: Service
metadata: {name: back, namespace: shop}
spec:
  clusterIPs: [10.96.0.7, "fd96::7"]
  ports: [{name: http, port: 80, targetPort: web}]
`

const sliceJSON = `{
  "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
  "metadata": {"name": "back-4", "namespace": "shop", "labels": {"kubernetes.io/service-name": "back"}},
  "addressType": "IPv4",
  "ports": [{"name": "http", "port": 8080}, {"name": "all"}],
  "endpoints": [
    {"addresses": ["10.0.0.1"], "targetRef": {"kind": "Pod", "namespace": "shop", "name": "back-1"}},
    {"addresses": ["10.0.0.2"], "conditions": {"ready": false, "serving": true, "terminating": true}},
    {"addresses": ["10.0.0.3"], "conditions": {"ready": false}}
  ]
}`

func TestADirectoryIsACluster(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "shop.yaml", shopYAML)
	write(t, dir, "slice.json", sliceJSON)
	write(t, dir, "notes.txt", "not a manifest")
	write(t, dir, ".hidden.yaml", "not: a manifest")
	s, _ := runDir(t, dir)

	got, ns, err := s.WaitPod(t.Context(), "shop", "back-1", "1")
	if err != nil {
		t.Fatal(err)
	}
	want := model.Pod{
		UID: "1", Namespace: "shop", Name: "back-1", ServiceAccount: "back", Workload: "back-1", Node: "n1", RuntimeClass: "runc", Phase: model.PodRunning,
		Annotations: map[string]string{"weirmesh.io/exclude-inbound-ports": "9090"},
		Addresses:   []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")},
	}
	if diff := cmp.Diff(want, got, netipValues); diff != "" {
		t.Errorf("pod: -want +got:\n%s", diff)
	}
	if diff := cmp.Diff(model.Namespace{Name: "shop", Labels: map[string]string{"weirmesh.io/capture": "enabled"}}, ns); diff != "" {
		t.Errorf("namespace: -want +got:\n%s", diff)
	}
	destination := route.Destination{Service: "shop/back", Protocol: route.HTTP, Endpoints: []route.Endpoint{
		{Addr: netip.MustParseAddrPort("10.0.0.1:8080"), Pod: "shop/back-1", Workload: "shop/back-1"},
	}}
	if diff := cmp.Diff(destination, told(s, netip.MustParseAddrPort("10.96.0.7:80")), netipValues); diff != "" {
		t.Errorf("destination: -want +got:\n%s", diff)
	}
}

func TestADirectoryNeedsNoNamespaceObjects(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "pod.yml", "apiVersion: v1\nkind: Pod\nmetadata: {name: front}\n")
	s, _ := runDir(t, dir)
	_, ns, err := s.WaitPod(t.Context(), "default", "front", "any")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(model.Namespace{Name: "default"}, ns); diff != "" {
		t.Error(diff)
	}
}

func TestADirectoryIsFollowed(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a.yaml", pod("a", "enabled"))
	s, log := runDir(t, dir)

	write(t, dir, "a.yaml", pod("a", "disabled"))
	eventually(t, "a file is renamed over another", func() bool { return podNames(s) == "shop/a=disabled" })

	if err := os.WriteFile(filepath.Join(dir, "a.yaml"), []byte(pod("a2", "enabled")), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a file is written in place", func() bool { return podNames(s) == "shop/a2=enabled" })

	write(t, dir, "b.yaml", "kind: Pod\napiVersion: v1\nmetadata: {name: b}\nspec: {hostNetwrok: true}\n")
	eventually(t, "a mistake is logged", func() bool {
		return strings.Contains(log.String(), `b.yaml: document 1: Pod: unknown field \"spec.hostNetwrok\"`)
	})
	write(t, dir, "a.yaml", pod("a3", "enabled"))
	if got := podNames(s); got != "shop/a2=enabled" {
		t.Errorf("the last good state is not kept: %s", got)
	}

	if err := os.Remove(filepath.Join(dir, "b.yaml")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the mistake is gone", func() bool {
		return podNames(s) == "shop/a3=enabled" && strings.Contains(log.String(), "manifests are valid again")
	})
	if n := strings.Count(log.String(), "level=ERROR"); n != 1 {
		t.Errorf("one mistake was logged %d times:\n%s", n, log)
	}
}

// As kubelet updates a mounted ConfigMap: files are links through one link, which
// is renamed.
func TestADirectoryOfLinksIsFollowed(t *testing.T) {
	dir := t.TempDir()
	version := func(name, content string) {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, name), "a.yaml", content)
		temp := filepath.Join(dir, "..tmp")
		if err := os.Symlink(name, temp); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(temp, filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	version("..1", pod("a", "enabled"))
	if err := os.Symlink("..data/a.yaml", filepath.Join(dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	s, _ := runDir(t, dir)
	version("..2", pod("b", "enabled"))
	eventually(t, "the link points elsewhere", func() bool { return podNames(s) == "shop/b=enabled" })
}

func TestADirectoryMayBeReplaced(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "manifests")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, dir, "a.yaml", pod("a", "enabled"))
	s, log := runDir(t, dir)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its absence is logged", func() bool { return strings.Contains(log.String(), "no such file or directory") })
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, dir, "b.yaml", pod("b", "enabled"))
	eventually(t, "it is read again", func() bool { return podNames(s) == "shop/b=enabled" })
	write(t, dir, "b.yaml", pod("c", "enabled"))
	eventually(t, "it is followed again", func() bool { return podNames(s) == "shop/c=enabled" })
}

func TestMistakesInADirectoryAreFatalAtTheStart(t *testing.T) {
	const slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nmetadata: {name: s, labels: {kubernetes.io/service-name: back}}\n"
	const service = "apiVersion: v1\nkind: Service\nmetadata: {name: back}\n"
	tests := []struct {
		promise, content, want string
	}{
		{"an unknown field", pod("a", "enabled") + "---\n" + pod("b", "enabled") + "spec: {nodename: x, containers: [{imag: y}]}\n",
			`a.yaml: document 2: Pod: unknown field "spec.containers[0].imag", unknown field "spec.nodename"`},
		{"a field that is there twice", "apiVersion: v1\nkind: Pod\nkind: Pod\nmetadata: {name: a}\n", `a.yaml: document 1: Pod: yaml: unmarshal errors: line 3: key "kind" already set in map`},
		{"a field of the wrong type", "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {hostNetwork: maybe}\n",
			`a.yaml: document 1: json: cannot unmarshal string into Go struct field PodSpec.spec.hostNetwork of type bool`},
		{"an unknown kind", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}\n",
			`a.yaml: document 1: apps/v1 Deployment: unknown kind; a manifest holds ` + manifestKinds},
		{"a kind that means nothing here", "apiVersion: v1\nkind: Secret\nmetadata: {name: a}\n",
			`a.yaml: document 1: Secret: not a kind for a manifest, which holds ` + manifestKinds},
		{"no kind", "metadata: {name: a}\n", "a.yaml: document 1: kind is missing"},
		{"no version", "kind: Pod\nmetadata: {name: a}\n", "a.yaml: document 1: apiVersion is missing"},
		{"no name", "apiVersion: v1\nkind: Pod\n", `a.yaml: document 1: Pod: metadata.name is missing`},
		{"not YAML", "a: [\n", "a.yaml: document 1: yaml: line 1: did not find expected node content"},
		{"an object that is there twice", pod("a", "enabled") + "---\n" + pod("a", "disabled"),
			`a.yaml: document 2: Pod shop/a: is in a.yaml: document 1 already`},
		{"an address that is none", service + "spec: {clusterIPs: [10.96.0.7, 10.96.0.700]}\n",
			`a.yaml: document 1: Service default/back: spec.clusterIPs[1]: ParseAddr("10.96.0.700"): IPv4 field has value >255`},
		{"a port that is none", service + "spec: {ports: [{port: 70000}]}\n",
			`a.yaml: document 1: Service default/back: spec.ports[0].port: 70000 is not between 1 and 65535`},
		{"a cluster IP that two Services have", service + "spec: {clusterIP: 10.96.0.7}\n---\n" + strings.Replace(service, "back", "front", 1) + "spec: {clusterIP: 10.96.0.7}\n",
			`a.yaml: document 2: Service default/front: spec.clusterIPs: 10.96.0.7 is Service default/back's`},
		{"a slice of no Service", "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nmetadata: {name: s}\n",
			`a.yaml: document 1: EndpointSlice s: metadata.labels: kubernetes.io/service-name is missing`},
		{"an endpoint without address", slice + "endpoints: [{addresses: [10.0.0.1]}, {addresses: []}]\n",
			`a.yaml: document 1: EndpointSlice default/s: endpoints[1].addresses: there is none`},
	}
	for _, test := range tests {
		t.Run(test.promise, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, "a.yaml", test.content)
			err := RunDir(t.Context(), NewStore(), dir, slog.New(slog.DiscardHandler))
			if err == nil {
				t.Fatal("no error")
			}
			if diff := cmp.Diff("manifests: "+test.want, err.Error()); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
	if err := RunDir(t.Context(), NewStore(), filepath.Join(t.TempDir(), "nowhere"), slog.New(slog.DiscardHandler)); err == nil {
		t.Error("no error for a directory that is not there")
	}
}
