package controller

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"github.com/weirmesh/weir/agent/cluster"
	"github.com/weirmesh/weir/agent/identity"
	"github.com/weirmesh/weir/agent/model"
)

// keeping is a caKeeper with what it said.
type keeping struct {
	*caKeeper
	log             *bytes.Buffer
	published       []byte
	unpublished     error
	trusted         string // digest of the roots that all proxies are known to trust
	keyring, issuer bool
}

func newKeeping(client *fake.Clientset) *keeping {
	k := &keeping{log: &bytes.Buffer{}}
	k.caKeeper = &caKeeper{
		client: client, namespace: "weir-system", domain: domain, ttl: mostTTL, log: slog.New(slog.NewTextHandler(k.log, nil)),
		trusted: func(roots string) bool { return roots == k.trusted },
		usable:  func(keyring, issuer bool) { k.keyring, k.issuer = keyring, issuer },
		publish: func(_ context.Context, roots []byte) error {
			if k.unpublished == nil {
				k.published = roots
			}
			return k.unpublished
		},
	}
	return k
}

// isSame reports whether two CAs are one.
func isSame(a, b *identity.Authority) bool {
	return b != nil && a.Issuer().Equal(b.Issuer()) && a.Root().Equal(b.Root())
}

// strict has a fake keep objects' versions, as an API server does: what was read before
// another wrote is not written.
func strict(client *fake.Clientset) *fake.Clientset {
	var mu sync.Mutex
	version := 0
	for _, verb := range []string{"create", "update"} {
		client.PrependReactor(verb, "secrets", func(a k8stesting.Action) (bool, runtime.Object, error) {
			mu.Lock()
			defer mu.Unlock()
			s := a.(interface{ GetObject() runtime.Object }).GetObject().(*corev1.Secret)
			if verb == "update" {
				have, err := client.Tracker().Get(a.GetResource(), s.Namespace, s.Name)
				if err == nil && have.(*corev1.Secret).ResourceVersion != s.ResourceVersion {
					return true, nil, apierrors.NewConflict(a.GetResource().GroupResource(), s.Name, errors.New("it has changed"))
				}
			}
			version++
			s.ResourceVersion = fmt.Sprint(version)
			return false, nil, nil
		})
	}
	return client
}

// caOf is what is in the Secret.
func caOf(t *testing.T, client *fake.Clientset) identity.Keyring {
	t.Helper()
	s, err := client.CoreV1().Secrets("weir-system").Get(t.Context(), caSecret, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ring, err := identity.ParseKeyring(s.Data[caKey])
	if err != nil {
		t.Fatal(err)
	}
	return ring
}

// aCA is good from now on.
func aCA(t *testing.T, lifetime time.Duration) *identity.Authority {
	t.Helper()
	a, err := identity.NewAuthority(domain, time.Now(), lifetime)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// given is the operator's Secret.
func given(t *testing.T, a *identity.Authority) *corev1.Secret {
	t.Helper()
	certificates, key, err := a.PEM()
	if err != nil {
		t.Fatal(err)
	}
	s := &corev1.Secret{Type: corev1.SecretTypeTLS}
	s.Namespace, s.Name = "weir-system", issuerSecret
	s.Data = map[string][]byte{corev1.TLSCertKey: certificates, corev1.TLSPrivateKeyKey: key, issuerRoot: pemOf(a)}
	return s
}

func pemOf(authorities ...*identity.Authority) []byte {
	var out []byte
	for _, a := range authorities {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Root().Raw})...)
	}
	return out
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestTheFirstLeaderMakesACAAndTheNextGoesOnWithIt(t *testing.T) {
	client := strict(fake.NewClientset())
	first := newKeeping(client)
	if first.authority() != nil {
		t.Error("there is a CA before anybody looked")
	}
	must(t, first.once(t.Context()))
	a := first.authority()
	if a == nil || !first.keyring || !first.issuer || !bytes.Equal(first.published, pemOf(a)) {
		t.Fatalf("a CA: %v, usable: %v %v, its root published: %q", a != nil, first.keyring, first.issuer, first.published)
	}
	second := newKeeping(client)
	must(t, second.once(t.Context()))
	if !isSame(a, second.authority()) || !bytes.Equal(second.published, first.published) {
		t.Error("the next leader has another one")
	}
	if !isSame(a, new(caOf(t, client)).Signs()) {
		t.Error("another one is in the Secret")
	}
}

