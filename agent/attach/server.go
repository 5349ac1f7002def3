// Package attach answers the plugin: it is the gRPC server on the node's attach
// socket. For each ADD it looks the pod up, decides, has a proxy started, hands
// the plugin its Spec, and commits when the rules are in place; a stream that
// breaks before takes the proxy down again.
//
// It holds no state of its own: attachments are launch's, decisions decide's.
package attach

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"github.com/weirmesh/weir/agent/attachpb"
	"github.com/weirmesh/weir/agent/decide"
	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/agent/telemetry"
)

// Pods finds a pod and its namespace.
type Pods interface {
	WaitPod(ctx context.Context, namespace, name, uid string) (model.Pod, model.Namespace, error)
}

// Server implements attachpb.AttachServer.
type Server struct {
	attachpb.UnimplementedAttachServer

	Pods    Pods
	Decide  decide.Options
	Proxies *launch.Manager
	Version string
	Metrics *telemetry.Metrics
	// Release lets every pod of the node go, and says how many proxies have
	// connections still.
	Release func(context.Context) (draining int, err error)
	// Event tells the pod's owner; it may be nil.
	Event func(pod model.Pod, eventType, reason, message string)
	Log   *slog.Logger

	leaving atomic.Bool
}

// leavingReason is why no pod is captured any more.
const leavingReason = "Weir is being taken off this node"

// addTimeout bounds one ADD on this side; the plugin has a bound of its own.
const addTimeout = 30 * time.Second

// Add is one attachment, from Begin to Committed.
func (s *Server) Add(stream grpc.BidiStreamingServer[attachpb.AddRequest, attachpb.AddReply]) error {
	ctx, cancel := context.WithTimeout(stream.Context(), addTimeout)
	defer cancel()
	msg, err := stream.Recv()
	if err != nil {
		return err
	}
	begin := msg.GetBegin()
	if begin == nil {
		return errors.New("attach: the stream must start with Begin")
	}
	log := s.Log.With("pod", begin.GetPodNamespace()+"/"+begin.GetPodName(), "container", begin.GetContainerId())
	if s.leaving.Load() {
		log.Info("pod not captured", "reason", leavingReason)
		return stream.Send(&attachpb.AddReply{Step: &attachpb.AddReply_Skip{Skip: &attachpb.Skip{Reason: leavingReason}}})
	}

	began := time.Now()
	pod, dec, err := s.decision(ctx, begin)
	s.Metrics.Phase("decide", time.Since(began))
	if err != nil {
		return s.refuse(stream, log, pod, err)
	}
	if dec.Warning != "" {
		s.event(pod, "Warning", "CaptureFailed", dec.Warning)
	}
	if !dec.Captured {
		log.Info("pod not captured", "reason", dec.Reason)
		return stream.Send(&attachpb.AddReply{Step: &attachpb.AddReply_Skip{Skip: &attachpb.Skip{Reason: dec.Reason}}})
	}

	started := time.Now()
	// The plugin has its Spec while the proxy starts: no process of the pod is
	// there to meet rules without a proxy, and ADD returns when both are ready.
	a, err := s.start(ctx, begin, pod, dec, func(a launch.Attachment) error {
		// Again, now that Leave would find the attachment.
		if s.leaving.Load() {
			return fmt.Errorf("not captured: %s", leavingReason)
		}
		return stream.Send(&attachpb.AddReply{Step: &attachpb.AddReply_Spec{Spec: attachpb.FromSpec(a.Spec)}})
	})
	if err != nil {
		return s.refuse(stream, log, pod, err)
	}
	ready := time.Since(started)
	s.Metrics.Phase("ready", ready)
	applied, err := s.finish(stream, a)
	if err != nil {
		s.Proxies.End(begin.GetContainerId(), begin.GetIfname())
		s.Metrics.Operation("add", err)
		log.Warn("attachment undone: the plugin did not finish", "error", err)
		return err
	}
	s.Metrics.Operation("add", nil)
	s.Metrics.Phase("rules", time.Duration(applied.GetTookMicros())*time.Microsecond)
	log.Info("pod captured", "reason", dec.Reason, "addresses", begin.GetAddresses(), "proxy_uid", a.ProxyUID,
		"proxy_ms", ms(ready), "backend", applied.GetBackend(), "client_address", a.Spec.KeepClient, "rules_ms", float64(applied.GetTookMicros())/1000, "total_ms", ms(time.Since(started)))
	return nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// decision finds the pod and decides. The pod is returned as far as it is known.
func (s *Server) decision(ctx context.Context, begin *attachpb.Begin) (model.Pod, decide.Decision, error) {
	if dec, known := decide.Unseen(begin.GetPodUid(), s.Decide); known {
		return model.Pod{}, dec, nil
	}
	pod, ns, err := s.Pods.WaitPod(ctx, begin.GetPodNamespace(), begin.GetPodName(), begin.GetPodUid())
	if ctx.Err() != nil {
		err = attachpb.PodUnknown.Fail("pod %s/%s: %v", begin.GetPodNamespace(), begin.GetPodName(), ctx.Err())
	}
	if err != nil {
		return model.Pod{}, decide.Decision{}, err
	}
	dec, err := decide.Capture(pod, ns, s.Decide)
	return pod, dec, err
}

// start has the pod's proxy started, ready when it returns; claimed is told of the
// attachment before.
func (s *Server) start(ctx context.Context, begin *attachpb.Begin, pod model.Pod, dec decide.Decision, claimed func(launch.Attachment) error) (launch.Attachment, error) {
	req := launch.Request{
		ContainerID:  begin.GetContainerId(),
		IfName:       begin.GetIfname(),
		Netns:        begin.GetNetns(),
		PodNamespace: begin.GetPodNamespace(),
		PodName:      begin.GetPodName(),
		PodUID:       begin.GetPodUid(),
		PodLabels:    pod.KnownLabels(),
		Spec:         dec.Spec,
		Limits:       launch.Limits{Memory: dec.Proxy.MemoryLimit, CPUWeight: dec.Proxy.CPUWeight},
		OpaquePorts:  dec.Proxy.OpaquePorts,
	}
	// Decided here, before anything is started, and once for both sides of it: the
	// rules are made and the proxy is launched by the one Spec that the attachment
	// keeps. A plugin that cannot do what the Spec says fails the ADD.
	req.Spec.KeepClient = req.Spec.KeepClient && begin.GetCanKeepClient()
	for _, text := range begin.GetAddresses() {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return launch.Attachment{}, attachpb.BadArgs.Fail("address %q of prevResult: %v", text, err)
		}
		req.Addresses = append(req.Addresses, addr)
	}
	a, err := s.Proxies.Start(ctx, req, claimed)
	var wrong *launch.NamespaceError
	var limit *launch.LimitError
	switch {
	case errors.As(err, &wrong):
		return launch.Attachment{}, attachpb.WrongNamespace.Fail("%v", err)
	case errors.As(err, &limit):
		return launch.Attachment{}, attachpb.Unsupported.Fail("%v", err)
	case err != nil:
		return launch.Attachment{}, attachpb.ProxyFailed.Fail("%v", err)
	}
	return a, nil
}

