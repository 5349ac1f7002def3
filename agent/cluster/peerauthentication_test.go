package cluster

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weirmesh/weir/agent/api/v1alpha1"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// peerAuthCRD is what an API server judges PeerAuthentications by.
const peerAuthCRD = "../../manifests/base/crds/policy.weirmesh.io_peerauthentications.yaml"

func peerAuthDocument(spec string) string {
	return "apiVersion: policy.weirmesh.io/v1alpha1\nkind: PeerAuthentication\nmetadata: {namespace: shop, name: p}\nspec: {" + spec + "}\n"
}

// TestPeersThatAnAPIServerWouldRefuse has one mistake in each policy, and beside it the
// nearest value that is none.
func TestPeersThatAnAPIServerWouldRefuse(t *testing.T) {
	const unselected = "spec: ports are those of some pods: podSelector has to say of which"
	ports := func(list string) string { return "podSelector: {matchLabels: {app: a}}, ports: [" + list + "]" }
	many := func(n int) string {
		var out []string
		for i := range n {
			out = append(out, fmt.Sprintf("{port: %d, mode: Strict}", i+1))
		}
		return ports(strings.Join(out, ", "))
	}
	tests := []struct{ good, bad, want string }{
		{"mode: Strict", "", "spec: neither mode nor ports: it says nothing"},
		{"mode: Permissive", "podSelector: {}", "spec: neither mode nor ports: it says nothing"},
		{"mode: Disable", "mode: STRICT", "spec.mode: STRICT is none of [Permissive Strict Disable]"},
		{"mode: Strict, podSelector: {}", "mode: ''", "spec.mode:  is none of [Permissive Strict Disable]"},
		{ports("{port: 1, mode: Strict}, {port: 65535, mode: Disable}"), ports("{port: 0, mode: Strict}"), "spec.ports[0].port: 0 is not between 1 and 65535"},
		{ports("{port: 1, mode: Permissive}"), ports("{port: 65536, mode: Strict}"), "spec.ports[0].port: 65536 is not between 1 and 65535"},
		{ports("{port: 1, mode: Strict}"), ports("{port: 1}"), "spec.ports[0].mode:  is none of [Permissive Strict Disable]"},
		{ports("{port: 1, mode: Strict}"), ports("{mode: Strict}"), "spec.ports[0].port: 0 is not between 1 and 65535"},
		{ports("{port: 1, mode: Strict}, {port: 2, mode: Strict}"), ports("{port: 1, mode: Strict}, {port: 1, mode: Disable}"), "spec.ports[1]: port 1 is there already"},
		{ports("{port: 1, mode: Strict}"), "mode: Strict, " + ports(""), "spec.ports: number of ports: 0 is not between 1 and 32"},
		{many(32), many(33), "spec.ports: number of ports: 33 is not between 1 and 32"},
		{ports("{port: 1, mode: Strict}"), "ports: [{port: 1, mode: Strict}]", unselected},
		{"podSelector: {matchExpressions: [{key: a, operator: Exists}]}, ports: [{port: 1, mode: Strict}]", "mode: Strict, podSelector: {}, ports: [{port: 1, mode: Strict}]", unselected},
		{"podSelector: {matchLabels: {}, matchExpressions: [{key: a, operator: Exists}]}, ports: [{port: 1, mode: Strict}]", "podSelector: {matchLabels: {}, matchExpressions: []}, ports: [{port: 1, mode: Strict}]", unselected},
		{"mode: Strict, podSelector: {matchLabels: {app: a}}", "mode: Strict, podSelector: {matchLabels: {app: -}}", `spec.podSelector.matchLabels.app: "-" does not match`},
		{"mode: Strict", "mode: Strict, mtls: {}", `unknown field "spec.mtls"`},
	}
	var documents []string
	for _, tt := range tests {
		documents = append(documents, peerAuthDocument(tt.good), peerAuthDocument(tt.bad))
	}
	server := verdicts(t, []string{peerAuthCRD}, documents...)
	for i, tt := range tests {
		t.Run(fmt.Sprint(i)+" "+tt.want, func(t *testing.T) {
			if _, err := readDir(withFile(t, documents[2*i])); err != nil || server[2*i] != "" {
				t.Errorf("%s is refused: by the directory %v, by the API server %q", tt.good, err, server[2*i])
			}
			_, err := readDir(withFile(t, documents[2*i+1]))
			if err == nil || server[2*i+1] == "" {
				t.Fatalf("%s is taken: by the directory %v, by the API server %q", tt.bad, err, server[2*i+1])
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %s", err, tt.want)
			}
		})
	}
}