func TestOfTwoThatMakeACAAtOnceBothHaveTheOnes(t *testing.T) {
	client := strict(fake.NewClientset())
	other := newKeeping(client)
	raced := false
	client.PrependReactor("create", "secrets", func(k8stesting.Action) (bool, runtime.Object, error) {
		if raced {
			return false, nil, nil
		}
		raced = true
		return true, nil, apierrors.NewAlreadyExists(corev1.Resource("secrets"), caSecret)
	})
	// The loser is told that it is there; the winner has made it meanwhile.
	winner := newKeeping(client)
	gets := 0
	client.PrependReactor("get", "secrets", func(a k8stesting.Action) (bool, runtime.Object, error) {
		if a.(k8stesting.GetAction).GetName() == caSecret {
			gets++
		}
		if gets == 2 && winner.known() == nil {
			s := &corev1.Secret{Data: map[string][]byte{}}
			s.Namespace, s.Name = "weir-system", caSecret
			ring := identity.NewKeyring(aCA(t, identity.RootLifetime))
			document, err := ring.Encode()
			if err != nil {
				t.Error(err)
			}
			s.Data[caKey] = document
			winner.set(&ring)
			return true, s, client.Tracker().Add(s)
		}
		return false, nil, nil
	})
	must(t, other.once(t.Context()))
	if !isSame(winner.authority(), other.authority()) || !isSame(winner.authority(), new(caOf(t, client)).Signs()) {
		t.Error("they differ")
	}
}

func TestOfTwoThatRotateAtOnceOneDoes(t *testing.T) {
	client := strict(fake.NewClientset())
	a, b := newKeeping(client), newKeeping(client)
	must(t, a.once(t.Context()))
	must(t, b.once(t.Context()))
	check(t)(client.CoreV1().Secrets("weir-system").Create(t.Context(), given(t, aCA(t, identity.RootLifetime)), metav1.CreateOptions{}))
	// b has read what a writes to before b does.
	b.publish = func(context.Context, []byte) error {
		b.publish = func(context.Context, []byte) error { return nil }
		return a.once(t.Context())
	}
	if err := b.once(t.Context()); !apierrors.IsConflict(err) {
		t.Errorf("b wrote over it: %v", err)
	}
	must(t, b.once(t.Context()))
	if !b.known().Equal(*a.known()) || !b.known().Equal(caOf(t, client)) || b.known().Next() == nil {
		t.Error("they differ, or nothing was announced")
	}
}

func TestACAIsRotatedInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := strict(fake.NewClientset())
		k := newKeeping(client)
		must(t, k.once(t.Context()))
		first := k.authority()
		for _, step := range []struct {
			what        string
			after       time.Duration
			signs, next bool
			roots       int
		}{
			{"in the first half of its life", identity.RootLifetime/2 - time.Hour, true, false, 1},
			{"in the second half", 2 * time.Hour, true, true, 2},
			{"soon after", time.Hour, true, true, 2},
			{"a day later", 23 * time.Hour, false, false, 2},
			{"when the last certificate below it has ended", 25 * time.Hour, false, false, 1},
		} {
			time.Sleep(step.after)
			must(t, k.once(t.Context()))
			ring, roots := caOf(t, client), bytes.Count(k.published, []byte("BEGIN"))
			if isSame(first, k.authority()) != step.signs || (ring.Next() != nil) != step.next || roots != step.roots || !isSame(k.authority(), ring.Signs()) {
				t.Errorf("%s: the first signs: %v, another is announced: %v, roots: %d", step.what, isSame(first, k.authority()), ring.Next() != nil, roots)
			}
		}
	})
}

