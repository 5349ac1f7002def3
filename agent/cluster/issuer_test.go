package cluster

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"github.com/weirmesh/weir/agent/model"
)

// aCertificate is self-signed, in PEM.
func aCertificate(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// signing is a fake API server that names requests, and a signer that answers each a
// second after it was made.
type signing struct {
	*fake.Clientset
	answer func(*certificatesv1.CertificateSigningRequest)
}

func newSigning(t *testing.T, answer func(*certificatesv1.CertificateSigningRequest)) *signing {
	t.Helper()
	s := &signing{Clientset: fake.NewClientset(), answer: answer}
	n := 0
	s.PrependReactor("create", "certificatesigningrequests", func(a k8stesting.Action) (bool, runtime.Object, error) {
		r := a.(k8stesting.CreateAction).GetObject().(*certificatesv1.CertificateSigningRequest)
		n++
		r.Name = fmt.Sprint(r.GenerateName, n)
		time.AfterFunc(time.Second, func() {
			r := r.DeepCopy()
			answer(r)
			if err := s.Tracker().Update(certificatesv1.SchemeGroupVersion.WithResource("certificatesigningrequests"), r, ""); err != nil {
				t.Error(err)
			}
		})
		return false, nil, nil
	})
	return s
}

// issuer is n1's, with a Store of these pods.
func (s *signing) issuer(pods ...*corev1.Pod) (*Issuer, *Store, *logBuffer) {
	store := NewStore()
	for _, p := range pods {
		store.setPod(must(toCompactPod(p)))
	}
	api, log := newAPI(s.Clientset)
	return api.NewIssuer(store, 24*time.Hour), store, log
}

func (s *signing) made(t *testing.T) []certificatesv1.CertificateSigningRequest {
	t.Helper()
	list, err := s.CertificatesV1().CertificateSigningRequests().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return list.Items
}

var front = model.Pod{Namespace: "shop", Name: "front", UID: "u-1"}

func approved(certificate []byte) func(*certificatesv1.CertificateSigningRequest) {
	return func(r *certificatesv1.CertificateSigningRequest) { r.Status.Certificate = certificate }
}

func denied(kind certificatesv1.RequestConditionType) func(*certificatesv1.CertificateSigningRequest) {
	return func(r *certificatesv1.CertificateSigningRequest) {
		r.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{
			{Type: kind, Status: corev1.ConditionTrue, Reason: "OtherNode", Message: "pod shop/front runs on node n2"},
		}
	}
}

func TestACertificateIsAskedForOnceThePodIsPublished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		leaf, ca := aCertificate(t), aCertificate(t)
		s := newSigning(t, approved(append(leaf, ca...)))
		i, store, log := s.issuer(apiPod("front", "u-1", "enabled"))
		var chain [][]byte
		var err error
		done := make(chan struct{})
		go func() {
			defer close(done)
			chain, err = i.Issue(t.Context(), front, []byte("a request"))
		}()
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := len(s.made(t)); n != 0 {
			t.Fatalf("%d requests for a pod that is not published", n)
		}
		store.setPod(must(toCompactPod(saying(apiPod("front", "u-1", "enabled"), corev1.ConditionTrue))))
		<-done
		var want [][]byte
		for _, b := range [][]byte{leaf, ca} {
			block, _ := pem.Decode(b)
			want = append(want, block.Bytes)
		}
		if diff := cmp.Diff(want, chain); err != nil || diff != "" {
			t.Errorf("%v; chain (-want +got):\n%s", err, diff)
		}
		r := s.made(t)[0]
		block, _ := pem.Decode(r.Spec.Request)
		if string(block.Bytes) != "a request" || r.Spec.SignerName != "weirmesh.io/workload" || *r.Spec.ExpirationSeconds != 86400 || r.GenerateName != "weir-" {
			t.Errorf("the request: %+v", r)
		}
		if got := fmt.Sprint(r.Spec.Usages); got != "[digital signature client auth server auth]" {
			t.Errorf("usages: %s", got)
		}
		if got, err := ParseSubject(r.Annotations); err != nil || got != (Subject{"shop", "front", "u-1"}) {
			t.Errorf("annotations: %v, %v", r.Annotations, err)
		}
		if log.String() != "" {
			t.Errorf("log %s", log)
		}
	})
}

func TestAPodOfTheSameNameIsNotThePodThatIsPublished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSigning(t, approved(nil))
		i, _, _ := s.issuer(saying(apiPod("front", "u-0", "enabled"), corev1.ConditionTrue))
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err := i.Issue(ctx, front, nil)
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "pod shop/front is not published as captured") || len(s.made(t)) > 0 {
			t.Errorf("%v; %d requests", err, len(s.made(t)))
		}
	})
}

