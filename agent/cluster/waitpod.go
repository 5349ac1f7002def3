package cluster

import (
	"context"
	"fmt"
	"time"

	"github.com/weirmesh/weir/agent/attachpb"
	"github.com/weirmesh/weir/agent/model"
)

const (
	// waitPod is how long a pod that the runtime starts may take to appear in the
	// cache: kubelet and agent hear of it from two watches.
	waitPod = 2 * time.Second
	// askTimeout bounds the one question to the API server after that.
	askTimeout = time.Second
)

// WaitPod finds a pod and its namespace. The pod must be the one the container
// runtime calls uid; an empty uid matches any, and so does a manifest's pod that
// has none. It waits up to 2 s for the pod to appear, then asks the API server
// once, if there is one, for up to 1 s.
//
// The error is attachpb.PodUnknown's *Failure, saying what was found instead, or
// ctx's if that ends first.
func (s *Store) WaitPod(ctx context.Context, namespace, name, uid string) (model.Pod, model.Namespace, error) {
	timeout := time.NewTimer(waitPod)
	defer timeout.Stop()
	for {
		pod, ns, missing, changed := s.find(namespace, name, uid)
		if missing == "" {
			return pod, ns, nil
		}
		select {
		case <-changed:
		case <-timeout.C:
			return s.ask(ctx, namespace, name, uid, missing)
		case <-ctx.Done():
			return model.Pod{}, model.Namespace{}, fmt.Errorf("wait for pod %s/%s: %w", namespace, name, context.Cause(ctx))
		}
	}
}

// find looks into the cache. It returns what is missing, in words, and a channel
// that is closed when looking again may help.
func (s *Store) find(namespace, name, uid string) (model.Pod, model.Namespace, string, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	known, ok := s.view.pods[key{namespace, name}]
	pod := known.expand()
	missing := mismatch(pod, ok, namespace, name, uid)
	ns, ok := s.view.namespaces[namespace]
	if !ok {
		ns.Name = namespace
	}
	if missing == "" && !ok && !s.impliedNamespaces {
		missing = fmt.Sprintf("namespace %s of pod %s is not known", namespace, name)
	}
	if missing == "" {
		missing = s.doubtful(namespace, name, uid)
	}
	if missing == "" {
		return pod, ns, "", nil
	}
	if s.waiters == nil {
		s.waiters = make(chan struct{})
	}
	return model.Pod{}, model.Namespace{}, missing, s.waiters
}

// doubtful says why a pod from the last good view is not decided on: its name may
// be another's by now, and only the UID tells; and what is newer than that view is
// decided on by the labels of its namespace that are, too.
func (s *Store) doubtful(namespace, name, uid string) string {
	switch {
	case !s.fellBack:
		return ""
	case !s.listed[kindPods] && uid == "":
		return fmt.Sprintf("pod %s/%s is known from before the API server went away, and the runtime names no UID", namespace, name)
	case s.listed[kindPods] && !s.listed[kindNamespaces]:
		return fmt.Sprintf("namespace %s is known only from before the API server went away", namespace)
	}
	return ""
}

// ask is the last resort when a watch lags behind. Its answer is not put into
// the cache, where a pod deleted meanwhile could stay for good.
func (s *Store) ask(ctx context.Context, namespace, name, uid, missing string) (model.Pod, model.Namespace, error) {
	s.mu.RLock()
	lookup := s.lookup
	s.mu.RUnlock()
	if lookup == nil {
		return model.Pod{}, model.Namespace{}, attachpb.PodUnknown.Fail("%s", missing)
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	pod, ns, err := lookup(ctx, namespace, name)
	if err != nil {
		return model.Pod{}, model.Namespace{}, attachpb.PodUnknown.Fail("%s after %v; API server: %v", missing, waitPod, err)
	}
	if missing := mismatch(pod, true, namespace, name, uid); missing != "" {
		return model.Pod{}, model.Namespace{}, attachpb.PodUnknown.Fail("%s", missing)
	}
	return pod, ns, nil
}

// mismatch says why a pod, if there is one, is not the one that is looked for.
func mismatch(pod model.Pod, found bool, namespace, name, uid string) string {
	switch {
	case !found:
		return fmt.Sprintf("pod %s/%s is not known", namespace, name)
	case !pod.HasUID(uid) && pod.Static():
		return fmt.Sprintf("static pod %s/%s is known with the hash %s, the runtime starts %s", namespace, name, pod.MirrorHash, uid)
	case !pod.HasUID(uid):
		return fmt.Sprintf("pod %s/%s is known with the UID %s, the runtime starts %s", namespace, name, pod.UID, uid)
	}
	return ""
}