func TestWhatIsWrongWithTheCAIsSaidOnceAndLookedAtAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, began := newKeeping(strict(fake.NewClientset())), time.Now()
		k.publish = func(context.Context, []byte) error {
			if time.Since(began) < 10*time.Minute {
				return errors.New("forbidden")
			}
			return nil
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); k.run(ctx) }()
		time.Sleep(10*time.Minute + caInterval)
		synctest.Wait()
		if k.authority() == nil {
			t.Error("nothing is signed")
		}
		for _, line := range []string{"forbidden", "as it should be again"} {
			if n := strings.Count(k.log.String(), line); n != 1 {
				t.Errorf("%q was logged %d times:\n%s", line, n, k.log)
			}
		}
		cancel()
		<-done
		if k.authority() != nil {
			t.Error("who does not lead any more signs")
		}
	})
}

func TestTheOperatorsCASigns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		operators := aCA(t, identity.RootLifetime)
		client := strict(fake.NewClientset(given(t, operators)))
		k := newKeeping(client)
		must(t, k.once(t.Context()))
		if !isSame(operators, k.authority()) || !bytes.Equal(k.published, pemOf(operators)) {
			t.Fatal("it does not sign")
		}
		another := aCA(t, identity.RootLifetime)
		check(t)(client.CoreV1().Secrets("weir-system").Update(t.Context(), with(given(t, another), func(s *corev1.Secret) { s.ResourceVersion = "" }), metav1.UpdateOptions{}))
		for _, step := range []struct {
			after     time.Duration
			signs     *identity.Authority
			published []byte
		}{
			{time.Minute, operators, pemOf(operators, another)},
			{time.Hour, operators, pemOf(operators, another)}, // looking again does not begin again
			{23 * time.Hour, another, pemOf(another, operators)},
			{25 * time.Hour, another, pemOf(another)},
		} {
			time.Sleep(step.after)
			must(t, k.once(t.Context()))
			if !isSame(step.signs, k.authority()) || !bytes.Equal(step.published, k.published) {
				t.Errorf("after %s the first signs: %v, %d roots", step.after, isSame(operators, k.authority()), bytes.Count(k.published, []byte("BEGIN")))
			}
		}
	})
}

func TestAnOperatorsCAIsNotReplacedByOneOfOurs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		operators := aCA(t, identity.RootLifetime)
		client := strict(fake.NewClientset(given(t, operators)))
		k := newKeeping(client)
		time.Sleep(identity.RootLifetime * 3 / 4)
		must(t, k.once(t.Context()))
		if k.known().Next() != nil {
			t.Error("another one is announced: it is the operator's to renew")
		}
	})
}

func TestWhatCannotBeReadIsNotWrittenOver(t *testing.T) {
	damaged := func(name string, data map[string][]byte) *corev1.Secret {
		s := &corev1.Secret{Data: data}
		s.Namespace, s.Name = "weir-system", name
		return s
	}
	for _, tt := range []struct {
		name            string
		secret          *corev1.Secret
		reactor         error
		keyring, issuer bool
		want            string
	}{
		{"the keyring is damaged", damaged(caSecret, map[string][]byte{caKey: []byte("{}")}), nil, false, true, "secret weir-ca, keyring.json"},
		{"the keyring is not there", damaged(caSecret, nil), nil, false, true, "secret weir-ca, keyring.json"},
		{"the operator's CA is damaged", damaged(issuerSecret, map[string][]byte{corev1.TLSCertKey: []byte("x")}), nil, false, false, "secret weir-ca-issuer: CA certificate"},
		{"the API server says no", nil, apierrors.NewForbidden(corev1.Resource("secrets"), caSecret, errors.New("rbac")), false, false, "forbidden"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			client := fake.NewClientset()
			if tt.secret != nil {
				client = fake.NewClientset(tt.secret)
			}
			if tt.reactor != nil {
				client.PrependReactor("get", "secrets", func(k8stesting.Action) (bool, runtime.Object, error) { return true, nil, tt.reactor })
			}
			k := newKeeping(client)
			err := k.once(t.Context())
			if err == nil || !strings.Contains(err.Error(), tt.want) || k.authority() != nil || k.keyring != tt.keyring || k.issuer != tt.issuer {
				t.Errorf("%v; it signs: %v; usable: %v %v", err, k.authority() != nil, k.keyring, k.issuer)
			}
			for _, a := range client.Actions() {
				if a.GetVerb() != "get" {
					t.Errorf("it is written: %s %s", a.GetVerb(), a.GetResource().Resource)
				}
			}
		})
	}
}

