package controller

import (
	"crypto/elliptic"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"github.com/weirmesh/weir/agent/cluster"
	"github.com/weirmesh/weir/agent/identity"
	"github.com/weirmesh/weir/agent/identity/identitytest"
)

var domain = spiffeid.RequireTrustDomainFromString("cluster.local")

const frontID = "spiffe://cluster.local/ns/shop/sa/front"

// front runs, captured, on n1.
func front() *corev1.Pod {
	p := &corev1.Pod{}
	p.Namespace, p.Name, p.UID = "shop", "front-1", "u-1"
	p.Spec.NodeName, p.Spec.ServiceAccountName = "n1", "front"
	p.Status.Phase = corev1.PodRunning
	p.Status.Conditions = []corev1.PodCondition{{Type: cluster.ConditionCaptured, Status: corev1.ConditionTrue}}
	return p
}

// csr is what a proxy makes, in PEM, with names.
func csr(t *testing.T, template x509.CertificateRequest) []byte {
	t.Helper()
	return csrOn(t, elliptic.P256(), template)
}

// csrOn is csr with a key of that curve.
func csrOn(t *testing.T, curve elliptic.Curve, template x509.CertificateRequest) []byte {
	t.Helper()
	der := identitytest.Request(t, identitytest.Key(t, curve), template)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func named(uris ...string) x509.CertificateRequest {
	return x509.CertificateRequest{URIs: identitytest.URIs(uris...)}
}

// aRequest is that of n1's agent for front.
func aRequest(t *testing.T, name string) *certificatesv1.CertificateSigningRequest {
	t.Helper()
	r := &certificatesv1.CertificateSigningRequest{}
	r.Name = name
	r.Annotations = cluster.Subject{Namespace: "shop", Name: "front-1", UID: "u-1"}.Annotations()
	r.Spec = certificatesv1.CertificateSigningRequestSpec{
		SignerName: cluster.SignerName, Username: "system:serviceaccount:weir-system:weir-agent",
		Extra:   map[string]certificatesv1.ExtraValue{extraNode: {"n1"}},
		Usages:  []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageClientAuth, certificatesv1.UsageServerAuth},
		Request: csr(t, named(frontID)),
	}
	return r
}

type (
	request = certificatesv1.CertificateSigningRequest
	pod     = corev1.Pod
)

