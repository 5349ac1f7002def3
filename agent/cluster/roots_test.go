package cluster

import (
	"encoding/pem"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"
)

func configMap(text string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: meta("weir-system", RootsConfigMap), Data: map[string]string{RootsKey: text}}
}

func bundle(text string) *certificatesv1.ClusterTrustBundle {
	return &certificatesv1.ClusterTrustBundle{ObjectMeta: meta("", RootsBundle), Spec: certificatesv1.ClusterTrustBundleSpec{SignerName: SignerName, TrustBundle: text}}
}

// bundles is a fake API server that serves ClusterTrustBundles in some versions.
type bundles struct {
	*fake.Clientset
	mu      sync.Mutex
	served  string // "v1", "v1beta1", or none
	streams []watch.Interface
}

func newBundles(served string, objects ...runtime.Object) *bundles {
	b := &bundles{Clientset: fake.NewClientset(objects...), served: served}
	b.PrependReactor("list", "clustertrustbundles", func(a k8stesting.Action) (bool, runtime.Object, error) {
		return !b.serves(a), nil, apierrors.NewNotFound(a.GetResource().GroupResource(), "")
	})
	b.PrependWatchReactor("clustertrustbundles", func(a k8stesting.Action) (bool, watch.Interface, error) {
		if !b.serves(a) {
			return true, nil, apierrors.NewNotFound(a.GetResource().GroupResource(), "")
		}
		stream, err := b.Tracker().Watch(a.GetResource(), a.GetNamespace())
		b.mu.Lock()
		defer b.mu.Unlock()
		b.streams = append(b.streams, stream)
		return true, stream, err
	})
	return b
}

func (b *bundles) serves(a k8stesting.Action) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return a.GetResource().Version == b.served
}

func (b *bundles) serve(version string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.served = version
	for _, s := range b.streams {
		s.Stop()
	}
	b.streams = nil
}

// following runs Roots. What it returns says which of the texts they are, once nothing is
// under way, and how often they were told of.
func following(t *testing.T, b *bundles, texts map[string]string) (func() string, *atomic.Int32, *logBuffer) {
	t.Helper()
	api, log := newAPI(b.Clientset)
	r := api.NewRoots("weir-system")
	var told atomic.Int32
	r.Changed = func() { told.Add(1) }
	background(t, r.Run)
	return func() string {
		time.Sleep(2 * lastLook)
		synctest.Wait()
		var text strings.Builder
		for _, c := range r.List() {
			if err := pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}); err != nil {
				t.Fatal(err)
			}
		}
		for name, want := range texts {
			if text.String() == want {
				return name
			}
		}
		return text.String()
	}, &told, log
}

func TestRootsAreThoseOfTheBundleElseOfTheConfigMap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one, two, three := string(aCertificate(t)), string(aCertificate(t)), string(aCertificate(t))
		texts := map[string]string{"one": one, "one and two": one + two, "three": three, "none": ""}
		b := newBundles("")
		now, told, log := following(t, b, texts)
		maps, v1 := b.CoreV1().ConfigMaps("weir-system"), b.CertificatesV1().ClusterTrustBundles()
		ctx := t.Context()
		expect := func(what, want string, times int32) {
			t.Helper()
			if got := now(); got != want || told.Load() != times {
				t.Errorf("%s: %s, want %s; told %d times, want %d", what, got, want, told.Load(), times)
			}
		}
		expect("before there are any", "none", 0)
		other := configMap(three)
		other.Name = "other"
		check(t)(maps.Create(ctx, other, metav1.CreateOptions{}))
		expect("another ConfigMap", "none", 0)
		check(t)(maps.Create(ctx, configMap(one), metav1.CreateOptions{}))
		expect("no bundles are served", "one", 1)
		check(t)(maps.Update(ctx, configMap(one+two), metav1.UpdateOptions{}))
		expect("a rotation", "one and two", 2)
		check(t)(maps.Update(ctx, configMap("damaged"), metav1.UpdateOptions{}))
		expect("it is damaged", "one and two", 2)
		if want := "there is no certificate, in PEM"; strings.Count(log.String(), want) != 1 {
			t.Errorf("not once in the log: %s\n%s", want, log)
		}
		if err := maps.Delete(ctx, RootsConfigMap, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		expect("it is gone", "one and two", 2)
		check(t)(maps.Create(ctx, configMap(one), metav1.CreateOptions{}))
		expect("it is back", "one", 3)
		b.serve("v1")
		expect("bundles are served, and ours is not there", "one", 3)
		check(t)(v1.Create(ctx, bundle(three), metav1.CreateOptions{}))
		expect("it is", "three", 4)
		check(t)(maps.Update(ctx, configMap(one+two), metav1.UpdateOptions{}))
		expect("the ConfigMap is of no account", "three", 4)
		b.serve("")
		expect("bundles are served no longer", "one and two", 5)
	})
}

func TestRootsAreReadFromBundlesOfEitherVersion(t *testing.T) {
	text := string(aCertificate(t))
	beta := &certificatesv1beta1.ClusterTrustBundle{ObjectMeta: meta("", RootsBundle), Spec: certificatesv1beta1.ClusterTrustBundleSpec{TrustBundle: text}}
	for version, object := range map[string]runtime.Object{"v1": bundle(text), "v1beta1": beta} {
		synctest.Test(t, func(t *testing.T) {
			b := newBundles(version, object)
			now, _, _ := following(t, b, map[string]string{"it": text})
			if got := now(); got != "it" {
				t.Errorf("%s: %q", version, got)
			}
			for _, a := range b.Actions() {
				want := map[string]string{"clustertrustbundles": "metadata.name=" + RootsBundle, "configmaps": "metadata.name=" + RootsConfigMap}[a.GetResource().Resource]
				var got string
				switch a := a.(type) {
				case k8stesting.ListAction:
					got = a.GetListRestrictions().Fields.String()
				case k8stesting.WatchAction:
					got = a.GetWatchRestrictions().Fields.String()
				}
				if got != want {
					t.Errorf("%s %s: fields %q, want %q", a.GetVerb(), a.GetResource().Resource, got, want)
				}
			}
		})
	}
}