// TestACAThatIsKnownGoesOn: what is wrong with the operator's, or an API server that is
// away, or a Secret that is gone, stop nobody; a keyring that is damaged does.
func TestACAThatIsKnownGoesOn(t *testing.T) {
	client := strict(fake.NewClientset())
	k := newKeeping(client)
	must(t, k.once(t.Context()))
	a := k.authority()
	away := false
	client.PrependReactor("get", "secrets", func(k8stesting.Action) (bool, runtime.Object, error) {
		return away, nil, errors.New("connect: connection refused")
	})
	secrets := client.CoreV1().Secrets("weir-system")
	bad := given(t, a)
	bad.Data[corev1.TLSPrivateKeyKey] = []byte("x")
	check(t)(secrets.Create(t.Context(), bad, metav1.CreateOptions{}))
	if err := k.once(t.Context()); err == nil || !isSame(a, k.authority()) || !k.keyring || k.issuer {
		t.Errorf("the operator's is damaged: %v, usable %v %v", err, k.keyring, k.issuer)
	}
	must(t, secrets.Delete(t.Context(), issuerSecret, metav1.DeleteOptions{}))
	away = true
	if err := k.once(t.Context()); err == nil || !isSame(a, k.authority()) {
		t.Errorf("the API server is away: %v", err)
	}
	away = false
	must(t, secrets.Delete(t.Context(), caSecret, metav1.DeleteOptions{}))
	must(t, k.once(t.Context()))
	if !isSame(a, k.authority()) || !isSame(a, new(caOf(t, client)).Signs()) {
		t.Error("the Secret is gone: it is not made anew with the CA that there was")
	}
	s, err := secrets.Get(t.Context(), caSecret, metav1.GetOptions{})
	must(t, err)
	s.Data[caKey] = []byte("{")
	check(t)(secrets.Update(t.Context(), s, metav1.UpdateOptions{}))
	if err := k.once(t.Context()); err == nil || k.authority() != nil || k.keyring {
		t.Errorf("the keyring is damaged: %v", err)
	}
}

func TestNothingIsSignedBeforeTheRootIsPublished(t *testing.T) {
	k := newKeeping(strict(fake.NewClientset()))
	k.unpublished = errors.New("forbidden")
	if err := k.once(t.Context()); err == nil || k.authority() != nil || k.keyring {
		t.Errorf("%v; usable %v", err, k.keyring)
	}
	k.unpublished = nil
	must(t, k.once(t.Context()))
	if k.authority() == nil || !k.keyring {
		t.Error("it is published, and nothing is signed")
	}
}

// TestRootsArePublishedWhereTheClusterHasAPlaceForThem has API servers of three ages.
func TestRootsArePublishedWhereTheClusterHasAPlaceForThem(t *testing.T) {
	for _, tt := range []struct {
		name   string
		served map[string]bool
		want   string
	}{
		{"1.37", map[string]bool{"v1": true, "v1beta1": true}, "v1 clustertrustbundles"},
		{"1.33, switched on", map[string]bool{"v1beta1": true}, "v1beta1 clustertrustbundles"},
		{"without bundles", nil, "v1 configmaps"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			client := fake.NewClientset()
			client.PrependReactor("*", "clustertrustbundles", func(a k8stesting.Action) (bool, runtime.Object, error) {
				return !tt.served[a.GetResource().Version], nil, apierrors.NewNotFound(a.GetResource().GroupResource(), "")
			})
			for _, roots := range []string{"one", "one", "two"} {
				must(t, publishRoots(t.Context(), client, "weir-system", []byte(roots)))
			}
			var got []string
			for _, a := range client.Actions() {
				if a.GetVerb() != "list" {
					got = append(got, a.GetVerb()+" "+a.GetResource().Version+" "+a.GetResource().Resource)
				}
			}
			if want := []string{"create " + tt.want, "update " + tt.want}; strings.Join(got, "; ") != strings.Join(want, "; ") {
				t.Errorf("got %q, want %q", got, want)
			}
			if tt.served == nil {
				m, err := client.CoreV1().ConfigMaps("weir-system").Get(t.Context(), cluster.RootsConfigMap, metav1.GetOptions{})
				if err != nil || m.Data[cluster.RootsKey] != "two" {
					t.Errorf("%v, %v", m, err)
				}
				return
			}
			v, err := client.CertificatesV1().ClusterTrustBundles().Get(t.Context(), cluster.RootsBundle, metav1.GetOptions{})
			if tt.served["v1"] && (err != nil || v.Spec.TrustBundle != "two" || v.Spec.SignerName != cluster.SignerName) {
				t.Errorf("%v, %v", v, err)
			}
		})
	}
}

