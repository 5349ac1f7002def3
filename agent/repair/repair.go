// Package repair makes the node's pods as they should be, while they run: one
// that should be captured and is not (it started before the plugin was chained,
// or got its label later) is captured in place, one whose label went is let go,
// and rules that are not as they were left are put right. Nothing of it restarts
// a pod or cuts a connection.
//
// A round looks at everything: pods as the cluster has them, attachments as the
// node has them, rules as the kernel has them. Rounds come when the cluster
// changed and at least every Interval. What is to be done is decided by plan,
// which is pure; the proxies are package launch's, and the rules weir-cni's.
package repair

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/weirmesh/weir/agent/decide"
	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/model"
)

// Interval is how long a difference may stand unnoticed.
const Interval = 20 * time.Second

// settle is how long a change of the cluster waits for those that come with it.
const settle = 200 * time.Millisecond

// startTimeout bounds the start of one proxy.
const startTimeout = 5 * time.Second

// View is what of the cluster is looked at.
type View interface {
	Pods() []model.Pod
	Namespace(name string) model.Namespace
}

// Proxies is what of package launch is used.
type Proxies interface {
	List() []launch.Attachment
	Sandboxes() ([]launch.Sandbox, error)
	Start(context.Context, launch.Request, func(launch.Attachment) error) (launch.Attachment, error)
	Commit(id string) error
	Identify(id string, pod launch.Request) error
	Change(id string, traffic launch.Traffic) (launch.Attachment, error)
	Farewell(id string) error
	Release(id string) error
	End(id, ifname string)
	PodEnded(id string) bool
	Rules(context.Context, []launch.Task) ([]launch.Done, error)
}

// Loop is the node's repair.
type Loop struct {
	View    View
	Proxies Proxies
	// Current reports whether View is the cluster's. Before, it is what another agent
	// knew last, and says nothing of who has a pod's address now: no pod is captured
	// or let go by it.
	Current func() bool
	Decide  decide.Options
	// Event tells a pod's owner.
	Event func(pod model.Pod, eventType, reason, message string)
	// Count counts what was done: op is "capture", "release" or "repair".
	Count func(op string, err error)
	// Farewell is how long it takes until all who reach a pod have heard that it is
	// captured no longer: until then they speak mTLS with it.
	Farewell time.Duration
	Log      *slog.Logger

	mu   sync.Mutex        // held by a round, and by Leave
	left bool              // Leave was called: there are no rounds any more
	said map[string]string // pod → the last complaint about it
}

// Run goes its rounds until ctx is done. A receive from changed says that the
// cluster is another.
func (l *Loop) Run(ctx context.Context, changed <-chan struct{}) {
	for {
		l.round(ctx)
		select {
		case <-ctx.Done():
			return
		case <-changed:
			select {
			case <-ctx.Done():
				return
			case <-time.After(settle):
			}
		case <-time.After(Interval):
		}
	}
}

// round makes everything as it should be, as far as it can.
func (l *Loop) round(ctx context.Context) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.left {
		return
	}
	pods := l.View.Pods()
	if l.Current() {
		l.converge(ctx, pods)
	}
	l.compare(ctx, pods)
	l.forget(pods)
}

// converge makes every pod as decide has it.
func (l *Loop) converge(ctx context.Context, pods []model.Pod) {
	l.identify(pods)
	p := plan(pods, l.View.Namespace, l.Proxies.List(), l.Decide)
	for _, c := range p.complaints {
		l.complain(c)
	}
	l.farewell(ctx, p.release)
	for _, r := range p.release {
		l.release(ctx, r)
	}
	for _, c := range p.change {
		if _, err := l.Proxies.Change(c.attachment.ContainerID, c.traffic); err != nil {
			l.Log.Warn("capture not changed", "pod", c.pod.ID(), "error", err)
		}
	}
	if len(p.capture) > 0 {
		l.captureAll(ctx, p.capture)
	}
}

