package agent

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weirmesh/weir/agent/attachpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server answers Leave as the agent does, in the types that it uses.
type server struct {
	attachpb.UnimplementedAttachServer
	draining uint32
	err      error
}

func (s server) Leave(context.Context, *attachpb.LeaveRequest) (*attachpb.LeaveReply, error) {
	return &attachpb.LeaveReply{Draining: s.draining}, s.err
}

func serve(t *testing.T, s server) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	attachpb.RegisterAttachServer(g, s)
	done := make(chan error)
	go func() { done <- g.Serve(listener) }()
	t.Cleanup(func() {
		g.Stop()
		<-done
	})
	return socket
}

func TestLeave(t *testing.T) {
	for _, want := range []uint32{0, 1, 300} {
		if got, err := Leave(t.Context(), serve(t, server{draining: want})); got != int(want) || err != nil {
			t.Errorf("%d, %v, want %d", got, err, want)
		}
	}
	_, err := Leave(t.Context(), serve(t, server{err: status.Error(codes.Unknown, "2 pods are still captured")}))
	if err == nil || !strings.Contains(err.Error(), "2 pods are still captured") {
		t.Errorf("%v, want what the agent says", err)
	}
	socket := filepath.Join(t.TempDir(), "nobody")
	if _, err := Leave(t.Context(), socket); err == nil || !strings.Contains(err.Error(), socket) {
		t.Errorf("%v, want one that names %s", err, socket)
	}
}
