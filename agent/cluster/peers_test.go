package cluster

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weirmesh/weir/agent/decide"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

func TestWhatAPodIsOneOf(t *testing.T) {
	owned := func(kind, owner string, labels map[string]string) *corev1.Pod {
		yes := true
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: "web-n1", GenerateName: "made-", Labels: labels,
			OwnerReferences: []metav1.OwnerReference{{Kind: "Other", Name: "no"}, {Kind: kind, Name: owner, Controller: &yes}},
		}}
	}
	hash := map[string]string{"pod-template-hash": "7d4b9c6f5d"}
	for _, test := range []struct {
		promise string
		pod     *corev1.Pod
		want    string
	}{
		{"a Deployment", owned("ReplicaSet", "web-7d4b9c6f5d", hash), "web"},
		{"a ReplicaSet of its own", owned("ReplicaSet", "web-7d4b9c6f5d", nil), "web-7d4b9c6f5d"},
		{"a StatefulSet", owned("StatefulSet", "db", nil), "db"},
		{"a Job", owned("Job", "migrate-2", nil), "migrate-2"},
		{"a CronJob", owned("Job", "backup-29391840", nil), "backup"},
		{"a Job that looks like one of a CronJob, but for a digit", owned("Job", "backup-2939184x", nil), "backup-2939184x"},
		{"a static pod", owned("Node", "n1", nil), "web"},
		{"a pod that somebody generates", &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "x-abc", GenerateName: "x-"}}, "x"},
		{"a pod of nothing", &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "x"}}, "x"},
	} {
		pod, err := toPod(test.pod)
		if err != nil {
			t.Fatal(err)
		}
		if pod.Workload != test.want {
			t.Errorf("%s: %q, want %q", test.promise, pod.Workload, test.want)
		}
	}
}

func TestWorkloadsAreKnownOfPodsInTheStore(t *testing.T) {
	s := NewStore()
	for _, p := range []model.Pod{
		{Namespace: "shop", Name: "web-1", Workload: "web", Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("fd00::5")}},
		{Namespace: "shop", Name: "old-1", Workload: "old", Phase: model.PodSucceeded, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.6")}},
		{Namespace: "shop", Name: "host-1", Workload: "host", HostNetwork: true, Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1")}},
	} {
		s.setPeer(peerOf(p))
	}
	if got := s.Workload("shop", "web-1") + s.Workload("shop", "web-2"); got != "shop/web" {
		t.Errorf("%q", got)
	}
	callers := map[netip.Addr]string{}
	for _, addr := range []string{"fd00::5", "10.0.0.6", "192.0.2.1", "10.0.0.7"} {
		callers[netip.MustParseAddr(addr)] = ""
	}
	s.Callers(callers)
	want := map[netip.Addr]string{
		netip.MustParseAddr("fd00::5"): "shop/web", netip.MustParseAddr("10.0.0.6"): "",
		netip.MustParseAddr("192.0.2.1"): "", netip.MustParseAddr("10.0.0.7"): "",
	}
	if diff := cmp.Diff(want, callers, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}

// TestEndpointsOfRoutesHaveTheirWorkloads, as those of the Service itself.
func TestEndpointsOfRoutesHaveTheirWorkloads(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "shop.yaml", shopYAML)
	write(t, dir, "slice.json", sliceJSON)
	write(t, dir, "route.yaml", `
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: back}
spec:
  parentRefs: [{group: "", kind: Service, name: back}]
  rules: [{backendRefs: [{name: back, port: 80}]}]
`)
	s, _ := runDir(t, dir)
	d := told(s, netip.MustParseAddrPort("10.96.0.7:80"))
	if d.Routes == nil || len(d.Routes.Rules) != 1 {
		t.Fatalf("no route: %v", d)
	}
	if got := d.Routes.Rules[0].Backends[0].Backend.Endpoints; len(got) != 1 || got[0].Workload != "shop/back-1" {
		t.Errorf("%v", got)
	}
}

func TestAPeerIsCapturedIfItsNodesAgentSaysSo(t *testing.T) {
	condition := func(kind corev1.PodConditionType, status corev1.ConditionStatus) *corev1.Pod {
		pod := apiPod("back-1", "u", "enabled")
		pod.Spec.NodeName, pod.Spec.ServiceAccountName = "n2", "back"
		pod.Status.PodIPs = []corev1.PodIP{{IP: "10.0.0.5"}}
		pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}, {Type: kind, Status: status}}
		return pod
	}
	ended := condition(ConditionCaptured, corev1.ConditionTrue)
	ended.Status.Phase = corev1.PodFailed
	for _, c := range []struct {
		promise string
		pod     *corev1.Pod
		want    bool
	}{
		{"it says so", condition(ConditionCaptured, corev1.ConditionTrue), true},
		{"it says no more that it is", condition(ConditionCaptured, corev1.ConditionFalse), false},
		{"it has not said", condition(corev1.PodScheduled, corev1.ConditionTrue), false},
		{"the pod has ended", ended, false},
	} {
		stripPeer(c.pod)
		peer, err := toPeer(c.pod)
		if err != nil {
			t.Fatal(err)
		}
		if peer.Captured != c.want || peer.ServiceAccount != "back" {
			t.Errorf("%s: %+v", c.promise, peer)
		}
	}
}

