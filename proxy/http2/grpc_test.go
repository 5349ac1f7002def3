package http2_test

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weirmesh/weir/proxy/http2"
)

// The test's service: one method that is all kinds of streams, by what the client
// and the server do with it.
var description = grpc.ServiceDesc{
	ServiceName: "test.Echo",
	HandlerType: (*any)(nil),
	Streams: []grpc.StreamDesc{{
		StreamName: "Echo", ClientStreams: true, ServerStreams: true,
		Handler: func(_ any, s grpc.ServerStream) error { return echo(s) },
	}},
}

// echo sends each message back, twice if it begins with "2". At "fail" it ends with
// an error, at "last" in good order.
func echo(s grpc.ServerStream) error {
	md, _ := metadata.FromIncomingContext(s.Context())
	s.SetTrailer(metadata.Pairs("x-end", strings.Join(md.Get("x-start"), ",")))
	for {
		var m wrapperspb.StringValue
		if err := s.RecvMsg(&m); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		switch m.Value {
		case "fail":
			return status.Error(codes.DataLoss, "as asked: 100 %")
		case "last":
			return nil
		}
		times := 1
		if strings.HasPrefix(m.Value, "2") {
			times = 2
		}
		for range times {
			if err := s.SendMsg(&m); err != nil {
				return err
			}
		}
	}
}

func serveGRPC(t testing.TB) (string, *grpc.Server) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	s.RegisterService(&description, nil)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(ln)
	}()
	t.Cleanup(func() {
		s.Stop()
		<-done
	})
	return ln.Addr().String(), s
}

func dialGRPC(t testing.TB, addr string) *grpc.ClientConn {
	t.Helper()
	cc, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return cc
}

func startEcho(ctx context.Context, t testing.TB, cc *grpc.ClientConn) grpc.ClientStream {
	t.Helper()
	ctx = metadata.AppendToOutgoingContext(ctx, "x-start", "here")
	s, err := cc.NewStream(ctx, &description.Streams[0], "/test.Echo/Echo")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func say(t testing.TB, s grpc.ClientStream, text string) {
	t.Helper()
	if err := s.SendMsg(wrapperspb.String(text)); err != nil {
		t.Fatal(err)
	}
}

func hear(t testing.TB, s grpc.ClientStream) string {
	t.Helper()
	var m wrapperspb.StringValue
	if err := s.RecvMsg(&m); err != nil {
		t.Fatal(err)
	}
	return m.Value
}

// All four kinds of gRPC's calls, with trailers; each message as soon as it is sent.
func TestGRPC(t *testing.T) {
	backend, _ := serveGRPC(t)
	r := newRelay(t, backend, nil)
	cc := dialGRPC(t, r.addr)
	large := strings.Repeat("large ", 1<<19)
	for name, talk := range map[string]struct{ say, hear []string }{
		"unary":            {[]string{"one"}, []string{"one"}},
		"server streaming": {[]string{"2x"}, []string{"2x", "2x"}},
		"client streaming": {[]string{"", "b", "c"}, []string{"", "b", "c"}},
		"bidirectional":    {[]string{"1", "2", large, "4"}, []string{"1", "2", "2", large, "4"}},
		"nothing said":     {},
	} {
		t.Run(name, func(t *testing.T) {
			s := startEcho(t.Context(), t, cc)
			left := slices.Clone(talk.hear)
			for _, text := range talk.say {
				say(t, s, text)
				for len(left) > 0 && left[0] == text {
					if got := hear(t, s); got != text {
						t.Fatalf("heard %d bytes in place of %d", len(got), len(text))
					}
					left = left[1:]
				}
			}
			if err := s.CloseSend(); err != nil {
				t.Fatal(err)
			}
			if err := s.RecvMsg(new(wrapperspb.StringValue)); !errors.Is(err, io.EOF) {
				t.Fatalf("ends with %v", err)
			}
			if end := s.Trailer().Get("x-end"); len(end) != 1 || end[0] != "here" {
				t.Errorf("trailer %q", end)
			}
			if o := r.outcome(t); o.GRPCStatus != "0" || o.Status != 200 || o.Err != nil {
				t.Errorf("outcome %+v", o)
			}
		})
	}
}

// Errors keep their code and message, in trailers and trailers-only; an unknown
// method is the server's to refuse.
func TestGRPCErrors(t *testing.T) {
	backend, _ := serveGRPC(t)
	r := newRelay(t, backend, nil)
	cc := dialGRPC(t, r.addr)
	s := startEcho(t.Context(), t, cc)
	say(t, s, "one")
	hear(t, s)
	say(t, s, "fail")
	err := s.RecvMsg(new(wrapperspb.StringValue))
	if st := status.Convert(err); st.Code() != codes.DataLoss || st.Message() != "as asked: 100 %" {
		t.Errorf("ends with %v", err)
	}
	if o := r.outcome(t); o.GRPCStatus != "15" {
		t.Errorf("outcome %+v", o)
	}
	err = cc.Invoke(t.Context(), "/test.Echo/None", wrapperspb.String(""), new(wrapperspb.StringValue))
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("an unknown method: %v", err)
	}
	if o := r.outcome(t); o.GRPCStatus != "12" {
		t.Errorf("outcome %+v", o)
	}
}

