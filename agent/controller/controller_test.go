package controller

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/leaderelection"
	gatewayfake "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned/fake"

	policyfake "github.com/weirmesh/weir/agent/api/client/fake"
)

// These tests run against client-go's fake clientset, in a bubble of its own time:
// an election takes no time. It holds no resourceVersion against a patch's; the
// real API server does, in tests/e2e.

// replica is a running controller.
type replica struct {
	stop func() // returns when it has ended
	log  *strings.Builder
}

func startReplica(t *testing.T, client *fake.Clientset, name string) replica {
	t.Helper()
	return startReplicaWith(t, client, gatewayfake.NewClientset(), name)
}

func startReplicaWith(t *testing.T, client *fake.Clientset, routes *gatewayfake.Clientset, name string) replica {
	t.Helper()
	return startReplicaOf(t, clients{client, routes, policyfake.New()}, name)
}

func startReplicaOf(t *testing.T, c clients, name string) replica {
	t.Helper()
	return startReplicaThatAsks(t, c, name, nil)
}

func startReplicaThatAsks(t *testing.T, c clients, name string, ask Ask) replica {
	t.Helper()
	var mu sync.Mutex
	log := &strings.Builder{}
	o := Options{
		Namespace: "weir-system", Agents: "app=weir-agent", Lease: "weir-controller", Identity: name, Ask: ask,
		TrustDomain: domain, TTL: mostTTL, AgentAccount: "weir-agent",
		Log: slog.New(slog.NewTextHandler(lockedWriter{&mu, log}, nil)),
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- run(ctx, o, c, nil) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return replica{stop, log}
}

type lockedWriter struct {
	mu  *sync.Mutex
	out *strings.Builder
}

func (w lockedWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.out.Write(p)
}

// hasTaint lets some time pass first.
func hasTaint(t *testing.T, client *fake.Clientset, name string, after time.Duration) bool {
	t.Helper()
	time.Sleep(after)
	synctest.Wait()
	n, err := client.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return toNode(n).waiting
}

func holder(t *testing.T, client *fake.Clientset) string {
	t.Helper()
	lease, err := client.CoordinationV1().Leases("weir-system").Get(t.Context(), "weir-controller", metav1.GetOptions{})
	if err != nil || lease.Spec.HolderIdentity == nil {
		t.Fatalf("lease: %v, %v", lease, err)
	}
	return *lease.Spec.HolderIdentity
}

func newNode(name string) *corev1.Node {
	return aNode(name, taint(NotReadyTaint, corev1.TaintEffectNoSchedule))
}

func TestTheTaintGoesWhenTheAgentIsReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset(newNode("n1"), newNode("n2"))
		r := startReplica(t, client, "a")
		pods := client.CoreV1().Pods("weir-system")
		pod := aPod("agent-1", "n1", time.Second, 9*time.Second)
		check(t)(pods.Create(t.Context(), with(pod.DeepCopy(), notReady), metav1.CreateOptions{}))
		if !hasTaint(t, client, "n1", time.Minute) {
			t.Error("the taint went before the agent was ready")
		}
		check(t)(pods.Update(t.Context(), pod, metav1.UpdateOptions{}))
		if hasTaint(t, client, "n1", time.Second) {
			t.Error("the taint is there, and the agent is ready")
		}
		if !hasTaint(t, client, "n2", 0) {
			t.Error("the taint of another node went too")
		}
		// The agent is restarted.
		check(t)(pods.Update(t.Context(), with(pod.DeepCopy(), notReady), metav1.UpdateOptions{}))
		if hasTaint(t, client, "n1", time.Minute) {
			t.Error("the taint has come back")
		}
		r.stop()
		for _, line := range []string{
			`msg="node keeps its taint" node=n1 because="pod weir-system/agent-1: it is not ready"`,
			`msg="node keeps its taint" node=n2 because="no pod of the agent's DaemonSet is on the node yet"`,
			`msg="taint removed" node=n1`,
		} {
			if n := strings.Count(r.log.String(), line); n != 1 {
				t.Errorf("%q was logged %d times:\n%s", line, n, r.log)
			}
		}
	})
}

func TestAPatchThatIsRefusedIsTriedAgain(t *testing.T) {
	for _, tt := range []struct {
		name   string
		err    error
		logged int
	}{
		// What has changed the node shows on the watch; here nothing does but the pod.
		{"a conflict", apierrors.NewConflict(schema.GroupResource{Resource: "nodes"}, "n1", errors.New("changed")), 0},
		{"a refusal", errors.New("etcdserver: request timed out"), 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				pod := aPod("agent-1", "n1", time.Second, 9*time.Second)
				client := fake.NewClientset(newNode("n1"), pod)
				failures := 1
				client.PrependReactor("patch", "nodes", func(k8stesting.Action) (bool, runtime.Object, error) {
					failures--
					return failures >= 0, nil, tt.err
				})
				r := startReplica(t, client, "a")
				time.Sleep(100 * time.Millisecond)
				if tt.logged == 0 {
					check(t)(client.CoreV1().Nodes().Update(t.Context(), with(newNode("n1"), func(n *corev1.Node) { n.Labels = map[string]string{"x": "y"} }), metav1.UpdateOptions{}))
				}
				if hasTaint(t, client, "n1", 2*time.Second) {
					t.Error("it was not tried again")
				}
				r.stop()
				if n := strings.Count(r.log.String(), "taint not removed; trying again"); n != tt.logged {
					t.Errorf("logged %d times:\n%s", n, r.log)
				}
			})
		})
	}
}