// TestPeersAreJudgedAsAnAPIServerDoes: policies that have every field, and each of their
// fields in all states that the CRD says something of.
func TestPeersAreJudgedAsAnAPIServerDoes(t *testing.T) {
	documents := []string{
		peerAuthDocument("mode: Strict"),
		peerAuthDocument("mode: Permissive, podSelector: {matchLabels: {app: a}, matchExpressions: [{key: a, operator: In, values: [b]}]}, ports: [{port: 80, mode: Strict}]"),
		peerAuthDocument("podSelector: {matchExpressions: [{key: a, operator: Exists}]}, ports: [{port: 80, mode: Strict}, {port: 81, mode: Disable}]"),
	}
	judgedAlike(t, []string{peerAuthCRD}, documents, "policy.weirmesh.io/v1alpha1 PeerAuthentication")
}

func TestTheModelOfAPeerAuthentication(t *testing.T) {
	strict := route.Strict
	v, err := readDir(withFile(t, peerAuthDocument("mode: Strict, podSelector: {matchLabels: {app: x}}, ports: [{port: 80, mode: Permissive}, {port: 81, mode: Disable}]")))
	if err != nil {
		t.Fatal(err)
	}
	want := map[key]model.PeerAuthentication{{"shop", "p"}: {
		Namespace: "shop", Name: "p", Mode: &strict,
		Selector: model.Selector{{Key: "app", Operator: model.In, Values: []string{"x"}}},
		Ports:    map[uint16]route.PeerMode{80: route.Permissive, 81: route.Disable},
	}}
	if diff := cmp.Diff(want, v.peerAuth); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// apiPeerAuth is a policy for pods with a label app, a minute old for each of its age.
func apiPeerAuth(name, app string, age int, mode v1alpha1.PeerMode) *v1alpha1.PeerAuthentication {
	p := &v1alpha1.PeerAuthentication{ObjectMeta: meta("shop", name), Spec: v1alpha1.PeerAuthenticationSpec{Mode: &mode}}
	p.CreationTimestamp = metav1.NewTime(time.Date(2030, 1, 1, 0, -age, 0, 0, time.UTC))
	p.Generation = 3
	p.Spec.PodSelector = &v1alpha1.PodSelector{MatchLabels: map[string]v1alpha1.LabelValue{"app": v1alpha1.LabelValue(app)}}
	p.Spec.Ports = []v1alpha1.PeerPort{{Port: 80, Mode: mode}, {Port: 81, Mode: v1alpha1.Permissive}}
	return p
}

// demanded is what is of the callers of shop/front.
func demanded(s *Store, uid string, labels map[string]string) string {
	mode, byPort, governing := s.Peers("shop", "front", uid, labels)
	return fmt.Sprint(mode, byPort, governing)
}

const (
	nothingDemanded = "0 map[] []"
	strictDemanded  = "1 map[81:0] [{PeerAuthentication/shop/p  3}]"
)

// TestPeersThatCannotBeReadAreStrict: what the CRD should not have let pass.
func TestPeersThatCannotBeReadAreStrict(t *testing.T) {
	for want, spoil := range map[string]func(*v1alpha1.PeerAuthenticationSpec){
		"spec.ports[1].port: 0 is not between 1 and 65535":               func(s *v1alpha1.PeerAuthenticationSpec) { s.Ports[1].Port = 0 },
		"spec.ports[0].mode: Off is none of [Permissive Strict Disable]": func(s *v1alpha1.PeerAuthenticationSpec) { s.Ports[0].Mode = "Off" },
	} {
		p := apiPeerAuth("p", "x", 0, v1alpha1.Permissive)
		spoil(&p.Spec)
		if _, err := PeerAuthentication(p); err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
		s := NewStore()
		if err := peerAuthSink(s).set(p); err != nil {
			t.Error(err)
		}
		const closed = "1 map[] [{PeerAuthentication/shop/p  3}]"
		if got := demanded(s, "", map[string]string{"app": "x"}); got != closed {
			t.Errorf("%s: %s, want %s", want, got, closed)
		}
		if got := demanded(s, "", map[string]string{"app": "y"}); got != nothingDemanded {
			t.Errorf("%s: of others %s", want, got)
		}
	}
}

func TestPeersAreFollowedAndForgotten(t *testing.T) {
	s := NewStore()
	labels := map[string]string{"app": "x"}
	changes := s.changes.Load()
	changed := func(want bool) {
		t.Helper()
		if now := s.changes.Load(); (now != changes) != want {
			t.Errorf("it is told: %t", !want)
		}
		changes = s.changes.Load()
	}
	is := func(want string) {
		t.Helper()
		if got := demanded(s, "", labels); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	sink := peerAuthSink(s)
	is(nothingDemanded)
	_ = sink.set(apiPeerAuth("p", "x", 0, v1alpha1.Strict))
	changed(true)
	is(strictDemanded)
	_ = sink.set(apiPeerAuth("p", "x", 0, v1alpha1.Strict))
	changed(false)
	if diff := cmp.Diff(map[string]int64{"PeerAuthentication/shop/p": 3}, s.Known()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	sink.replace([]*v1alpha1.PeerAuthentication{apiPeerAuth("q", "x", 0, v1alpha1.Disable)}, nil)
	changed(true)
	is("2 map[81:0] [{PeerAuthentication/shop/q  3}]")
	sink.drop(key{"shop", "q"})
	changed(true)
	is(nothingDemanded)
}

// TestPeersAreDemandedByAPodsLabels: those that it has, or had when it was captured.
func TestPeersAreDemandedByAPodsLabels(t *testing.T) {
	s := NewStore()
	s.tables.peerAuth.set(must(PeerAuthentication(apiPeerAuth("p", "x", 0, v1alpha1.Strict))))
	front := apiPod("front", "u-1", "enabled")
	s.setPod(must(toCompactPod(front)))
	for _, tt := range []struct {
		promise, uid string
		labels       map[string]string
		want         string
	}{
		{"by its own", "u-1", map[string]string{}, strictDemanded},
		{"another pod of its name, by what it had", "u-2", map[string]string{"app": "y"}, nothingDemanded},
		{"of which nothing is known, whatever is Strict", "u-2", nil, "1 map[] [{PeerAuthentication/shop/p  3}]"},
	} {
		if got := demanded(s, tt.uid, tt.labels); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.promise, got, tt.want)
		}
	}
}

func TestPeersOfTheWholeMeshAreThoseOfItsOwnNamespace(t *testing.T) {
	mode := v1alpha1.Strict
	p := &v1alpha1.PeerAuthentication{ObjectMeta: meta("weir", "p"), Spec: v1alpha1.PeerAuthenticationSpec{Mode: &mode}}
	s := NewStore()
	s.tables.peerAuth.set(must(PeerAuthentication(p)))
	if got := demanded(s, "", map[string]string{}); got != nothingDemanded {
		t.Errorf("of another namespace: %s", got)
	}
	s.Root = "weir"
	if got := demanded(s, "", map[string]string{}); got != "1 map[] [{PeerAuthentication/weir/p  0}]" {
		t.Error(got)
	}
}

func TestPeersAreKeptForAnotherAgent(t *testing.T) {
	s := NewStore()
	s.tables.peerAuth.set(must(PeerAuthentication(apiPeerAuth("p", "x", 0, v1alpha1.Strict))))
	lastGood := LastGood{Path: t.TempDir() + "/last-good.gz", Version: "v1"}
	if err := lastGood.save(s.copy()); err != nil {
		t.Fatal(err)
	}
	after, log := NewStore(), &logBuffer{}
	lastGood.restore(after, log.logger())
	if diff := cmp.Diff(s.view.peerAuth, after.view.peerAuth); diff != "" {
		t.Errorf("-before +after:\n%s; log %s", diff, log)
	}
	listed := NewStore()
	listed.tables.peerAuth.replace(map[key]model.PeerAuthentication{})
	lastGood.restore(listed, log.logger())
	if len(listed.view.peerAuth) != 0 {
		t.Error("what the server has listed is not taken from the file")
	}
}

func TestStrippedPeersKeepTheirSpec(t *testing.T) {
	sameAfter(t, apiPeerAuth("p", "x", 0, v1alpha1.Strict), func(p *v1alpha1.PeerAuthentication) { dropManagedFields(p) }, PeerAuthentication)
}
