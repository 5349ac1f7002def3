package attach

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/weirmesh/weir/agent/attachpb"
	"github.com/weirmesh/weir/agent/decide"
	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/agent/telemetry"
	"github.com/weirmesh/weir/plugin/capture/nstest"
)

// pods knows a handful of pods, in a namespace without labels.
type pods map[string]model.Pod

func (p pods) WaitPod(_ context.Context, namespace, name, _ string) (model.Pod, model.Namespace, error) {
	pod, ok := p[name]
	if !ok {
		return model.Pod{}, model.Namespace{}, attachpb.PodUnknown.Fail("pod %s/%s is not there", namespace, name)
	}
	return pod, model.Namespace{Name: namespace}, nil
}

func labelled(name, value string) model.Pod {
	pod := model.Pod{Namespace: "shop", Name: name}
	if value != "" {
		pod.Labels = map[string]string{decide.CaptureLabel: value}
	}
	return pod
}

// serve runs a Server whose proxies never start: "/bin/true" is no proxy. Those
// that do are in package launch's tests and on the test cluster.
func serve(t *testing.T) (attachpb.AttachClient, *launch.Manager, *[]string) {
	return serveWith(t, decide.Defaults())
}

func serveWith(t *testing.T, options decide.Options) (attachpb.AttachClient, *launch.Manager, *[]string) {
	if os.Geteuid() != 0 {
		t.Skip("cgroups need root")
	}
	log := slog.New(slog.DiscardHandler)
	manager, err := launch.Open(launch.Options{
		RunDir: t.TempDir(), NetnsDir: "/run/netns", CgroupRoot: "/sys/fs/cgroup",
		CgroupParent: fmt.Sprintf("weir-attach-test-%d", os.Getpid()),
		Proxy:        "/bin/true", UIDBase: 1879048192, MaxProcs: 2, Limits: launch.Limits{Memory: 64 << 20, CPUWeight: 100}, Log: log,
		Session: func(ctx context.Context, _ *launch.Instance) { <-ctx.Done() },
	})
	if err != nil {
		t.Fatal(err)
	}
	var events []string
	server := &Server{
		Pods: pods{
			"plain":    labelled("plain", ""),
			"captured": labelled("captured", decide.Enabled),
			"wrong":    labelled("wrong", "yes"),
		},
		Decide:  options,
		Proxies: manager,
		Version: "test",
		Release: func(context.Context) (int, error) { return 2, nil },
		Metrics: telemetry.NewMetrics("test", nil, func() map[string]int { return nil }, func() map[string]int { return nil }),
		Event:   func(pod model.Pod, _, reason, _ string) { events = append(events, pod.Name+" "+reason) },
		Log:     log,
	}
	path := filepath.Join(t.TempDir(), "attach.sock")
	listener, err := Listen(path, log)
	if err != nil {
		t.Fatal(err)
	}
	rpc := grpc.NewServer()
	attachpb.RegisterAttachServer(rpc, server)
	go func() { _ = rpc.Serve(listener) }()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		rpc.Stop()
		manager.Close()
	})
	return attachpb.NewAttachClient(conn), manager, &events
}

// add asks for an attachment and returns the agent's answers until the stream ends.
func add(t *testing.T, client attachpb.AttachClient, begin *attachpb.Begin) []*attachpb.AddReply {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	stream, err := client.Add(ctx)
	if err != nil {
		t.Fatal(err)
	}
	begin.ContainerId, begin.Ifname, begin.PodNamespace = "c1", "eth0", "shop"
	if err := stream.Send(&attachpb.AddRequest{Step: &attachpb.AddRequest_Begin{Begin: begin}}); err != nil {
		t.Fatal(err)
	}
	var replies []*attachpb.AddReply
	for {
		reply, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return replies
		}
		if err != nil {
			t.Fatal(err)
		}
		replies = append(replies, reply)
	}
}

func TestAPodThatIsNotCapturedIsSkippedWithAReason(t *testing.T) {
	client, _, _ := serve(t)
	replies := add(t, client, &attachpb.Begin{PodName: "plain"})
	if len(replies) != 1 || replies[0].GetSkip().GetReason() == "" {
		t.Errorf("got %v", replies)
	}
}

// While the API server is away an agent hears of no new pod: no mirror pod says
// that this one is static, and its namespace's label says nothing.
func TestAnExemptStaticPodStartsThoughNobodyKnowsIt(t *testing.T) {
	options := decide.Defaults()
	options.ExemptStaticPods = true
	const hash, uuid = "8f6d0d3c5e0f4f2b9a3b1c2d4e5f6a7b", "8f6d0d3c-5e0f-4f2b-9a3b-1c2d4e5f6a7b"
	for _, c := range []struct {
		promise, uid string
		options      decide.Options
		skipped      bool
	}{
		{"a static pod, where they are exempt, starts", hash, options, true},
		{"another pod waits", uuid, options, false},
		{"a static pod waits, where they are not exempt", hash, decide.Defaults(), false},
	} {
		client, _, _ := serveWith(t, c.options)
		replies := add(t, client, &attachpb.Begin{PodName: "nobody", PodUid: c.uid})
		last := replies[len(replies)-1]
		if (last.GetSkip() != nil) != c.skipped || (last.GetRefused().GetCode() == attachpb.PodUnknown.ID) == c.skipped {
			t.Errorf("%s: got %v", c.promise, last)
		}
	}
}