// handOver is how long a replica that waits for the Lease lets pass between two looks, at
// most: it waits a random time longer than retryPeriod.
var handOver = time.Duration((1 + leaderelection.JitterFactor) * float64(retryPeriod))

// TestHandOver has one of two replicas act, and the other go on when it ends.
func TestHandOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset(aPod("agent-1", "n1", time.Second, 9*time.Second))
		a := startReplica(t, client, "a")
		time.Sleep(time.Second)
		b := startReplica(t, client, "b")
		time.Sleep(time.Minute)
		if got := holder(t, client); got != "a" {
			t.Fatalf("%s leads, it was a", got)
		}
		check(t)(client.CoreV1().Nodes().Create(t.Context(), newNode("n1"), metav1.CreateOptions{}))
		if hasTaint(t, client, "n1", time.Second) {
			t.Fatal("nobody acts")
		}
		if strings.Contains(b.log.String(), "taint removed") {
			t.Error("the one that does not lead acted")
		}
		a.stop()
		if got := holder(t, client); got != "" {
			t.Errorf("a ended and did not release the Lease: %q", got)
		}
		if !strings.Contains(a.log.String(), "no longer leading") {
			t.Errorf("the work did not end:\n%s", a.log)
		}
		check(t)(client.CoreV1().Nodes().Update(t.Context(), newNode("n1"), metav1.UpdateOptions{}))
		if hasTaint(t, client, "n1", handOver) {
			t.Errorf("b has not gone on after %s:\n%s", handOver, b.log)
		}
	})
}

// TestTheAPIServerIsAwayForLong: a leader that cannot renew stops acting, and leads
// again.
func TestTheAPIServerIsAwayForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset(aPod("agent-1", "n1", time.Second, 9*time.Second))
		var mu sync.Mutex
		away := false
		set := func(v bool) { mu.Lock(); away = v; mu.Unlock() }
		client.PrependReactor("*", "leases", func(k8stesting.Action) (bool, runtime.Object, error) {
			mu.Lock()
			defer mu.Unlock()
			return away, nil, errors.New("connect: connection refused")
		})
		r := startReplica(t, client, "a")
		time.Sleep(time.Minute)
		set(true)
		time.Sleep(leaseDuration)
		check(t)(client.CoreV1().Nodes().Create(t.Context(), newNode("n1"), metav1.CreateOptions{}))
		if !hasTaint(t, client, "n1", time.Minute) {
			t.Error("it acts, and its lease has run out")
		}
		set(false)
		if hasTaint(t, client, "n1", leaseDuration) {
			t.Error("it does not lead again")
		}
		r.stop()
		for _, line := range []string{`msg="API server does not answer`, `msg="API server answers again" kind=lease`, `msg="no longer leading"`} {
			if !strings.Contains(r.log.String(), line) {
				t.Errorf("not in the log: %s\n%s", line, r.log)
			}
		}
	})
}

func TestHealth(t *testing.T) {
	client := fake.NewClientset()
	known := make(chan struct{})
	client.PrependReactor("list", "nodes", func(k8stesting.Action) (bool, runtime.Object, error) {
		<-known
		return false, nil, nil
	})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	o := Options{Namespace: "weir-system", Lease: "weir-controller", Identity: "a", Log: slog.New(slog.DiscardHandler)}
	go func() { done <- run(ctx, o, clients{client, gatewayfake.NewClientset(), policyfake.New()}, listener) }()
	transport := &http.Transport{DisableKeepAlives: true}
	get := func(path string) int {
		response, err := (&http.Client{Transport: transport}).Get("http://" + listener.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		return response.StatusCode
	}
	if live, ready := get("/healthz"), get("/readyz"); live != 200 || ready != 503 {
		t.Errorf("before the first list: alive %d, ready %d", live, ready)
	}
	close(known)
	deadline := time.Now().Add(5 * time.Second)
	for get("/readyz") != 200 {
		if time.Now().After(deadline) {
			t.Fatal("never ready")
		}
		time.Sleep(10 * time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// check fails the test if a call to the fake does.
func check(t *testing.T) func(runtime.Object, error) {
	return func(_ runtime.Object, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
}
