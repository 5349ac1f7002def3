package cluster

import (
	"context"
	"log/slog"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"

	"github.com/weirmesh/weir/agent/model"
)

// Types of events.
const (
	EventNormal  = corev1.EventTypeNormal
	EventWarning = corev1.EventTypeWarning
)

// Reasons of events on pods.
const (
	CaptureFailed      = "CaptureFailed"
	InvalidAnnotation  = "InvalidAnnotation"
	CaptureRepaired    = "CaptureRepaired"
	DriftRepaired      = "DriftRepaired"
	CaptureReleased    = "CaptureReleased"
	ProxyRestarted     = "ProxyRestarted"
	ProxyUpgraded      = "ProxyUpgraded"
	CertificateRefused = "CertificateRefused"
)

// Reasons of events on nodes.
const (
	ConnectTimeBalancing = "ConnectTimeBalancing"
)

// maxEventMessage is how long an event's message may be, in bytes
// (events.k8s.io/v1, field note).
const maxEventMessage = 1024

// Recorder tells pods' owners what happened to their pods, and operators what a
// node is like. Use NewRecorder, or a
// Recorder with only Log set where there is no API server: it then logs.
type Recorder struct {
	Log *slog.Logger

	node        string                  // this node's name in the cluster
	broadcaster record.EventBroadcaster // nil: log
	events      record.EventRecorder
}

// NewRecorder makes a Recorder that writes events to the API server from
// goroutines of its own, as long as the process runs. Repeated events are counted in
// one, and a pod gets at most 25 at once, then one every five minutes.
func (a *API) NewRecorder() *Recorder {
	ctx := klog.NewContext(context.Background(), logr.FromSlogHandler(a.log.Handler()))
	broadcaster := record.NewBroadcaster(record.WithContext(ctx))
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: a.client.CoreV1().Events("")})
	source := corev1.EventSource{Component: "weir-agent", Host: a.node}
	return &Recorder{Log: a.log, node: a.node, broadcaster: broadcaster, events: broadcaster.NewRecorder(scheme.Scheme, source)}
}

// PodEvent records one event; eventType is EventNormal or EventWarning. It does
// not wait for the API server, and an event that the server does not take is
// lost after a few attempts.
func (r *Recorder) PodEvent(pod model.Pod, eventType, reason, message string) {
	if r.broadcaster == nil {
		r.log(eventType, "pod", pod.ID(), "reason", reason, "message", message)
		return
	}
	r.record(&corev1.ObjectReference{
		APIVersion: "v1", Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: types.UID(pod.UID),
	}, eventType, reason, message)
}

// NodeEvent records one event on this node, as PodEvent does.
func (r *Recorder) NodeEvent(eventType, reason, message string) {
	if r.broadcaster == nil {
		r.log(eventType, "reason", reason, "message", message)
		return
	}
	// Its name for its UID, as kubelet and `kubectl describe node` have it; the
	// event itself is in namespace "default".
	r.record(&corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: r.node, UID: types.UID(r.node)}, eventType, reason, message)
}

func (r *Recorder) record(about *corev1.ObjectReference, eventType, reason, message string) {
	if len(message) > maxEventMessage {
		message = message[:maxEventMessage-3] + "..."
	}
	r.events.Event(about, eventType, reason, message)
}

func (r *Recorder) log(eventType string, args ...any) {
	level := slog.LevelInfo
	if eventType == EventWarning {
		level = slog.LevelWarn
	}
	r.Log.Log(context.Background(), level, "event", args...)
}
