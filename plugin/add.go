package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/weirmesh/weir/agent/attachpb"
	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/plugin/capture/iptables"
	"google.golang.org/grpc"
)

// add is CNI ADD. Either the pod is not to be captured, or its proxy is ready
// and its rules are in force when this returns without an error; after an error
// neither is left.
func add(args *skel.CmdArgs) error {
	start := time.Now()
	c, err := parseConf(args.StdinData)
	if err != nil {
		return err
	}
	result, err := c.prevResult()
	if err != nil {
		return err
	}
	pod, err := parseArgs(args.Args)
	if err != nil {
		return err
	}
	if !pod.exempt(c) {
		ctx, cancel := context.WithDeadline(context.Background(), start.Add(c.Timeout))
		defer cancel()
		if err := attach(ctx, c, args, pod, result, start); err != nil {
			return err
		}
	}
	return types.PrintResult(result, c.cni.CNIVersion)
}

// attach is one attachment: Begin, then Skip, Refused or Spec; Applied, then
// Committed. It returns with ctx's stream ended: where that is before Committed,
// the agent takes the proxy down again.
func attach(ctx context.Context, c conf, args *skel.CmdArgs, pod podArgs, result types.Result, start time.Time) error {
	if uid := os.Geteuid(); uid != 0 {
		return attachpb.Unsupported.Fail("weir-cni runs as uid %d and needs root", uid)
	}
	begin, err := newBegin(args, pod, result)
	if err != nil {
		return err
	}
	begin.CanKeepClient = c.Backend != backendIPTables
	ns, err := openNamespace(args.Netns)
	if err != nil {
		return err
	}
	defer ns.Close()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := dial(c.Socket)
	if err != nil {
		return away(err, c.Socket, start)
	}
	defer conn.Close()
	stream, err := attachpb.NewAttachClient(conn).Add(ctx)
	if err != nil {
		return away(err, c.Socket, start)
	}
	// Send's error says only that the stream ended; Recv's says why.
	_ = stream.Send(&attachpb.AddRequest{Step: &attachpb.AddRequest_Begin{Begin: begin}})
	reply, err := stream.Recv()
	if err != nil {
		return away(err, c.Socket, start)
	}
	switch step := reply.GetStep().(type) {
	case *attachpb.AddReply_Skip:
		return nil
	case *attachpb.AddReply_Refused:
		return refusal(step.Refused)
	case *attachpb.AddReply_Spec:
		spec, err := step.Spec.ToSpec()
		if err != nil {
			return attachpb.RulesFailed.Fail("the agent sent a spec that means nothing: %v", err)
		}
		return capturePod(stream, c, args.ContainerID, ns, spec, start)
	}
	return attachpb.AgentAway.Fail("agent on %s answered with %T, which this weir-cni does not know", node(), reply.GetStep())
}

// capturePod puts the rules in and has them committed. If it fails, they are
// taken out again.
func capturePod(stream grpc.BidiStreamingClient[attachpb.AddRequest, attachpb.AddReply], c conf, container string, ns *os.File, spec capture.Spec, start time.Time) error {
	t := newTarget(c, container, ns)
	applied, err := t.apply(capture.Rules(spec))
	if err != nil {
		err = rulesFailed(err)
	} else if err = commit(stream, applied, c.Socket, start); err == nil {
		return nil
	}
	// Best effort: the runtime is about to throw the namespace away.
	if undo := t.undo(); undo != nil {
		slog.Warn("take the rules out again", "container", container, "error", undo)
	}
	return err
}

func rulesFailed(err error) error {
	if _, ok := errors.AsType[*attachpb.Failure](err); ok {
		return err
	}
	if refused, ok := errors.AsType[*iptables.RefusedError](err); ok {
		return attachpb.Unsupported.Fail("%v", refused)
	}
	return attachpb.RulesFailed.Fail("%v", err)
}

func commit(stream grpc.BidiStreamingClient[attachpb.AddRequest, attachpb.AddReply], applied *attachpb.Applied, socket string, start time.Time) error {
	_ = stream.Send(&attachpb.AddRequest{Step: &attachpb.AddRequest_Applied{Applied: applied}})
	reply, err := stream.Recv()
	if err != nil {
		return away(err, socket, start)
	}
	switch step := reply.GetStep().(type) {
	case *attachpb.AddReply_Committed:
		return nil
	case *attachpb.AddReply_Refused:
		return refusal(step.Refused)
	}
	return attachpb.AgentAway.Fail("agent on %s answered Applied with %T", node(), reply.GetStep())
}

// refusal passes on what the agent says, under the number that its code has.
func refusal(r *attachpb.Refused) error {
	code, ok := attachpb.CodeByID(r.GetCode())
	switch {
	case !ok && r.GetMessage() == "":
		return attachpb.Unsupported.Fail("the agent refused without saying why")
	case !ok:
		// An agent newer than this plugin: its words, and a number that has
		// kubelet try again, as it would anyway.
		return types.NewError(types.ErrTryAgainLater, oneLine(r.GetMessage()), "")
	case r.GetMessage() == "":
		return code.Fail("")
	}
	return types.NewError(code.CNI, oneLine(r.GetMessage()), "")
}

func newBegin(args *skel.CmdArgs, pod podArgs, result types.Result) (*attachpb.Begin, error) {
	current, err := types100.NewResultFromResult(result)
	if err != nil {
		return nil, attachpb.BadInput.Fail("prevResult: %v", err)
	}
	b := &attachpb.Begin{
		ContainerId:  args.ContainerID,
		Ifname:       args.IfName,
		Netns:        args.Netns,
		PodNamespace: pod.Namespace,
		PodName:      pod.Name,
		PodUid:       pod.UID,
	}
	for i, ip := range current.IPs {
		if ip == nil || ip.Address.IP == nil {
			return nil, attachpb.BadInput.Fail("prevResult: ips[%d] has no address", i)
		}
		b.Addresses = append(b.Addresses, fmt.Sprint(ip.Address.IP))
	}
	return b, nil
}
