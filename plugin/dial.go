package main

import (
	"context"
	"errors"
	"io"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/attachpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	grpcstatus "google.golang.org/grpc/status"
)

// dial makes a client of the agent's socket; nothing is opened before the first
// call. No transport security: the socket lies in a folder that only root may
// enter, and the agent asks the kernel who calls.
func dial(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		// The machine's proxy settings are for the internet.
		grpc.WithNoProxy(),
		// Whoever configures gRPC by DNS TXT records does not mean this socket.
		grpc.WithDisableServiceConfig())
}

// away says in which way the agent did not answer a call that began at start.
// An agent that is not there at all is an answer at once; kubelet tries again.
func away(err error, socket string, start time.Time) *attachpb.Failure {
	after := time.Since(start).Round(100 * time.Millisecond)
	switch {
	case errors.Is(err, io.EOF):
		return attachpb.AgentAway.Fail("agent on %s ended the call after %s", node(), after)
	case errors.Is(err, context.DeadlineExceeded), grpcstatus.Code(err) == codes.DeadlineExceeded:
		return attachpb.AgentAway.Fail("agent on %s silent for %s", node(), after)
	case grpcstatus.Code(err) == codes.Unavailable:
		return attachpb.AgentAway.Fail("agent on %s does not answer at %s: %s", node(), socket, reason(err))
	}
	return attachpb.AgentAway.Fail("agent on %s broke off after %s: %s", node(), after, reason(err))
}

// reason is what is left of a gRPC error without what only developers want.
func reason(err error) string {
	msg := grpcstatus.Convert(err).Message()
	for _, wrapping := range []string{"transport: Error while dialing: ", "transport: "} {
		if _, inner, ok := strings.Cut(msg, wrapping); ok {
			return strings.TrimSuffix(inner, `"`)
		}
	}
	return msg
}
