package cri

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// As containerd 2.4 prints it, shortened.
const loaded = `{"PluginDirs":["/opt/cni/bin"],"Networks":[
 {"Config":{"Name":"cni-loopback","Plugins":[{"Network":{"type":"loopback"},"Source":"{\"type\":\"loopback\"}"}]},"IFName":"lo"},
 {"Config":{"Name":"pods","Plugins":[{"Source":"{\"type\":\"bridge\"}"},{"Source":"{\"type\":\"weir-cni\"}"}]},"IFName":"eth0"}]}`

// raw is a message that is encoded already.
type raw struct{}

func (raw) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }
func (raw) Unmarshal(data []byte, v any) error {
	*v.(*[]byte) = data
	return nil
}
func (raw) Name() string { return "raw" }

// serve answers Status as a real gRPC server does. It returns the socket.
func serve(t *testing.T, answer []byte, err error) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	listener, listenErr := net.Listen("unix", socket)
	if listenErr != nil {
		t.Fatal(listenErr)
	}
	server := grpc.NewServer(grpc.ForceServerCodec(raw{}), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		var in []byte
		if err := stream.RecvMsg(&in); err != nil {
			return err
		}
		if name, _ := grpc.MethodFromServerStream(stream); name != method || string(in) != "\x08\x01" {
			return status.Errorf(codes.Unimplemented, "%s %x", name, in)
		}
		if err != nil {
			return err
		}
		return stream.SendMsg(&answer)
	}))
	done := make(chan error)
	go func() { done <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		<-done
	})
	return socket
}

// told is a StatusResponse with a status and the map "info".
func told(info ...string) []byte {
	out := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), []byte("\x0a\x02\x10\x01"))
	for i := 0; i < len(info); i += 2 {
		var pair []byte
		for field, text := range info[i : i+2] {
			pair = protowire.AppendTag(pair, protowire.Number(field+1), protowire.BytesType)
			pair = protowire.AppendString(pair, text)
		}
		out = protowire.AppendBytes(protowire.AppendTag(out, 2, protowire.BytesType), pair)
	}
	return out
}

func TestLoaded(t *testing.T) {
	for _, tt := range []struct {
		name   string
		answer []byte
		err    error
		want   []string
		says   string
	}{
		{"containerd", told("golang", `"go1.26"`, "cniconfig", loaded, "config", "{}"), nil, []string{"loopback", "bridge", "weir-cni"}, ""},
		{"much of it", told("config", strings.Repeat("x", 1<<20), "cniconfig", loaded), nil, []string{"loopback", "bridge", "weir-cni"}, ""},
		{"another runtime", told("config", "{}"), nil, nil, ErrNotTold.Error()},
		{"nothing", nil, nil, nil, ErrNotTold.Error()},
		{"no network yet", told("cniconfig", `{"Networks":null}`), nil, nil, "it has none"},
		{"something else", told("cniconfig", `[]`), nil, nil, ErrNotTold.Error()},
		{"not a message", []byte{0xff}, nil, nil, "ask the runtime"},
		{"refused", nil, status.Error(codes.Unimplemented, "no such service"), nil, "no such service"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Loaded(t.Context(), serve(t, tt.answer, tt.err))
			if tt.says == "" && err != nil || tt.says != "" && (err == nil || !strings.Contains(err.Error(), tt.says)) {
				t.Errorf("error %v, want %q", err, tt.says)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestLoadedWithoutAnAnswer(t *testing.T) {
	if _, err := Loaded(t.Context(), filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("no error without a socket")
	}
	socket := filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", socket) // accepts, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Loaded(ctx, socket); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the deadline", err)
	}
}