// applications are what may be asked for, and what may not; each of those differs in one
// thing from the first.
var applications = []struct {
	name    string
	request func(*testing.T, *request)
	pod     func(*pod)
	want    string // the reason for which it is denied; "": it is signed
	says    string // part of the message
}{
	{name: "a captured pod of the agent's node"},
	{name: "without a name: the pod's is given", request: func(t *testing.T, r *request) { r.Spec.Request = csr(t, named()) }},
	{name: "a pod that is starting", pod: func(p *pod) { p.Status.Phase = corev1.PodPending }},
	{name: "usages in another order, one twice", request: func(_ *testing.T, r *request) {
		r.Spec.Usages = append([]certificatesv1.KeyUsage{certificatesv1.UsageServerAuth}, r.Spec.Usages...)
	}},
	{"another account", func(_ *testing.T, r *request) { r.Spec.Username = "system:serviceaccount:weir-system:weir-controller" }, nil, reasonNotAnAgent, "weir-controller asks"},
	{"the account of that name in another namespace", func(_ *testing.T, r *request) { r.Spec.Username = "system:serviceaccount:shop:weir-agent" }, nil, reasonNotAnAgent, "shop:weir-agent asks"},
	{"a token that is bound to no node", func(_ *testing.T, r *request) { r.Spec.Extra = nil }, nil, reasonNotAnAgent, "bound to no node"},
	{"two nodes", func(_ *testing.T, r *request) { r.Spec.Extra[extraNode] = []string{"n1", "n2"} }, nil, reasonNotAnAgent, "bound to no node"},
	{"no usage for servers", func(_ *testing.T, r *request) { r.Spec.Usages = r.Spec.Usages[:2] }, nil, reasonOtherUsages, "must be"},
	{"a usage more", func(_ *testing.T, r *request) { r.Spec.Usages = append(r.Spec.Usages, certificatesv1.UsageCertSign) }, nil, reasonOtherUsages, "cert sign"},
	{"no pod named", func(_ *testing.T, r *request) { r.Annotations = nil }, nil, reasonPodNotNamed, "weirmesh.io/pod-uid"},
	{"no UID named", func(_ *testing.T, r *request) { delete(r.Annotations, "weirmesh.io/pod-uid") }, nil, reasonPodNotNamed, "weirmesh.io/pod-uid"},
	{"a pod that is not there", func(_ *testing.T, r *request) { r.Annotations["weirmesh.io/pod"] = "shop/front-2" }, nil, reasonPodGone, "there is no pod shop/front-2"},
	{"the pod before it of that name", func(_ *testing.T, r *request) { r.Annotations["weirmesh.io/pod-uid"] = "u-0" }, nil, reasonPodGone, "has the UID u-1 by now"},
	{"a pod that has succeeded", nil, func(p *pod) { p.Status.Phase = corev1.PodSucceeded }, reasonPodGone, "it is Succeeded"},
	{"a pod that has failed", nil, func(p *pod) { p.Status.Phase = corev1.PodFailed }, reasonPodGone, "it is Failed"},
	{"a pod that is leaving", nil, func(p *pod) { p.DeletionTimestamp = new(metav1.NewTime(noon)); p.Finalizers = []string{"x/y"} }, reasonPodGone, "being deleted"},
	{"another node's pod", nil, func(p *pod) { p.Spec.NodeName = "n2" }, reasonOtherNode, `runs on node "n2", and the agent of node "n1" asks`},
	{"another node's agent", func(_ *testing.T, r *request) { r.Spec.Extra[extraNode] = []string{"n2"} }, nil, reasonOtherNode, `runs on node "n1", and the agent of node "n2" asks`},
	{"a pod that no node has", nil, func(p *pod) { p.Spec.NodeName = "" }, reasonOtherNode, `runs on node ""`},
	{"a static pod", nil, func(p *pod) { p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "h"} }, reasonNoServiceAccount, "no identity"},
	{"no service account", nil, func(p *pod) { p.Spec.ServiceAccountName = "" }, reasonNoServiceAccount, "no identity"},
	{"the host's network", nil, func(p *pod) { p.Spec.HostNetwork = true }, reasonPodNotCaptured, "host's network"},
	{"a pod that is not captured", nil, func(p *pod) { p.Status.Conditions = nil }, reasonPodNotCaptured, "no condition weirmesh.io/Captured=True"},
	{"a pod that is no longer captured", nil, func(p *pod) { p.Status.Conditions[0].Status = corev1.ConditionFalse }, reasonPodNotCaptured, "no condition weirmesh.io/Captured=True"},
	{"another service account", func(t *testing.T, r *request) {
		r.Spec.Request = csr(t, named("spiffe://cluster.local/ns/shop/sa/admin"))
	}, nil, reasonOtherIdentity, "sa/admin"},
	{"another namespace", func(t *testing.T, r *request) {
		r.Spec.Request = csr(t, named("spiffe://cluster.local/ns/bank/sa/front"))
	}, nil, reasonOtherIdentity, "ns/bank"},
	{"another trust domain", func(t *testing.T, r *request) {
		r.Spec.Request = csr(t, named("spiffe://cluster.evil/ns/shop/sa/front"))
	}, nil, reasonWrongTrustDomain, "the trust domain is cluster.local"},
	{"a second ID", func(t *testing.T, r *request) {
		r.Spec.Request = csr(t, named(frontID, "spiffe://cluster.local/ns/shop/sa/admin"))
	}, nil, reasonExtraNames, "sa/admin"},
	{"a DNS name", func(t *testing.T, r *request) {
		template := named(frontID)
		template.DNSNames = []string{"front.shop"}
		r.Spec.Request = csr(t, template)
	}, nil, reasonExtraNames, "front.shop"},
	{"a key of another curve", func(t *testing.T, r *request) {
		r.Spec.Request = csrOn(t, elliptic.P384(), named())
	}, nil, reasonOtherKey, "P-384"},
	{"another's key: the signature is not its own", func(_ *testing.T, r *request) {
		block, _ := pem.Decode(r.Spec.Request)
		block.Bytes[len(block.Bytes)-1] ^= 1
		r.Spec.Request = pem.EncodeToMemory(block)
	}, nil, reasonMalformed, "not signed by the key"},
	{"no PEM", func(_ *testing.T, r *request) { r.Spec.Request = []byte("x") }, nil, reasonMalformed, "spec.request"},
	{"something after it", func(_ *testing.T, r *request) { r.Spec.Request = append(r.Spec.Request, r.Spec.Request...) }, nil, reasonMalformed, "spec.request"},
}

// newSigner has a CA of its own.
func newSigner(t *testing.T, client *fake.Clientset) (*signer, map[string]int) {
	t.Helper()
	ca, err := identity.NewAuthority(domain, time.Now(), identity.RootLifetime)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	counts := map[string]int{}
	return &signer{
		client: client, agent: "system:serviceaccount:weir-system:weir-agent", domain: domain, ttl: mostTTL,
		authority: func() *identity.Authority { return ca },
		count: func(result string) {
			mu.Lock()
			defer mu.Unlock()
			counts[result]++
		},
		log: slog.New(slog.DiscardHandler),
	}, counts
}