// finish waits until the Spec is applied, and commits.
func (s *Server) finish(stream grpc.BidiStreamingServer[attachpb.AddRequest, attachpb.AddReply], a launch.Attachment) (*attachpb.Applied, error) {
	msg, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	if msg.GetApplied() == nil {
		return nil, errors.New("attach: Applied was due")
	}
	if err := s.Proxies.Commit(a.ContainerID); err != nil {
		return nil, fmt.Errorf("attach: %w", err)
	}
	// A plugin that does not get to read this fails its ADD, and the runtime's DEL
	// ends the attachment.
	return msg.GetApplied(), stream.Send(&attachpb.AddReply{Step: &attachpb.AddReply_Committed{Committed: &attachpb.Committed{}}})
}

// refuse answers with an error that has a code, and tells the pod's owner.
func (s *Server) refuse(stream grpc.BidiStreamingServer[attachpb.AddRequest, attachpb.AddReply], log *slog.Logger, pod model.Pod, cause error) error {
	var failure *attachpb.Failure
	if !errors.As(cause, &failure) {
		failure = attachpb.ProxyFailed.Fail("%v", cause)
	}
	s.Metrics.Operation("add", failure)
	log.Warn("attachment refused", "error", failure)
	reason := "CaptureFailed"
	if failure.Code.ID == attachpb.InvalidRequest.ID {
		reason = "InvalidAnnotation"
	}
	s.event(pod, "Warning", reason, failure.Error())
	return stream.Send(&attachpb.AddReply{Step: &attachpb.AddReply_Refused{
		Refused: &attachpb.Refused{Code: failure.Code.ID, Message: failure.Error()},
	}})
}

// event tells the pod's owner, where the pod is known and there is a way.
func (s *Server) event(pod model.Pod, eventType, reason, message string) {
	if s.Event != nil && pod.Name != "" {
		s.Event(pod, eventType, reason, message)
	}
}

// Del ends an attachment.
func (s *Server) Del(_ context.Context, req *attachpb.DelRequest) (*attachpb.DelReply, error) {
	s.Proxies.End(req.GetContainerId(), req.GetIfname())
	s.Proxies.EndNamespace(req.GetNetns())
	return &attachpb.DelReply{}, nil
}

// Check tells what should be in a sandbox.
func (s *Server) Check(_ context.Context, req *attachpb.CheckRequest) (*attachpb.CheckReply, error) {
	for _, a := range s.Proxies.List() {
		if a.Committed && !a.Released && a.Identified() && s.Proxies.Is(a, req.GetContainerId(), req.GetNetns()) {
			return &attachpb.CheckReply{Spec: attachpb.FromSpec(a.Spec), Fault: s.Proxies.Fault(a)}, nil
		}
	}
	return &attachpb.CheckReply{}, nil
}

// GC ends attachments that the runtime does not list. Those under way are left
// alone, and those that were captured in place, which it has under other names;
// they end with their namespaces.
func (s *Server) GC(_ context.Context, req *attachpb.GCRequest) (*attachpb.GCReply, error) {
	valid := map[string]bool{}
	for _, v := range req.GetValid() {
		valid[v.GetContainerId()] = true
	}
	for _, a := range s.Proxies.List() {
		if a.Committed && !a.InPlace() && !valid[a.ContainerID] {
			s.Log.Info("the runtime no longer knows this sandbox, its proxy ends", "pod", a.PodNamespace+"/"+a.PodName, "container", a.ContainerID)
			s.Proxies.End(a.ContainerID, "")
		}
	}
	return &attachpb.GCReply{}, nil
}

// Status answers: whoever can ask can ADD.
func (s *Server) Status(context.Context, *attachpb.StatusRequest) (*attachpb.StatusReply, error) {
	return &attachpb.StatusReply{Version: s.Version}, nil
}

// Leave has no pod captured any more, and lets those go that are.
func (s *Server) Leave(ctx context.Context, _ *attachpb.LeaveRequest) (*attachpb.LeaveReply, error) {
	s.leaving.Store(true)
	draining, err := s.Release(ctx)
	return &attachpb.LeaveReply{Draining: uint32(draining)}, err
}