func TestADenialIsToldWithItsReason(t *testing.T) {
	for _, kind := range []certificatesv1.RequestConditionType{certificatesv1.CertificateDenied, certificatesv1.CertificateFailed} {
		synctest.Test(t, func(t *testing.T) {
			s := newSigning(t, denied(kind))
			i, _, _ := s.issuer(saying(apiPod("front", "u-1", "enabled"), corev1.ConditionTrue))
			_, err := i.Issue(t.Context(), front, nil)
			var refused *DeniedError
			if !errors.As(err, &refused) || *refused != (DeniedError{"OtherNode", "pod shop/front runs on node n2"}) {
				t.Errorf("%s: %v", kind, err)
			}
		})
	}
}

func TestAnAnswerIsWaitedForWhileAnybodyIsAway(t *testing.T) {
	for _, tt := range []struct{ name, verb string }{
		{"the API server, when it is asked", "create"},
		{"the API server, when it is looked for the answer", "get"},
		{"the signer", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				var s *signing
				s = newSigning(t, approved(aCertificate(t)))
				if tt.verb == "" {
					s = newSigning(t, func(*certificatesv1.CertificateSigningRequest) {})
				} else {
					s.PrependReactor(tt.verb, "certificatesigningrequests", func(k8stesting.Action) (bool, runtime.Object, error) {
						return time.Since(began) < time.Minute, nil, errors.New("connect: connection refused")
					})
				}
				i, _, log := s.issuer(saying(apiPod("front", "u-1", "enabled"), corev1.ConditionTrue))
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				_, err := i.Issue(ctx, front, nil)
				if !errors.Is(err, context.DeadlineExceeded) || tt.verb != "" && !strings.Contains(err.Error(), "connection refused") {
					t.Errorf("after 10 s: %v", err)
				}
				if tt.verb == "" {
					if !strings.Contains(err.Error(), "request weir-1 is not answered: weir-controller does") {
						t.Errorf("got %v", err)
					}
					return
				}
				chain, err := i.Issue(t.Context(), front, nil)
				if err != nil || len(chain) != 1 || time.Since(began) > time.Minute+2*lastPoll {
					t.Errorf("%d certificates, %v, after %s", len(chain), err, time.Since(began))
				}
				want := map[string]int{"create": 1, "get": 2}[tt.verb] // the second request is made before that
				if n := strings.Count(log.String(), "API server does not answer"); n != want {
					t.Errorf("logged %d times, want %d:\n%s", n, want, log)
				}
			})
		})
	}
}

func TestWhatCannotBeAnsweredIsNotWaitedFor(t *testing.T) {
	for _, tt := range []struct {
		name, verb string
		err        error
		answer     func(*certificatesv1.CertificateSigningRequest)
		want       string
	}{
		{"a request that is none", "create", apierrors.NewInvalid(certificatesv1.Kind("CertificateSigningRequest"), "", nil), nil, "request a certificate: "},
		{"a request that somebody deletes", "get", apierrors.NewNotFound(certificatesv1.Resource("certificatesigningrequests"), "weir-1"), nil, "request weir-1 was deleted"},
		{"an answer that is none", "", nil, approved([]byte("x")), "request weir-1: status.certificate: there is no certificate, in PEM"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				if tt.answer == nil {
					tt.answer = approved(aCertificate(t))
				}
				s := newSigning(t, tt.answer)
				if tt.verb != "" {
					s.PrependReactor(tt.verb, "certificatesigningrequests", func(k8stesting.Action) (bool, runtime.Object, error) { return true, nil, tt.err })
				}
				i, _, _ := s.issuer(saying(apiPod("front", "u-1", "enabled"), corev1.ConditionTrue))
				if _, err := i.Issue(t.Context(), front, nil); err == nil || !strings.HasPrefix(err.Error(), tt.want) {
					t.Errorf("got %v, want %s", err, tt.want)
				}
				time.Sleep(2 * time.Second)
			})
		})
	}
}

func TestASubjectIsReadBackOrRefused(t *testing.T) {
	want := Subject{"shop", "front", "u-1"}
	if got, err := ParseSubject(want.Annotations()); err != nil || got != want {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []Subject{{}, {"", "front", "u-1"}, {"shop", "", "u-1"}, {"shop", "front", ""}, {"shop", "a/b", "u-1"}} {
		if got, err := ParseSubject(bad.Annotations()); err == nil {
			t.Errorf("%v is %v", bad, got)
		}
	}
}
