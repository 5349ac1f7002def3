package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// streamingServer is a fake of an API server's streamed lists, which the fake
// clientset lacks: each kind's objects as watch events, then the bookmark that
// ends the list. It checks that nothing else is asked for, and has neither routes
// nor policies.
type streamingServer struct {
	t       *testing.T
	objects map[string][]runtime.Object // by resource
}

func (s streamingServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if strings.HasPrefix(r.URL.Path, "/apis/gateway.networking.k8s.io/") || strings.HasPrefix(r.URL.Path, "/apis/policy.weirmesh.io/v1alpha1/") {
		http.NotFound(w, r)
		return
	}
	resource, query := path.Base(r.URL.Path), r.URL.Query()
	if query.Get("watch") == "" || query.Get("sendInitialEvents") != "true" {
		s.t.Errorf("not a streamed list: %s", r.URL)
	}
	if got, want := query.Get("fieldSelector"), map[string]string{"pods": "spec.nodeName=n1", "nodes": "metadata.name=n1"}[resource]; got != want && (resource != "pods" || got != "") {
		s.t.Errorf("%s: fields %q", resource, got)
	}
	w.Header().Set("Content-Type", "application/json")
	send := func(kind string, obj runtime.Object) {
		raw, err := json.Marshal(obj)
		if err != nil {
			s.t.Error(err)
		}
		fmt.Fprintf(w, `{"type":%q,"object":%s}`+"\n", kind, raw)
	}
	for _, obj := range s.objects[resource] {
		send("ADDED", obj)
	}
	kinds := map[string]string{"pods": "Pod", "namespaces": "Namespace", "services": "Service", "endpointslices": "EndpointSlice", "nodes": "Node"}
	version := "v1"
	if resource == "endpointslices" {
		version = "discovery.k8s.io/v1"
	}
	send("BOOKMARK", &metav1.PartialObjectMetadata{
		TypeMeta:   metav1.TypeMeta{APIVersion: version, Kind: kinds[resource]},
		ObjectMeta: metav1.ObjectMeta{ResourceVersion: "7", Annotations: map[string]string{metav1.InitialEventsAnnotationKey: "true"}},
	})
	w.(http.Flusher).Flush()
	<-r.Context().Done()
}

// The server comes up only after the first attempts to reach it.
func TestStreamedListsFromAServerThatComesUpLate(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := listener.Addr().String()
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	content := `{"apiVersion":"v1","kind":"Config","current-context":"c",
		"clusters":[{"name":"c","cluster":{"server":"http://` + addr + `"}}],
		"contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],"users":[{"name":"u"}]}`
	if err := os.WriteFile(kubeconfig, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	log := &logBuffer{}
	api, err := NewAPI(kubeconfig, "n1", log.logger())
	if err != nil {
		t.Fatal(err)
	}
	s := NewStore()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- RunAPI(ctx, s, api, LastGood{}) }()
	eventually(t, "each kind's failure is logged", func() bool {
		return strings.Count(log.String(), "API server does not answer") == kinds
	})

	pod := apiPod("front", "u-1", "enabled")
	pod.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}
	ns := &corev1.Namespace{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"}, ObjectMeta: meta("", "shop")}
	listener, err = net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: streamingServer{t, map[string][]runtime.Object{"pods": {pod}, "namespaces": {ns}}}}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()

	if err := s.WaitSynced(ctx); err != nil {
		t.Fatal(err)
	}
	if got, _, err := s.WaitPod(ctx, "shop", "front", "u-1"); err != nil || got.Node != "n1" {
		t.Errorf("got %v, %v", got, err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := server.Close(); err != nil {
		t.Error(err)
	}
	<-served
	if n := strings.Count(log.String(), "API server answers again"); n != kinds {
		t.Errorf("its return was logged %d times:\n%s", n, log)
	}
}

func TestStrippedObjectsConvertToTheSame(t *testing.T) {
	pod := apiPod("front", "u-1", "enabled")
	hook := &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/up", Port: intstr.FromString("web")}}
	app := corev1.Container{Name: "app", Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: 80}}, Lifecycle: &corev1.Lifecycle{PostStart: hook}}
	for i, p := range []**corev1.Probe{&app.LivenessProbe, &app.ReadinessProbe, &app.StartupProbe} {
		*p = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(int32(i + 1))}}}
	}
	sidecar := corev1.Container{Name: "sidecar", LivenessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: 9}}}}
	pod.Spec.Containers, pod.Spec.InitContainers = []corev1.Container{app}, []corev1.Container{sidecar}
	pod.OwnerReferences = []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "web-7d4b9c6f5d", Controller: new(true)}}
	pod.Labels["pod-template-hash"] = "7d4b9c6f5d"
	pod.Spec.ServiceAccountName, pod.Spec.RuntimeClassName, pod.Spec.HostNetwork = "front", new("runc"), true
	pod.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}}, Message: "x", Conditions: []corev1.PodCondition{
		{Type: corev1.PodReady, Status: corev1.ConditionTrue}, {Type: ConditionCaptured, Status: corev1.ConditionTrue},
	}}
	pod.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "h", "weirmesh.io/quic": "pass"}
	sameAfter(t, pod, stripPod, toPod)
	ns := &corev1.Namespace{ObjectMeta: meta("", "shop")}
	ns.Labels = map[string]string{"weirmesh.io/capture": "enabled"}
	sameAfter(t, ns, stripNamespace, toNamespace)
	sameAfter(t, apiService(), stripService, Service)
	sameAfter(t, apiSlice("10.0.0.1"), stripSlice, toSlice)
}

func sameAfter[O Object, M any](t *testing.T, o O, strip func(O), convert func(O) (M, error)) {
	t.Helper()
	before, err := convert(o)
	if err != nil {
		t.Fatal(err)
	}
	strip(o)
	after, err := convert(o)
	if err != nil || !same(before, after) {
		t.Errorf("%T: stripping changes %v to %v, %v", o, before, after, err)
	}
	if len(o.GetManagedFields()) > 0 {
		t.Errorf("%T: keeps managedFields", o)
	}
}
