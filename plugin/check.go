package main

import (
	"context"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/weirmesh/weir/agent/attachpb"
	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/plugin/capture/nft"
)

// check is CNI CHECK. It does little: it sees that the agent answers and that
// the namespace is there, and that rules which are there can be read. It cannot
// tell a pod that lost its rules from one that is not captured: which of them a
// pod is only the agent knows, which compares and repairs by itself. No runtime
// of Kubernetes calls CHECK.
func check(args *skel.CmdArgs) error {
	start := time.Now()
	c, err := parseConf(args.StdinData)
	if err != nil {
		return err
	}
	if _, err := c.prevResult(); err != nil {
		return err
	}
	pod, err := parseArgs(args.Args)
	if err != nil || pod.exempt(c) {
		return err
	}
	ns, err := openNamespace(args.Netns)
	if err != nil {
		return err
	}
	defer ns.Close()

	ctx, cancel := context.WithDeadline(context.Background(), start.Add(c.Timeout))
	defer cancel()
	conn, err := dial(c.Socket)
	if err != nil {
		return away(err, c.Socket, start)
	}
	defer conn.Close()
	if _, err := attachpb.NewAttachClient(conn).Status(ctx, &attachpb.StatusRequest{}); err != nil {
		return away(err, c.Socket, start)
	}
	st, err := nft.Backend{NS: int(ns.Fd())}.Read()
	if err != nil && !nft.IsUnsupported(err) {
		return attachpb.RulesFailed.Fail("read the rules: %v", err)
	}
	if _, ok := st.Counters[capture.OutTurned]; st.Text != "" && !ok {
		return attachpb.RulesFailed.Fail("the table %q in the pod's namespace is not as weir-cni makes it", capture.TableName)
	}
	return nil
}