func TestNobodyIsCapturedAfterLeave(t *testing.T) {
	client, _, events := serve(t)
	reply, err := client.Leave(t.Context(), &attachpb.LeaveRequest{})
	if err != nil || reply.GetDraining() != 2 {
		t.Fatalf("%v, %v", reply, err)
	}
	for _, pod := range []string{"captured", "plain", "wrong", "nobody"} {
		replies := add(t, client, &attachpb.Begin{PodName: pod})
		if len(replies) != 1 || replies[0].GetSkip().GetReason() != leavingReason {
			t.Errorf("%s: got %v", pod, replies)
		}
	}
	if len(*events) > 0 {
		t.Errorf("events %q", *events)
	}
}

func TestWhatCannotBeCapturedIsRefusedWithACodeAndLeavesNothing(t *testing.T) {
	client, manager, events := serve(t)
	sandbox := nstest.New(t).Path()
	for _, c := range []struct {
		name  string
		begin *attachpb.Begin
		want  attachpb.Code
		event string
	}{
		{"unknown pod", &attachpb.Begin{PodName: "nobody", Netns: sandbox}, attachpb.PodUnknown, ""},
		{"label that means nothing", &attachpb.Begin{PodName: "wrong", Netns: sandbox}, attachpb.InvalidRequest, "wrong InvalidAnnotation"},
		{"namespace gone", &attachpb.Begin{PodName: "captured", Netns: "/run/netns/weir-no-such"}, attachpb.WrongNamespace, "captured CaptureFailed"},
		{"address missing", &attachpb.Begin{PodName: "captured", Netns: sandbox, Addresses: []string{"10.9.0.2"}}, attachpb.WrongNamespace, "captured CaptureFailed"},
		{"address unreadable", &attachpb.Begin{PodName: "captured", Netns: sandbox, Addresses: []string{"ten"}}, attachpb.BadArgs, "captured CaptureFailed"},
		{"proxy does not start", &attachpb.Begin{PodName: "captured", Netns: sandbox}, attachpb.ProxyFailed, "captured CaptureFailed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			*events = nil
			replies := add(t, client, c.begin)
			refused := replies[len(replies)-1].GetRefused()
			if refused.GetCode() != c.want.ID || !strings.Contains(refused.GetMessage(), c.want.Remedy) {
				t.Errorf("refused with %v, want %s", refused, c.want.ID)
			}
			if got := strings.Join(*events, ", "); got != c.event {
				t.Errorf("event %q, want %q", got, c.event)
			}
			if left := manager.List(); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// An older plugin, or one whose chain insists on iptables, is not asked for what it
// cannot do.
func TestTheClientsAddressIsKeptWhereThePluginCan(t *testing.T) {
	client, _, _ := serve(t)
	sandbox := nstest.New(t).Path()
	for _, can := range []bool{true, false} {
		replies := add(t, client, &attachpb.Begin{PodName: "captured", Netns: sandbox, CanKeepClient: can})
		if spec := replies[0].GetSpec(); spec == nil || spec.GetKeepClient() != can {
			t.Errorf("can %v: %v", can, replies)
		}
	}
}

func TestDelOfAnUnknownContainerIsASuccess(t *testing.T) {
	client, _, _ := serve(t)
	if _, err := client.Del(t.Context(), &attachpb.DelRequest{ContainerId: "nobody", Ifname: "eth0"}); err != nil {
		t.Error(err)
	}
}

func TestOnlyRootIsListenedTo(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to become somebody else")
	}
	dir, err := os.MkdirTemp("", "weir-attach-test-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "attach.sock")
	listener, err := Listen(path, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	// Let others as far as the socket: then its peer check must hold.
	for _, p := range []string{dir, path} {
		if err := os.Chmod(p, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	accepted := make(chan net.Conn, 2)
	go func() {
		conn, err := listener.Accept()
		if err == nil {
			accepted <- conn
		}
	}()
	stranger := dialAs(t, path, 65534)
	defer unix.Close(stranger)
	if n, err := unix.Read(stranger, make([]byte, 1)); n != 0 || err != nil {
		t.Errorf("a stranger reads %d, %v, want the end", n, err)
	}
	root := dialAs(t, path, 0)
	defer unix.Close(root)
	select {
	case conn := <-accepted:
		conn.Close()
	case <-time.After(5 * time.Second):
		t.Error("root was not accepted")
	}
}

// dialAs connects as another user, on a thread that ends with it.
func dialAs(t *testing.T, path string, uid int) int {
	t.Helper()
	done := make(chan error, 1)
	fd := -1
	go func() {
		runtime.LockOSThread()
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
			done <- errno
			return
		}
		var err error
		if fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err == nil {
			err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return fd
}

func TestASecondAgentOnOneSocketIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "attach.sock")
	log := slog.New(slog.DiscardHandler)
	first, err := Listen(path, log)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path, log); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("a second one: %v", err)
	}
	first.Close()
	// A socket that a killed agent left is taken over.
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	again, err := Listen(path, log)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}