// TestOnlyAPeerThatIsAnEndpointConcernsDestinations: pods come and go all the time.
func TestOnlyAPeerThatIsAnEndpointConcernsDestinations(t *testing.T) {
	s := NewStore()
	s.tables.services.set(model.Service{Namespace: "shop", Name: "back", ClusterIPs: []netip.Addr{fewAddress(1).Addr()}})
	s.tables.slices.set(model.EndpointSlice{Namespace: "shop", Name: "back-x", Service: "back", Endpoints: []model.Endpoint{{Pod: "shop/back-1"}}})
	revision := s.Revision(fewAddress(1))
	<-s.Changed()
	s.setPeer(&model.Peer{Namespace: "shop", Name: "job-1"})
	if signalled(s.Changed()) || s.Revision(fewAddress(1)) != revision {
		t.Error("a pod that is none of its endpoints is a change")
	}
	s.setPeer(&model.Peer{Namespace: "shop", Name: "back-1"})
	if !signalled(s.Changed()) || s.Revision(fewAddress(1)) == revision {
		t.Error("an endpoint is no change")
	}
	revision = s.Revision(fewAddress(1))
	s.SetCaptured(map[string][]netip.Addr{"shop/back-1": {fewAddress(5).Addr()}})
	s.SetCaptured(map[string][]netip.Addr{"shop/back-1": {fewAddress(5).Addr()}})
	if !signalled(s.Changed()) || s.Revision(fewAddress(1)) == revision || !s.view.peers[key{"shop", "back-1"}].Captured {
		t.Error("that it is captured is no change")
	}
}