// identify finds the pods of attachments that were rebuilt, by their addresses.
func (l *Loop) identify(pods []model.Pod) {
	for _, a := range l.Proxies.List() {
		if a.Identified() {
			continue
		}
		pod, err := findPod(pods, a)
		if err == nil {
			// What it asks for, as far as that means anything; plan says the rest.
			dec, _ := decide.Capture(pod, l.View.Namespace(pod.Namespace), l.Decide)
			err = l.Proxies.Identify(a.ContainerID, request(pod, dec))
		}
		if err != nil {
			l.Log.Warn("rebuilt attachment is of no pod that is known", "container", a.ContainerID, "error", err)
			continue
		}
		l.Log.Info("rebuilt attachment identified", "container", a.ContainerID, "pod", pod.ID())
		l.Event(pod, "Warning", "CaptureRepaired", "the node had lost what it knew of this pod's capture, and found it out again; its proxy and its connections went on")
	}
}

// complaint is what a pod's owner is told once, until it is another.
type complaint struct {
	pod             model.Pod
	reason, message string
}

func (l *Loop) complain(c complaint) {
	if l.said[c.pod.ID()] == c.message {
		return
	}
	if l.said == nil {
		l.said = map[string]string{}
	}
	l.said[c.pod.ID()] = c.message
	l.Log.Warn("pod not as it should be", "pod", c.pod.ID(), "reason", c.reason, "error", c.message)
	l.Event(c.pod, "Warning", c.reason, c.message)
}

// forget drops complaints about pods that are gone.
func (l *Loop) forget(pods []model.Pod) {
	there := map[string]bool{}
	for _, p := range pods {
		there[p.ID()] = true
	}
	for id := range l.said {
		if !there[id] {
			delete(l.said, id)
		}
	}
}

// captureAll captures running pods in place. Their namespaces are found by their
// addresses, of which each must be in one namespace only.
func (l *Loop) captureAll(ctx context.Context, wanted []attempt) {
	sandboxes, err := l.Proxies.Sandboxes()
	if err != nil {
		l.Log.Error("network namespaces not listed", "error", err)
		return
	}
	for _, c := range wanted {
		if ctx.Err() != nil {
			return
		}
		sandbox, err := find(sandboxes, c.pod)
		if err == nil {
			err = l.capture(ctx, c, sandbox)
		}
		l.Count("capture", err)
		if err != nil {
			l.complain(complaint{c.pod, "CaptureFailed", "not captured in place: " + err.Error() + "; the agent tries again"})
			continue
		}
		delete(l.said, c.pod.ID())
		l.Log.Info("pod captured in place", "pod", c.pod.ID(), "reason", c.dec.Reason)
		l.Event(c.pod, "Normal", "CaptureRepaired", "captured in place, without a restart: "+c.dec.Reason)
	}
}

// capture captures one running pod: first the proxy, then the rules.
func (l *Loop) capture(ctx context.Context, c attempt, sandbox launch.Sandbox) error {
	req, found := request(c.pod, c.dec), sandbox.Request()
	req.ContainerID, req.IfName, req.Netns, req.Addresses = found.ContainerID, found.IfName, found.Netns, found.Addresses
	a, err := l.start(ctx, req)
	if err != nil {
		return err
	}
	err = l.do(ctx, launch.Task{Netns: a.Netns, Do: launch.Apply, Spec: a.Spec})
	if err == nil {
		err = l.Proxies.Commit(a.ContainerID)
	}
	if err != nil {
		// Rules without a proxy would cut the pod off.
		err = errors.Join(err, l.do(ctx, launch.Task{Netns: a.Netns, Do: launch.Delete, Spec: a.Spec}))
		l.Proxies.End(a.ContainerID, "")
	}
	return err
}

// request is what a pod is and asks for, without its sandbox.
func request(pod model.Pod, dec decide.Decision) launch.Request {
	return launch.Request{
		PodNamespace: pod.Namespace, PodName: pod.Name, PodUID: pod.UID, PodLabels: pod.KnownLabels(),
		Spec:        dec.Spec,
		Limits:      launch.Limits{Memory: dec.Proxy.MemoryLimit, CPUWeight: dec.Proxy.CPUWeight},
		OpaquePorts: dec.Proxy.OpaquePorts,
	}
}

// otherPorts are for pods in which somebody listens on the usual ones.
var otherPorts = [][2]uint16{{0, 0}, {15011, 15016}, {15021, 15026}}

