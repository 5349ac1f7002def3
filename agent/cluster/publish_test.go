package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
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
)

// newAPI is n1's, of a server without the CRDs of routes.
func newAPI(client *fake.Clientset) (*API, *logBuffer) {
	log := &logBuffer{}
	return &API{client: client, gateway: newGateway(), policies: policyfake.New(), node: "n1", log: log.logger()}, log
}

// attachments are what the node has.
type attachments struct {
	mu       sync.Mutex
	captured map[string]bool
	unknown  bool
}

func (a *attachments) set(unknown bool, uids ...string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.captured, a.unknown = map[string]bool{}, unknown
	for _, uid := range uids {
		a.captured[uid] = true
	}
}

func (a *attachments) get() (map[string]bool, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return maps.Clone(a.captured), !a.unknown
}

// background runs something until the test, or its bubble, ends.
func background(t *testing.T, run func(context.Context)) {
	t.Helper()
	ctx, done := t.Context(), make(chan struct{})
	go func() { defer close(done); run(ctx) }()
	t.Cleanup(func() { <-done })
}

// publishing runs a Publisher, and the Store that it reads.
func publishing(t *testing.T, client *fake.Clientset, have *attachments) (*Publisher, *logBuffer) {
	t.Helper()
	api, log := newAPI(client)
	s := NewStore()
	p := api.NewPublisher(s)
	p.Captured = have.get
	background(t, func(ctx context.Context) {
		if err := RunAPI(ctx, s, api, LastGood{}); err != nil {
			t.Error(err)
		}
	})
	background(t, p.Run)
	return p, log
}

// publishedPods is "name=status" of the pods that have the condition.
func publishedPods(t *testing.T, client *fake.Clientset) string {
	t.Helper()
	list, err := client.CoreV1().Pods("shop").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, p := range list.Items {
		for _, c := range p.Status.Conditions {
			if c.Type == ConditionCaptured {
				out = append(out, p.Name+"="+string(c.Status))
			}
		}
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// patches are those of pods, in order.
func patches(client *fake.Clientset) []k8stesting.PatchAction {
	var out []k8stesting.PatchAction
	for _, a := range client.Actions() {
		if p, ok := a.(k8stesting.PatchAction); ok {
			out = append(out, p)
		}
	}
	return out
}

// saying is a pod whose status says whether it is captured.
func saying(p *corev1.Pod, status corev1.ConditionStatus) *corev1.Pod {
	p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}, {Type: ConditionCaptured, Status: status}}
	return p
}

func TestWhoIsCapturedIsPublishedAndTakenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, have := fake.NewClientset(apiPod("front", "u-1", "enabled"), apiPod("back", "u-2", "enabled")), &attachments{}
		p, log := publishing(t, client, have)
		for _, step := range []struct {
			uids []string
			want string
		}{
			{nil, ""}, // nothing is said of pods that were never captured
			{[]string{"u-1"}, "front=True"},
			{[]string{"u-1", "u-2"}, "back=True front=True"},
			{[]string{"u-2"}, "back=True front=False"},
			{[]string{"u-2"}, "back=True front=False"},
			{[]string{"u-1", "u-9"}, "back=False front=True"},
		} {
			have.set(false, step.uids...)
			p.Changed()
			time.Sleep(time.Minute)
			synctest.Wait()
			if got := publishedPods(t, client); got != step.want {
				t.Errorf("%v: got %q, want %q", step.uids, got, step.want)
			}
		}
		all := patches(client)
		if len(all) != 5 {
			t.Errorf("%d patches, not one for each change", len(all))
		}
		for _, a := range all {
			var patch struct {
				Metadata struct{ UID string }
				Status   struct{ Conditions []corev1.PodCondition }
			}
			if err := json.Unmarshal(a.GetPatch(), &patch); err != nil {
				t.Fatal(err)
			}
			uid := map[string]string{"front": "u-1", "back": "u-2"}[a.GetName()]
			if a.GetSubresource() != "status" || patch.Metadata.UID != uid || len(patch.Status.Conditions) != 1 || patch.Status.Conditions[0].LastTransitionTime.IsZero() {
				t.Errorf("%s of %s: %s", a.GetSubresource(), a.GetName(), a.GetPatch())
			}
		}
		if log.String() != "" {
			t.Errorf("log:\n%s", log)
		}
	})
}

func TestAPodThatComesLaterIsPublished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, have := fake.NewClientset(), &attachments{}
		have.set(false, "u-1") // the agent asked for the pod, the watch lags
		publishing(t, client, have)
		time.Sleep(time.Minute)
		check(t)(client.CoreV1().Pods("shop").Create(t.Context(), apiPod("front", "u-1", "enabled"), metav1.CreateOptions{}))
		time.Sleep(time.Second)
		synctest.Wait()
		if got := publishedPods(t, client); got != "front=True" {
			t.Errorf("got %q", got)
		}
	})
}