// signalled reports whether a channel has a value.
func signalled(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func TestAnEndpointHasToShowWhoItIsWhereItIsCaptured(t *testing.T) {
	s := NewStore()
	s.Reach, s.Root = decide.NewReach(decide.Defaults()), "weir-system"
	at := fewAddress(1)
	s.tables.services.set(model.Service{Namespace: "shop", Name: "back", ClusterIPs: []netip.Addr{at.Addr()}, Ports: []model.ServicePort{{Port: 80, Protocol: model.TCP}}})
	s.tables.slices.set(model.EndpointSlice{Namespace: "shop", Name: "back-x", Service: "back", Ports: []model.EndpointPort{{Port: 8080, Protocol: model.TCP}},
		Endpoints: []model.Endpoint{{Address: fewAddress(2).Addr(), Ready: true, Pod: "shop/back-1"}}})
	mode := func(namespace string, mode route.PeerMode) model.PeerAuthentication {
		return model.PeerAuthentication{Namespace: namespace, Name: "p", Mode: &mode}
	}
	peer := model.Peer{Namespace: "shop", Name: "back-1", ServiceAccount: "back", Captured: true, Addresses: []netip.Addr{fewAddress(2).Addr()}}
	const id = "spiffe://cluster.local/ns/shop/sa/back"
	for _, c := range []struct {
		promise string
		change  func(*model.Peer)
		policy  model.PeerAuthentication
		want    string
	}{
		{"a captured pod", func(*model.Peer) {}, model.PeerAuthentication{}, id},
		{"one that is not", func(p *model.Peer) { p.Captured = false }, model.PeerAuthentication{}, ""},
		{"one without a service account", func(p *model.Peer) { p.ServiceAccount = "" }, model.PeerAuthentication{}, ""},
		{"the port goes past the proxy", func(p *model.Peer) { p.Ports = &model.InboundPorts{Exclude: "1-8080"} }, model.PeerAuthentication{}, ""},
		{"another does", func(p *model.Peer) { p.Ports = &model.InboundPorts{Exclude: "1-8079"} }, model.PeerAuthentication{}, id},
		{"only others go through it", func(p *model.Peer) { p.Ports = &model.InboundPorts{Include: "80"} }, model.PeerAuthentication{}, ""},
		{"what is excluded cannot be read", func(p *model.Peer) { p.Ports = &model.InboundPorts{Exclude: "http"} }, model.PeerAuthentication{}, id},
		{"its namespace expects plaintext", func(*model.Peer) {}, mode("shop", route.Disable), ""},
		{"the mesh does", func(*model.Peer) {}, mode("weir-system", route.Disable), ""},
		{"another namespace does", func(*model.Peer) {}, mode("other", route.Disable), id},
	} {
		p := peer
		c.change(&p)
		s.setPeer(&p)
		s.tables.peerAuth.replace(map[key]model.PeerAuthentication{{c.policy.Namespace, "p"}: c.policy})
		if got := told(s, at).Endpoints[0].Identity; got != c.want {
			t.Errorf("%s: %q, want %q", c.promise, got, c.want)
		}
		if got := told(s, netip.AddrPortFrom(fewAddress(2).Addr(), 8080)).Identity; got != c.want {
			t.Errorf("%s, dialled itself: %q, want %q", c.promise, got, c.want)
		}
	}
}

// TestAPeerIsWhatItsPodSays: what a source drops of a pod of another node is not what
// others have to know of it.
func TestAPeerIsWhatItsPodSays(t *testing.T) {
	pod := apiPod("web-7d4b9c6f5d-x", "u", "enabled")
	pod.OwnerReferences = []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "web-7d4b9c6f5d", Controller: new(true)}}
	pod.Labels["pod-template-hash"] = "7d4b9c6f5d"
	pod.Annotations = map[string]string{"weirmesh.io/exclude-inbound-ports": "9090", "weirmesh.io/include-inbound-ports": "80", "a": "b"}
	pod.Spec.ServiceAccountName, pod.Spec.Containers = "web", []corev1.Container{{Name: "app", Image: "app"}}
	pod.Status.PodIPs = []corev1.PodIP{{IP: "10.0.0.5"}}
	pod.Status.Conditions = []corev1.PodCondition{{Type: ConditionCaptured, Status: corev1.ConditionTrue}}
	stripPeer(pod)
	got, err := toPeer(pod)
	if err != nil {
		t.Fatal(err)
	}
	want := &model.Peer{
		Namespace: "shop", Name: "web-7d4b9c6f5d-x", ServiceAccount: "web", Workload: "web", Captured: true,
		Ports: &model.InboundPorts{Exclude: "9090", Include: "80"}, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.5")},
	}
	if diff := cmp.Diff(want, got, netipValues); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
