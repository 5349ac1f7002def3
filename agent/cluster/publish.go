package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/weirmesh/weir/agent/model"
)

const (
	// Pauses after something that was not published.
	firstPublish = time.Second
	lastPublish  = 30 * time.Second
	// echo is how long the watch gets to show what was published.
	echo = 5 * time.Second
	// publishers is how many pods' status is patched at once.
	publishers = 8
)

// Publisher says in the status of this node's pods whether they are captured
// (ConditionCaptured), for those who are to reach them and for the signer. It compares
// what the cluster says with what the node has, so that nothing is lost with an agent or
// an API server that is away. Use NewPublisher.
type Publisher struct {
	// Captured has the UIDs of the pods whose traffic is turned aside. It is false if
	// there may be others: then no pod is said to be captured no longer.
	Captured func() (map[string]bool, bool)

	client  kubernetes.Interface
	store   *Store
	log     *slog.Logger
	state   Reachability
	changed chan struct{}
	said    map[string]statement // by UID: what the watch does not show yet
}

// statement is what was published of a pod, and when.
type statement struct {
	captured bool
	at       time.Time
}

// NewPublisher makes a Publisher for the pods in a Store that RunAPI fills.
func (a *API) NewPublisher(s *Store) *Publisher {
	return &Publisher{
		client: a.client, store: s, log: a.log, changed: make(chan struct{}, 1), said: map[string]statement{},
		state: Reachability{Kind: "pods/status", Log: a.log},
	}
}

// Changed has Captured asked again. It does not wait.
func (p *Publisher) Changed() { notify(p.changed) }

// Run publishes until ctx is done.
func (p *Publisher) Run(ctx context.Context) {
	if p.store.WaitSynced(ctx) != nil {
		return // what is published is not known
	}
	pause := firstPublish
	for {
		var again <-chan time.Time
		if p.once(ctx) {
			pause = firstPublish
		} else {
			again = time.After(pause)
			pause = min(2*pause, lastPublish)
		}
		select {
		case <-ctx.Done():
			return
		case <-again:
		case <-p.changed:
		case <-p.store.published:
		}
	}
}

// once returns false if there is something left to look at again.
func (p *Publisher) once(ctx context.Context) bool {
	wrong, settled := p.compare(time.Now())
	if len(wrong) == 0 {
		return settled
	}
	errs := make([]error, len(wrong))
	var group errgroup.Group
	group.SetLimit(publishers)
	for i, pod := range wrong {
		group.Go(func() error {
			errs[i] = p.publish(ctx, pod)
			return nil
		})
	}
	_ = group.Wait() // each has its place in errs
	for i, pod := range wrong {
		if errs[i] == nil {
			p.said[pod.UID] = statement{!pod.Captured, time.Now()}
		}
	}
	failed := slices.IndexFunc(errs, func(err error) bool { return err != nil })
	if failed < 0 {
		p.state.Note(ctx, nil)
		return false // the watch is yet to show it
	}
	p.state.Note(ctx, fmt.Errorf("whether pods are captured is not published: %w", errs[failed]))
	return false
}

// compare returns the pods of which the cluster does not know what they are, and whether
// it is to be looked again without a change: something is published, and not shown yet.
// A pod that is going is left alone.
func (p *Publisher) compare(now time.Time) ([]model.Pod, bool) {
	captured, all := p.Captured()
	var wrong []model.Pod
	settled, there := true, map[string]bool{}
	for _, pod := range p.store.Pods() {
		there[pod.UID] = true
		switch said, ok := p.said[pod.UID]; {
		case pod.Leaving, pod.Phase.Finished(), pod.Static():
		case captured[pod.UID] == pod.Captured:
			delete(p.said, pod.UID)
		case !captured[pod.UID] && !all:
		case ok && said.captured == captured[pod.UID] && now.Sub(said.at) < echo:
			settled = false
		default:
			wrong = append(wrong, pod)
		}
	}
	for uid := range p.said {
		if !there[uid] {
			delete(p.said, uid)
		}
	}
	slices.SortFunc(wrong, func(a, b model.Pod) int { return strings.Compare(a.UID, b.UID) })
	return wrong, settled
}

// publish says the opposite of what the cluster knows of a pod. Of one that is another by
// now nothing is said: the watch tells.
func (p *Publisher) publish(ctx context.Context, pod model.Pod) error {
	patch, err := capturePatch(pod, time.Now())
	if err != nil {
		return err
	}
	_, err = p.client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.StrategicMergePatchType, patch,
		metav1.PatchOptions{FieldManager: "weir-agent"}, "status")
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) || apierrors.IsInvalid(err) {
		p.log.DebugContext(ctx, "capture of a pod not published", "pod", pod.ID(), "error", err)
		return nil
	}
	return err
}

// capturePatch is the strategic merge patch of a pod's status. It is about the pod of that UID.
func capturePatch(pod model.Pod, now time.Time) ([]byte, error) {
	c := corev1.PodCondition{
		Type: ConditionCaptured, Status: corev1.ConditionTrue, LastTransitionTime: metav1.NewTime(now),
		Reason: "RulesInPlace", Message: "the pod's TCP traffic goes through its proxy",
	}
	if pod.Captured {
		c.Status, c.Reason, c.Message = corev1.ConditionFalse, "Released", "new connections no longer go through a proxy"
	}
	type object = map[string]any
	return json.Marshal(object{
		"metadata": object{"uid": pod.UID},
		"status":   object{"conditions": []corev1.PodCondition{c}},
	})
}

// waitCaptured returns once a pod's status, as it is known here, says that the pod is
// captured. Its only error is ctx's, saying what is missing.
func (s *Store) waitCaptured(ctx context.Context, pod model.Pod) error {
	for {
		ok, changed := s.isCaptured(pod)
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("pod %s is not published as captured (condition %s): %w", pod.ID(), ConditionCaptured, context.Cause(ctx))
		}
	}
}

// isCaptured returns a channel, too, that is closed when looking again may help.
func (s *Store) isCaptured(pod model.Pod) (bool, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	known, ok := s.view.pods[key{pod.Namespace, pod.Name}]
	if ok && known.pod.UID == pod.UID && known.pod.Captured {
		return true, nil
	}
	if s.waiters == nil {
		s.waiters = make(chan struct{})
	}
	return false, s.waiters
}