// found is a request as the API server has it.
func found(t *testing.T, client *fake.Clientset, name string) *request {
	t.Helper()
	r, err := client.CertificatesV1().CertificateSigningRequests().Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// conditions are "Type=Reason", in their order.
func conditions(r *request) string {
	var out []string
	for _, c := range r.Status.Conditions {
		out = append(out, string(c.Type)+"="+c.Reason)
	}
	return strings.Join(out, " ")
}

// leaf is the certificate that a request was answered with; nil: none.
func leaf(t *testing.T, r *request) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(r.Status.Certificate)
	if block == nil {
		return nil
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestCertificatesAreForCapturedPodsOfTheAgentsNode(t *testing.T) {
	for _, tt := range applications {
		t.Run(tt.name, func(t *testing.T) {
			r, p := aRequest(t, "weir-1"), front()
			if tt.request != nil {
				tt.request(t, r)
			}
			if tt.pod != nil {
				tt.pod(p)
			}
			client := fake.NewClientset(r, p)
			s, counts := newSigner(t, client)
			if err := s.answer(t.Context(), found(t, client, "weir-1")); err != nil {
				t.Fatal(err)
			}
			got := found(t, client, "weir-1")
			want, result := "Approved=PodCaptured", resultSigned
			if tt.want != "" {
				want, result = "Denied="+tt.want, tt.want
			}
			if conditions(got) != want || !strings.Contains(got.Status.Conditions[0].Message, tt.says) {
				t.Errorf("got %s, want %s with %q:\n%s", conditions(got), want, tt.says, got.Status.Conditions[0].Message)
			}
			if diff := cmp.Diff(map[string]int{result: 1}, counts); diff != "" {
				t.Errorf("counted (-want +got):\n%s", diff)
			}
			certificate := leaf(t, got)
			if (certificate != nil) != (tt.want == "") {
				t.Fatalf("signed: %v", certificate != nil)
			}
			if certificate == nil {
				return
			}
			if len(certificate.URIs) != 1 || certificate.URIs[0].String() != frontID || certificate.CheckSignatureFrom(s.authority().Root()) != nil {
				t.Errorf("%v of %v", certificate.URIs, certificate.Issuer)
			}
		})
	}
}

func TestACertificateIsGoodForAsLongAsIsAskedForWithinBounds(t *testing.T) {
	for _, tt := range []struct {
		asked *int32
		most  time.Duration
		want  time.Duration
	}{
		{nil, mostTTL, 24 * time.Hour}, {new(int32(3600)), mostTTL, time.Hour}, {new(int32(60)), mostTTL, 10 * time.Minute},
		{new(int32(1 << 30)), mostTTL, 24 * time.Hour}, {new(int32(-1)), mostTTL, 10 * time.Minute},
		{nil, time.Hour, time.Hour}, {new(int32(3600)), time.Minute, time.Minute},
	} {
		r := aRequest(t, "weir-1")
		r.Spec.ExpirationSeconds = tt.asked
		client := fake.NewClientset(r, front())
		s, _ := newSigner(t, client)
		s.ttl = tt.most
		before := time.Now()
		if err := s.answer(t.Context(), found(t, client, "weir-1")); err != nil {
			t.Fatal(err)
		}
		got := leaf(t, found(t, client, "weir-1")).NotAfter.Sub(before)
		if got < tt.want-2*time.Second || got > tt.want+time.Minute {
			t.Errorf("%v: good for %s, not %s", tt.asked, got, tt.want)
		}
	}
}

// TestWhatSomebodyElseApprovedIsCheckedToo: an administrator's word makes no node of
// another.
func TestWhatSomebodyElseApprovedIsCheckedToo(t *testing.T) {
	for _, tt := range []struct{ node, want string }{
		{"n1", "Approved=KubectlApprove"},
		{"n2", "Approved=KubectlApprove Failed=OtherNode"},
	} {
		r, p := aRequest(t, "weir-1"), front()
		say(r, certificatesv1.CertificateApproved, "KubectlApprove", "")
		p.Spec.NodeName = tt.node
		client := fake.NewClientset(r, p)
		s, _ := newSigner(t, client)
		if err := s.answer(t.Context(), found(t, client, "weir-1")); err != nil {
			t.Fatal(err)
		}
		got := found(t, client, "weir-1")
		if conditions(got) != tt.want || (leaf(t, got) != nil) != (tt.node == "n1") {
			t.Errorf("a pod of %s: %s, signed %v", tt.node, conditions(got), leaf(t, got) != nil)
		}
	}
}

// runSigner runs it until the bubble's end.
func runSigner(t *testing.T, s *signer) {
	t.Helper()
	done := make(chan struct{})
	ctx := t.Context()
	go func() { defer close(done); s.run(ctx) }()
	t.Cleanup(func() { <-done })
}

func TestRequestsAreAnsweredAsTheyCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		foreign, denied := aRequest(t, "foreign"), aRequest(t, "denied")
		foreign.Spec.SignerName = "example.com/other"
		say(denied, certificatesv1.CertificateDenied, "Admin", "")
		client := fake.NewClientset(front(), foreign, denied, aRequest(t, "weir-0"))
		s, counts := newSigner(t, client)
		runSigner(t, s)
		for _, name := range []string{"weir-1", "weir-2", "weir-3"} {
			check(t)(client.CertificatesV1().CertificateSigningRequests().Create(t.Context(), aRequest(t, name), metav1.CreateOptions{}))
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		got := map[string]string{}
		for _, name := range []string{"foreign", "denied", "weir-0", "weir-1", "weir-2", "weir-3"} {
			got[name] = conditions(found(t, client, name))
		}
		want := map[string]string{"foreign": "", "denied": "Denied=Admin"}
		for _, name := range []string{"weir-0", "weir-1", "weir-2", "weir-3"} {
			want[name] = "Approved=PodCaptured"
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if diff := cmp.Diff(map[string]int{resultSigned: 4}, maps.Clone(counts)); diff != "" {
			t.Errorf("each is answered once (-want +got):\n%s", diff)
		}
	})
}

func TestARequestThatCannotBeAnsweredIsTriedAgain(t *testing.T) {
	for _, tt := range []struct {
		name, verb, resource string
		err                  error
		counted              int
	}{
		{"the pod is not told", "get", "pods", errors.New("etcdserver: request timed out"), 1},
		{"it is another by now", "update", "certificatesigningrequests", apierrors.NewConflict(schema.GroupResource{Resource: "certificatesigningrequests"}, "weir-1", errors.New("changed")), 0},
		{"it cannot be written", "update", "certificatesigningrequests", errors.New("etcdserver: request timed out"), 1},
		{"nothing is there to sign with", "", "", nil, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client := fake.NewClientset(front(), aRequest(t, "weir-1"))
				s, counts := newSigner(t, client)
				failures := 1
				if tt.err == nil {
					ca := s.authority()
					s.authority = func() *identity.Authority {
						if failures--; failures >= 0 {
							return nil
						}
						return ca
					}
				} else {
					client.PrependReactor(tt.verb, tt.resource, func(k8stesting.Action) (bool, runtime.Object, error) {
						failures--
						return failures >= 0, nil, tt.err
					})
				}
				runSigner(t, s)
				time.Sleep(time.Second)
				synctest.Wait()
				got := found(t, client, "weir-1")
				if leaf(t, got) == nil || conditions(got) != "Approved=PodCaptured" || counts[resultError] != tt.counted {
					t.Errorf("%s, signed %v, counted %v", conditions(got), leaf(t, got) != nil, counts)
				}
			})
		})
	}
}

