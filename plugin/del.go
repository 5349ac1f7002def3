package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/weirmesh/weir/agent/attachpb"
)

// delTimeout leaves something of the second that DEL may take.
const delTimeout = 800 * time.Millisecond

// del is CNI DEL: it tells the agent that the attachment is over, and succeeds
// whatever comes of it. An error would keep a pod from going away, and the agent
// notices by itself when a namespace is gone. No rules are deleted: they go with
// the namespace, and deleting waits for RCU.
func del(args *skel.CmdArgs) error {
	ctx, cancel := context.WithTimeout(context.Background(), delTimeout)
	defer cancel()
	c, err := parseConf(args.StdinData)
	if err != nil {
		slog.Warn("DEL goes on with the default configuration", "error", err)
		c = defaults()
	}
	// Nobody was asked about the pods of exempt namespaces.
	if pod, err := parseArgs(args.Args); err == nil && pod.exempt(c) {
		return nil
	}
	conn, err := dial(c.Socket)
	if err != nil {
		slog.Warn("DEL could not be told to the agent", "container", args.ContainerID, "error", err)
		return nil
	}
	defer conn.Close()
	if _, err := attachpb.NewAttachClient(conn).Del(ctx, &attachpb.DelRequest{ContainerId: args.ContainerID, Ifname: args.IfName, Netns: args.Netns}); err != nil {
		slog.Warn("DEL could not be told to the agent", "container", args.ContainerID, "error", err)
	}
	return nil
}
