package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/weirmesh/weir/agent/attachpb"
)

// gcTimeout bounds GC.
const gcTimeout = 5 * time.Second

// gc is CNI GC (1.1.0): the agent ends every attachment that the runtime does not
// list as valid. Like DEL it is best effort: the agent notices by itself when a
// namespace is gone, and must, as runtimes before containerd 2.0 never call GC.
func gc(args *skel.CmdArgs) error {
	c, err := parseConf(args.StdinData)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), gcTimeout)
	defer cancel()
	conn, err := dial(c.Socket)
	if err != nil {
		slog.Warn("GC could not be told to the agent", "error", err)
		return nil
	}
	defer conn.Close()
	if _, err := attachpb.NewAttachClient(conn).GC(ctx, gcRequest(c.cni.ValidAttachments)); err != nil {
		slog.Warn("GC could not be told to the agent", "error", err)
	}
	return nil
}

func gcRequest(valid []types.GCAttachment) *attachpb.GCRequest {
	out := &attachpb.GCRequest{}
	for _, a := range valid {
		out.Valid = append(out.Valid, &attachpb.Sandbox{ContainerId: a.ContainerID, Ifname: a.IfName})
	}
	return out
}
