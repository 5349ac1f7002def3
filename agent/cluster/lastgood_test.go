package cluster

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	policyfake "github.com/weirmesh/weir/agent/api/client/fake"
	"github.com/weirmesh/weir/agent/model"
)

// server is a fake API server that can go away.
type server struct {
	*fake.Clientset
	routes   *gatewayServer
	policies *policyfake.Client
	away     atomic.Bool
}

func newServer(objects ...runtime.Object) *server {
	s := &server{Clientset: fake.NewClientset(objects...), routes: newGateway(), policies: policyfake.New()}
	fail := func(k8stesting.Action) (bool, runtime.Object, error) {
		return s.away.Load(), nil, errors.New("connection refused")
	}
	for _, verb := range []string{"list", "get"} {
		s.PrependReactor(verb, "*", fail)
		s.routes.PrependReactor(verb, "*", fail)
		s.policies.PrependReactor(verb, "*", fail)
	}
	return s
}

// agent runs RunAPI until stop is called.
func (s *server) agent(t *testing.T, lastGood LastGood) (*Store, *logBuffer, func()) {
	t.Helper()
	store, log := NewStore(), &logBuffer{}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- RunAPI(ctx, store, &API{client: s, gateway: s.routes, policies: s.policies, node: "n1", log: log.logger()}, lastGood)
	}()
	return store, log, func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func shop(capture string) *corev1.Namespace {
	ns := &corev1.Namespace{ObjectMeta: meta("", "shop")}
	ns.Labels = map[string]string{"weirmesh.io/capture": capture}
	return ns
}