// TestTheLeaderSignsAndTheNextWithTheSameCA has one replica sign, and the other when it
// has ended.
func TestTheLeaderSignsAndTheNextWithTheSameCA(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset(front())
		a := startReplica(t, client, "a")
		time.Sleep(time.Second)
		b := startReplica(t, client, "b")
		signed := func(name string) *x509.Certificate {
			t.Helper()
			check(t)(client.CertificatesV1().CertificateSigningRequests().Create(t.Context(), aRequest(t, name), metav1.CreateOptions{}))
			time.Sleep(handOver + time.Second)
			synctest.Wait()
			c := leaf(t, found(t, client, name))
			if c == nil {
				t.Fatalf("%s is not signed:\n%s\n%s", name, a.log, b.log)
			}
			return c
		}
		first := signed("weir-1")
		bundle, err := client.CertificatesV1().ClusterTrustBundles().Get(t.Context(), cluster.RootsBundle, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM([]byte(bundle.Spec.TrustBundle))
		a.stop()
		for name, c := range map[string]*x509.Certificate{"a": first, "b": signed("weir-2")} {
			if _, err := c.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: time.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
				t.Errorf("signed by %s: %v", name, err)
			}
		}
		if strings.Contains(b.log.String(), "CA made") || !strings.Contains(b.log.String(), "certificate signed") {
			t.Errorf("b:\n%s", b.log)
		}
	})
}