func TestOnlyWhatDiffersIsPublished(t *testing.T) {
	leaving := saying(apiPod("leaving", "u-3", "enabled"), corev1.ConditionTrue)
	leaving.DeletionTimestamp, leaving.Finalizers = new(metav1.NewTime(time.Unix(1, 0))), []string{"x/y"}
	ended := apiPod("ended", "u-4", "enabled")
	ended.Status.Phase = corev1.PodSucceeded
	static := apiPod("static", "u-5", "enabled")
	static.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "h"}
	objects := []runtime.Object{
		saying(apiPod("right", "u-1", "enabled"), corev1.ConditionTrue),
		saying(apiPod("wrong", "u-2", "enabled"), corev1.ConditionTrue),
		leaving, ended, static,
		saying(apiPod("other", "u-6", "enabled"), corev1.ConditionFalse),
	}
	for _, tt := range []struct {
		name    string
		unknown bool
		want    string // the patches
	}{
		{"an agent that has started", false, "wrong"},
		{"an agent that does not know yet which pod it has captured", true, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var copies []runtime.Object
				for _, o := range objects {
					copies = append(copies, o.DeepCopyObject())
				}
				client, have := fake.NewClientset(copies...), &attachments{}
				have.set(tt.unknown, "u-1", "u-4", "u-5", "h")
				publishing(t, client, have)
				time.Sleep(time.Minute)
				synctest.Wait()
				var got []string
				for _, a := range patches(client) {
					got = append(got, a.GetName())
				}
				if strings.Join(got, " ") != tt.want {
					t.Errorf("patched: %q, want %q", got, tt.want)
				}
			})
		})
	}
}

func TestWhatIsNotTakenIsPublishedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, have := fake.NewClientset(), &attachments{}
		var uids []string
		for i := range 20 {
			uids = append(uids, fmt.Sprint("u-", i))
			check(t)(client.CoreV1().Pods("shop").Create(t.Context(), apiPod(fmt.Sprint("front-", i), uids[i], "enabled"), metav1.CreateOptions{}))
		}
		began := time.Now()
		client.PrependReactor("patch", "pods", func(a k8stesting.Action) (bool, runtime.Object, error) {
			return time.Since(began) < 3*time.Minute, nil, errors.New("etcdserver: request timed out")
		})
		have.set(false, uids...)
		_, log := publishing(t, client, have)
		time.Sleep(3*time.Minute + lastPublish + time.Second)
		synctest.Wait()
		if n := strings.Count(publishedPods(t, client), "=True"); n != 20 {
			t.Errorf("%d are published", n)
		}
		for _, line := range []string{`API server does not answer`, `API server answers again" kind=pods/status`} {
			if n := strings.Count(log.String(), line); n != 1 {
				t.Errorf("%q was logged %d times:\n%s", line, n, log)
			}
		}
	})
}

// TestWhatTheWatchDoesNotShowYetIsNotSaidTwice: nor is it forgotten.
func TestWhatTheWatchDoesNotShowYetIsNotSaidTwice(t *testing.T) {
	api, _ := newAPI(fake.NewClientset())
	s := withPods(must(toPod(apiPod("front", "u-1", "enabled"))))
	p := api.NewPublisher(s)
	p.Captured = func() (map[string]bool, bool) { return map[string]bool{"u-1": true}, true }
	now := time.Now()
	p.said["u-1"] = statement{true, now}
	p.said["gone"] = statement{true, now}
	for _, tt := range []struct {
		after   time.Duration
		wrong   int
		settled bool
	}{{time.Second, 0, false}, {echo, 1, true}} {
		wrong, settled := p.compare(now.Add(tt.after))
		if len(wrong) != tt.wrong || settled != tt.settled {
			t.Errorf("after %s: %v, settled %v", tt.after, wrong, settled)
		}
	}
	s.setPod(must(toCompactPod(saying(apiPod("front", "u-1", "enabled"), corev1.ConditionTrue))))
	if wrong, settled := p.compare(now); len(wrong) != 0 || !settled {
		t.Errorf("it is shown: %v, settled %v", wrong, settled)
	}
	if diff := cmp.Diff(0, len(p.said)); diff != "" {
		t.Errorf("kept: %v", p.said)
	}
}

// TestWhatIsPublishedIsNoChangeOfWhatIsToBeCaptured: no round of the repair comes of it.
func TestWhatIsPublishedIsNoChangeOfWhatIsToBeCaptured(t *testing.T) {
	s := withPods(must(toPod(apiPod("front", "u-1", "enabled"))))
	told := func() []bool {
		out := make([]bool, 2)
		for i, c := range []<-chan struct{}{s.podsOther, s.published} {
			select {
			case <-c:
				out[i] = true
			default:
			}
		}
		return out
	}
	told()
	s.setPod(must(toCompactPod(saying(apiPod("front", "u-1", "enabled"), corev1.ConditionTrue))))
	if diff := cmp.Diff([]bool{false, true}, told()); diff != "" {
		t.Errorf("the condition: %s", diff)
	}
	s.setPod(must(toCompactPod(saying(apiPod("front", "u-1", "disabled"), corev1.ConditionFalse))))
	if diff := cmp.Diff([]bool{true, true}, told()); diff != "" {
		t.Errorf("the condition, and a label: %s", diff)
	}
}