func TestAnAgentThatStartsWithoutTheServerGoesOnWithTheLastGoodView(t *testing.T) {
	lastGood := LastGood{Path: filepath.Join(t.TempDir(), "last-good.gz"), Version: "v1"}
	dial := netip.MustParseAddrPort("10.96.0.7:80")
	synctest.Test(t, func(t *testing.T) {
		api := newServer(shop("enabled"), apiPod("front", "u-1", "enabled"), apiService(), apiSlice("10.0.0.1", "10.0.0.2"))
		first, _, stop := api.agent(t, lastGood)
		if err := first.WaitSynced(t.Context()); err != nil {
			t.Fatal(err)
		}
		want := told(first, dial)
		synctest.Wait() // it has seen that it is synced
		stop()

		api.away.Store(true)
		began := time.Now()
		second, log, stop := api.agent(t, lastGood)
		defer stop()
		if err := second.WaitUsable(t.Context()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if took := time.Since(began); took > 5*time.Second || second.Synced() {
			t.Errorf("usable after %s, synced %v", took, second.Synced())
		}
		if diff := cmp.Diff(want, told(second, dial), netipValues); diff != "" || len(want.Endpoints) != 2 {
			t.Errorf("the destination (-before +after):\n%s", diff)
		}
		if w := second.Workload("shop", "front"); w == "" || w != first.Workload("shop", "front") {
			t.Errorf("what its peers are is %q", w)
		}
		synctest.Wait() // it is usable before that is said
		if !strings.Contains(log.String(), "last good view") {
			t.Errorf("it says nothing: %s", log)
		}
		if pod, ns, err := second.WaitPod(t.Context(), "shop", "front", "u-1"); err != nil || pod.Node != "n1" || ns.Labels["weirmesh.io/capture"] != "enabled" {
			t.Errorf("a pod that was known: %v, %v, %v", pod, ns, err)
		}
		if _, _, err := second.WaitPod(t.Context(), "shop", "front", ""); err == nil {
			t.Error("a pod of that name and no UID, which may be another by now, is decided on")
		}
		if _, _, err := second.WaitPod(t.Context(), "shop", "front", "u-2"); err == nil {
			t.Error("a pod of that name and another UID is decided on")
		}

		// What changed meanwhile counts as soon as the server is back.
		check(t)(api.DiscoveryV1().EndpointSlices("shop").Update(t.Context(), apiSlice("10.0.0.3"), metav1.UpdateOptions{}))
		check(t)(api.CoreV1().Pods("shop").Create(t.Context(), apiPod("back", "u-3", "enabled"), metav1.CreateOptions{}))
		api.away.Store(false)
		if err := second.WaitSynced(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := told(second, dial).Endpoints; len(got) != 1 || got[0].Addr.String() != "10.0.0.3:8080" {
			t.Errorf("endpoints %v", got)
		}
	})
}

// TestWhoMayCallIsKeptAtOnce: an agent that is killed has no time to write.
func TestWhoMayCallIsKeptAtOnce(t *testing.T) {
	lastGood := LastGood{Path: filepath.Join(t.TempDir(), "last-good.gz"), Version: "v1"}
	synctest.Test(t, func(t *testing.T) {
		s, log := NewStore(), &logBuffer{}
		s.markSynced()
		ctx, cancel := context.WithCancel(t.Context())
		go lastGood.keep(ctx, s, log.logger())
		synctest.Wait() // it has written what there was
		kept := func() (int, int) {
			synctest.Wait()
			v, _, err := lastGood.load()
			if err != nil {
				t.Fatal(err)
			}
			return len(v.services), len(v.authz) + len(v.peerAuth)
		}
		s.tables.services.set(model.Service{Namespace: "shop", Name: "back"})
		if services, _ := kept(); services != 0 {
			t.Error("every change is written at once: the next is not proved to be")
		}
		s.tables.authz.set(model.AuthorizationPolicy{Namespace: "shop", Name: "p"})
		if _, policies := kept(); policies != 1 {
			t.Errorf("%d policies are kept, want one", policies)
		}
		s.tables.peerAuth.set(model.PeerAuthentication{Namespace: "shop", Name: "p"})
		if _, policies := kept(); policies != 2 {
			t.Errorf("%d policies are kept, want two", policies)
		}
		s.tables.authz.drop(key{"shop", "p"})
		if _, policies := kept(); policies != 1 {
			t.Errorf("%d policies are kept after one was deleted, want one", policies)
		}
		cancel()
		synctest.Wait()
	})
}

// A pod that is newer than the view is not decided on by the labels that its
// namespace had then.
func TestANewPodWaitsForItsNamespace(t *testing.T) {
	s := NewStore()
	v := newView()
	v.add(kept{Namespace: new(must(toNamespace(shop("disabled"))))})
	s.fallBack(v)
	s.replacePods(map[key]compactPod{{"shop", "new"}: compact(must(toPod(apiPod("new", "u-9", ""))))})
	if _, _, missing, _ := s.find("shop", "new", "u-9"); missing == "" {
		t.Error("it is decided on by the last good namespace")
	}
	s.tables.namespaces.replace(map[string]model.Namespace{})
	s.tables.namespaces.set(must(toNamespace(shop("enabled"))))
	if _, ns, missing, _ := s.find("shop", "new", "u-9"); missing != "" || ns.Labels["weirmesh.io/capture"] != "enabled" {
		t.Errorf("missing %q, %v", missing, ns)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestALastGoodViewThatIsNoneIsLeft(t *testing.T) {
	path := filepath.Join(t.TempDir(), "last-good.gz")
	written := LastGood{Path: path, Version: "v1", Node: "n1"}
	for name, spoil := range map[string]func(t *testing.T) LastGood{
		"none":               func(*testing.T) LastGood { os.Remove(path); return written },
		"of another version": func(*testing.T) LastGood { return LastGood{Path: path, Version: "v2", Node: "n1"} },
		"of another node":    func(*testing.T) LastGood { return LastGood{Path: path, Version: "v1", Node: "n2"} },
		"cut short": func(t *testing.T) LastGood {
			if err := os.Truncate(path, 60); err != nil {
				t.Fatal(err)
			}
			return written
		},
		"rubbish": func(t *testing.T) LastGood {
			if err := os.WriteFile(path, []byte("rubbish"), 0o600); err != nil {
				t.Fatal(err)
			}
			return written
		},
	} {
		t.Run(name, func(t *testing.T) {
			if err := written.save([]kept{{Service: new(must(Service(apiService())))}}); err != nil {
				t.Fatal(err)
			}
			if v, _, err := written.load(); err != nil || len(v.services) != 1 {
				t.Fatalf("the control: %v, %v", v, err)
			}
			s, log := NewStore(), &logBuffer{}
			spoil(t).restore(s, log.logger())
			if s.fellBack || (name != "none") != strings.Contains(log.String(), "no last good view") {
				t.Errorf("it is used: %v; log %s", s.fellBack, log)
			}
		})
	}
}