// A server that ends a call while the client still sends is understood at once.
func TestGRPCServerEndsFirst(t *testing.T) {
	backend, _ := serveGRPC(t)
	r := newRelay(t, backend, nil)
	s := startEcho(t.Context(), t, dialGRPC(t, r.addr))
	say(t, s, "last")
	if err := s.RecvMsg(new(wrapperspb.StringValue)); !errors.Is(err, io.EOF) {
		t.Errorf("ends with %v", err)
	}
	if o := r.outcome(t); o.Err != nil || o.GRPCStatus != "0" {
		t.Errorf("outcome %+v", o)
	}
}

// An answer of the proxy's own is gRPC's to read, without a body.
func TestTrailersOnlyAnswer(t *testing.T) {
	r := newRelay(t, "", func(r *relay) {
		r.server.Handler = func(turn *http2.Turn, s *http2.Stream) {
			s.Observer = &watcher{relay: r}
			s.Respond(turn, 200, []http2.Field{
				{Name: "content-type", Value: "application/grpc"},
				{Name: "grpc-status", Value: "7"}, {Name: "grpc-message", Value: "policy shop/deny"},
			}, nil)
		}
	})
	err := dialGRPC(t, r.addr).Invoke(t.Context(), "/test.Echo/Echo", wrapperspb.String(""), new(wrapperspb.StringValue))
	if st := status.Convert(err); st.Code() != codes.PermissionDenied || st.Message() != "policy shop/deny" {
		t.Errorf("ends with %v", err)
	}
	if o := r.outcome(t); o.GRPCStatus != "7" || o.Status != 200 {
		t.Errorf("outcome %+v", o)
	}
}

// A client that cancels is felt by the server.
func TestCancelReachesTheServer(t *testing.T) {
	backend, _ := serveGRPC(t)
	r := newRelay(t, backend, nil)
	ctx, cancel := context.WithCancel(t.Context())
	s := startEcho(ctx, t, dialGRPC(t, r.addr))
	say(t, s, "one")
	hear(t, s)
	cancel()
	var reset *http2.ResetError
	if o := r.outcome(t); !errors.As(o.Err, &reset) || reset.Upstream || reset.Code.String() != "CANCEL" {
		t.Errorf("outcome %+v", o)
	}
}

// Drained, a connection takes no new stream, and those that are open live on; gRPC's
// client goes on elsewhere without an error.
func TestDrain(t *testing.T) {
	backend, _ := serveGRPC(t)
	r := newRelay(t, backend, nil)
	cc := dialGRPC(t, r.addr)
	s := startEcho(t.Context(), t, cc)
	say(t, s, "one")
	hear(t, s)
	r.drain()
	for range 50 {
		other := startEcho(t.Context(), t, cc)
		say(t, other, "x")
		if got := hear(t, other); got != "x" {
			t.Fatal(got)
		}
		_ = other.CloseSend()
		_ = other.RecvMsg(new(wrapperspb.StringValue))
	}
	time.Sleep(20 * time.Millisecond)
	say(t, s, "2 on the old connection")
	hear(t, s)
	hear(t, s)
	_ = s.CloseSend()
	if err := s.RecvMsg(new(wrapperspb.StringValue)); !errors.Is(err, io.EOF) {
		t.Errorf("ends with %v", err)
	}
	// Either side may be the first to close it.
	if err := r.end(t); err != nil && !errors.Is(err, io.EOF) {
		t.Errorf("the drained connection ends with %v", err)
	}
	if len(r.conns) < 2 {
		t.Error("the client has not gone elsewhere: the drain was not seen")
	}
}

// An upstream that drains loses no call: streams that are open end there, new ones
// go to a new connection.
func TestUpstreamDrains(t *testing.T) {
	backend, first := serveGRPC(t)
	other, _ := serveGRPC(t)
	addrs := make(chan string, 2)
	addrs <- backend
	addrs <- other
	r := newRelay(t, "", func(r *relay) {
		r.client.Dial = func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", <-addrs)
		}
	})
	cc := dialGRPC(t, r.addr)
	s := startEcho(t.Context(), t, cc)
	say(t, s, "one")
	hear(t, s)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		first.GracefulStop()
	}()
	eventually(t, "new calls go to the other one", func() bool {
		fresh := startEcho(t.Context(), t, cc)
		say(t, fresh, "x")
		hear(t, fresh)
		_ = fresh.CloseSend()
		_ = fresh.RecvMsg(new(wrapperspb.StringValue))
		return len(addrs) == 0
	})
	say(t, s, "still here")
	hear(t, s)
	_ = s.CloseSend()
	if err := s.RecvMsg(new(wrapperspb.StringValue)); !errors.Is(err, io.EOF) {
		t.Errorf("ends with %v", err)
	}
	<-stopped
}