func TestRootsThatCannotBePublishedAreNotPutElsewhere(t *testing.T) {
	client := fake.NewClientset()
	client.PrependReactor("create", "clustertrustbundles", func(a k8stesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewNotFound(a.GetResource().GroupResource(), "")
	})
	if err := publishRoots(t.Context(), client, "weir-system", []byte("one")); err == nil {
		t.Error("no error")
	}
	for _, a := range client.Actions() {
		if a.GetResource().Resource == "configmaps" {
			t.Errorf("%s of a ConfigMap", a.GetVerb())
		}
	}
}

// TestACAThatAllTrustSignsSoon: all its proxies, of all roots.
func TestACAThatAllTrustSignsSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := strict(fake.NewClientset())
		k := newKeeping(client)
		must(t, k.once(t.Context()))
		k.trusted = k.known().Digest()
		another := aCA(t, identity.RootLifetime)
		check(t)(client.CoreV1().Secrets("weir-system").Create(t.Context(), given(t, another), metav1.CreateOptions{}))
		must(t, k.once(t.Context()))
		time.Sleep(time.Hour)
		must(t, k.once(t.Context()))
		if isSame(another, k.authority()) {
			t.Error("it signs, and what all trust are the roots without its own")
		}
		k.trusted = k.known().Digest()
		must(t, k.once(t.Context()))
		if !isSame(another, k.authority()) || len(k.known().Roots()) != 2 {
			t.Error("all trust it, and it does not sign")
		}
	})
}

func TestAllTrustWhatEveryAgentSaysSo(t *testing.T) {
	const roots = "d1"
	says := func(digest string) *model.Programmed { return &model.Programmed{Trusted: digest} }
	for _, tt := range []struct {
		name   string
		agents map[string]*model.Programmed // by node; nil: it does not answer
		ended  bool                         // n1's agent, after that
		gone   bool                         // the node n1, with it
		want   bool
	}{
		{"all", map[string]*model.Programmed{"n1": says(roots), "n2": says(roots)}, false, false, true},
		{"one of others", map[string]*model.Programmed{"n1": says(roots), "n2": says("d0")}, false, false, false},
		{"one does not say, as one of an earlier version", map[string]*model.Programmed{"n1": says(roots), "n2": says("")}, false, false, false},
		{"one does not answer", map[string]*model.Programmed{"n1": says(roots), "n2": nil}, false, false, false},
		{"one has ended, and its proxies go on", map[string]*model.Programmed{"n1": says(roots), "n2": says(roots)}, true, false, false},
		{"one has ended with its node", map[string]*model.Programmed{"n1": says(roots), "n2": says(roots)}, true, true, true},
		{"there is none", nil, false, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, agents := newWatches(), &fleet{says: map[string]*model.Programmed{}}
				for node, said := range tt.agents {
					agents.says[node] = said
					must(t, errors.Join(w.nodes.Add(aNode(node)), w.agents.Add(agentAt(node, node))))
				}
				c := newCensus(w, agents.ask, func() {}, slog.New(slog.DiscardHandler))
				if c.trusted(roots) {
					t.Error("nobody was asked yet")
				}
				c.round(t.Context())
				if tt.ended {
					must(t, w.agents.Delete(agentAt("n1", "n1")))
				}
				if tt.gone {
					must(t, w.nodes.Delete(aNode("n1")))
				}
				<-c.wanted
				c.round(t.Context())
				if got := c.trusted(roots); got != tt.want {
					t.Errorf("trusted: %v", got)
				}
				if asked := len(c.wanted) == 1; asked == tt.want {
					t.Errorf("asked again soon: %v", asked)
				}
			})
		})
	}
	if (*census)(nil).trusted(roots) {
		t.Error("without a census")
	}
}