// start has a proxy started, on the first pair of ports that is free.
func (l *Loop) start(ctx context.Context, req launch.Request) (launch.Attachment, error) {
	var failed error
	for _, ports := range otherPorts {
		req.Spec.OutboundPort, req.Spec.InboundPort = ports[0], ports[1]
		starting, cancel := context.WithTimeout(ctx, startTimeout)
		a, err := l.Proxies.Start(starting, req, func(launch.Attachment) error { return nil })
		cancel()
		if err == nil || !launch.IsAddressInUse(err) {
			return a, err
		}
		failed = err
	}
	return launch.Attachment{}, failed
}

// farewell has it said that these pods will be let go, and waits until it is heard.
func (l *Loop) farewell(ctx context.Context, all []release) {
	if len(all) == 0 {
		return
	}
	for _, r := range all {
		_ = l.Proxies.Farewell(r.attachment.ContainerID) // one that has ended is not released either
	}
	select {
	case <-time.After(l.Farewell):
	case <-ctx.Done():
	}
}

// release lets one pod go. Its proxy ends with the last connection.
func (l *Loop) release(ctx context.Context, r release) {
	l.released(r, l.do(ctx, launch.Task{Netns: r.attachment.Netns, Do: launch.Release, Spec: r.attachment.Spec}))
}

// released goes on where the rules of a pod turn nothing new aside any more, or
// err is why they still do.
func (l *Loop) released(r release, err error) {
	if err == nil {
		err = l.Proxies.Release(r.attachment.ContainerID)
	}
	l.Count("release", err)
	if err != nil {
		l.complain(complaint{r.pod, "CaptureFailed", "not released: " + err.Error() + "; the agent tries again"})
		return
	}
	l.Log.Info("pod released", "pod", r.pod.ID(), "reason", r.reason)
	l.Event(r.pod, "Normal", "CaptureReleased", "no longer captured: "+r.reason+"; connections that the proxy has go on until they end")
}

// Drained takes the last rules out of a pod whose released proxy has ended.
func (l *Loop) Drained(a launch.Attachment) {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	if err := l.do(ctx, launch.Task{Netns: a.Netns, Do: launch.Delete, Spec: a.Spec}); err != nil {
		l.Log.Warn("rules of a released pod not taken out", "pod", a.PodNamespace+"/"+a.PodName, "error", err)
	}
}

// compare puts right what is not as it was left, in all namespaces at once.
func (l *Loop) compare(ctx context.Context, pods []model.Pod) {
	var attachments []launch.Attachment
	var tasks []launch.Task
	for _, a := range l.Proxies.List() {
		if a.Committed && !a.Released && a.Identified() {
			attachments = append(attachments, a)
			tasks = append(tasks, launch.Task{Netns: a.Netns, Do: launch.Apply, Spec: a.Spec})
		}
	}
	if len(tasks) == 0 {
		return
	}
	done, err := l.Proxies.Rules(ctx, tasks)
	if err != nil {
		if ctx.Err() == nil {
			l.Log.Error("rules not compared", "error", err)
		}
		return
	}
	for i, d := range done {
		a := attachments[i]
		switch {
		case d.Error == "" && !d.Changed:
		case l.Proxies.PodEnded(a.ContainerID):
			// The runtime takes the network down, or has: nobody misses it.
			l.Log.Debug("rules of a pod that ends", "pod", a.PodNamespace+"/"+a.PodName, "difference", d.Difference, "error", d.Error)
		case d.Error != "":
			l.Log.Warn("rules not compared", "pod", a.PodNamespace+"/"+a.PodName, "error", d.Error)
			l.Count("repair", errors.New(d.Error))
		default:
			l.Count("repair", nil)
			l.Log.Warn("drift repaired", "pod", a.PodNamespace+"/"+a.PodName, "difference", d.Difference)
			l.Event(podOf(a, pods), "Warning", "DriftRepaired", "the capture rules were not as they were left, and were put right: "+d.Difference)
		}
	}
}

// do has one task done.
func (l *Loop) do(ctx context.Context, t launch.Task) error {
	done, err := l.Proxies.Rules(ctx, []launch.Task{t})
	if err != nil {
		return err
	}
	return done[0].Err()
}

func podOf(a launch.Attachment, pods []model.Pod) model.Pod {
	for _, p := range pods {
		if p.Namespace == a.PodNamespace && p.Name == a.PodName && p.HasUID(a.PodUID) {
			return p
		}
	}
	return model.Pod{Namespace: a.PodNamespace, Name: a.PodName, UID: a.PodUID}
}
