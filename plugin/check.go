package main

import (
	"context"
	"os"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/weirmesh/weir/agent/attachpb"
	"github.com/weirmesh/weir/plugin/capture"
)

// check is CNI CHECK: it asks the agent what should be in the namespace, compares
// rules, sysctls and the bypass's cgroup with it, and fails with the first
// difference, or with what the agent finds wrong with the proxy. It repairs
// nothing; the agent does, by itself.
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
	reply, err := attachpb.NewAttachClient(conn).Check(ctx, &attachpb.CheckRequest{
		ContainerId: args.ContainerID, Ifname: args.IfName, Netns: args.Netns,
	})
	if err != nil {
		return away(err, c.Socket, start)
	}
	if reply.GetFault() != "" {
		return attachpb.Drifted.Fail("%s", reply.GetFault())
	}
	if reply.GetSpec() == nil {
		return checkUncaptured(ns)
	}
	spec, err := reply.GetSpec().ToSpec()
	if err != nil {
		return attachpb.RulesFailed.Fail("the agent sent a spec that means nothing: %v", err)
	}
	found, err := newTarget(c, args.ContainerID, ns).compare(capture.Rules(spec))
	switch {
	case err != nil:
		return attachpb.RulesFailed.Fail("compare the rules: %v", err)
	case found.Difference != "":
		return attachpb.Drifted.Fail("the pod's namespace is not as it was left: %s", found.Difference)
	}
	return nil
}

// checkUncaptured sees that a pod which is not captured has no rules.
func checkUncaptured(ns *os.File) error {
	found, err := readAny(ns)
	if err != nil {
		return attachpb.RulesFailed.Fail("read the rules: %v", err)
	}
	if found.Backend != "none" {
		return attachpb.Drifted.Fail("the pod is not captured, and there are capture rules in its namespace")
	}
	return nil
}
