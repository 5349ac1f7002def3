package jail

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/weirmesh/weir/agent/proxypb"
)

func goodLaunch() *proxypb.Launch {
	return &proxypb.Launch{
		ContainerId: "abc", Generation: 2, PodNamespace: "shop", PodName: "front",
		CgroupFiles: []string{"/sys/fs/cgroup/memory/weir/abc/tasks"}, Uid: 1000, Gid: 1000,
		Listeners: []*proxypb.Listener{
			{Name: "outbound", Network: "tcp4", Address: "0.0.0.0:15001", Inherited: true},
			{Name: "outbound", Network: "tcp6", Address: "[::]:15001", Optional: true},
			{Name: "inbound", Network: "tcp4", Address: "0.0.0.0:15006"},
		},
	}
}

func TestParseLaunch(t *testing.T) {
	for _, c := range []struct {
		name        string
		change      func(*proxypb.Launch)
		descriptors int
		want        string // part of the error, "" for none
	}{
		{"good", func(*proxypb.Launch) {}, 1, ""},
		{"no id", func(m *proxypb.Launch) { m.ContainerId = "" }, 1, "container_id"},
		{"no generation", func(m *proxypb.Launch) { m.Generation = 0 }, 1, "generation"},
		{"root", func(m *proxypb.Launch) { m.Uid = 0 }, 1, "does not run as root"},
		{"root's group", func(m *proxypb.Launch) { m.Gid = 0 }, 1, "does not run as root"},
		{"no listeners", func(m *proxypb.Launch) { m.Listeners = nil }, 0, "0 listeners"},
		{"NUL", func(m *proxypb.Launch) { m.PodName = "a\x00b" }, 1, "NUL"},
		{"missing descriptor", func(*proxypb.Launch) {}, 0, "0 descriptors for 1"},
		{"stray descriptor", func(*proxypb.Launch) {}, 2, "2 descriptors for 1"},
		{"identity", func(m *proxypb.Launch) { m.Identity = true }, 2, ""},
		{"identity without a descriptor", func(m *proxypb.Launch) { m.Identity = true }, 1, "1 descriptors for 1 inherited listeners, identity true"},
		{"unknown name", func(m *proxypb.Launch) { m.Listeners[0].Name = "admin" }, 1, "outbound and inbound"},
		{"wrong family", func(m *proxypb.Launch) { m.Listeners[0].Network = "tcp6" }, 1, "no network of address"},
		{"udp", func(m *proxypb.Launch) { m.Listeners[0].Network = "udp4" }, 1, "no network of address"},
		{"no address", func(m *proxypb.Launch) { m.Listeners[0].Address = "localhost:1" }, 1, "listener"},
		{"twice", func(m *proxypb.Launch) { m.Listeners[2].Name = "outbound" }, 1, "twice"},
	} {
		t.Run(c.name, func(t *testing.T) {
			msg := goodLaunch()
			c.change(msg)
			b, err := proto.Marshal(msg)
			if err != nil {
				t.Fatal(err)
			}
			got, err := parseLaunch(b, c.descriptors)
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Fatalf("error %v, want one with %q", err, c.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(msg, got, protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// FuzzParseLaunch: what is accepted can be opened or passed on without a panic.
func FuzzParseLaunch(f *testing.F) {
	good, err := proto.Marshal(goodLaunch())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good, 1)
	f.Add([]byte{}, 0)
	f.Fuzz(func(t *testing.T, b []byte, descriptors int) {
		msg, err := parseLaunch(b, descriptors)
		if err != nil {
			return
		}
		if msg.GetUid() == 0 || msg.GetGid() == 0 {
			t.Error("root")
		}
		var listeners []Listener
		for i, l := range msg.GetListeners() {
			if _, err := listenAddress(l); err != nil {
				t.Error(err)
			}
			listeners = append(listeners, Listener{Listener: l, FD: 5 + i})
		}
		args := Args(msg, listeners, -1)
		if _, err := pointers(args); err != nil {
			t.Error(err)
		}
		back, err := ParseArgs(args)
		if err != nil || back.ContainerID != msg.GetContainerId() || len(back.Listeners) != len(listeners) {
			t.Errorf("%q: %v, %v", args, back, err)
		}
	})
}

func TestArgs(t *testing.T) {
	msg := goodLaunch()
	var listeners []Listener
	for i, l := range msg.GetListeners() {
		listeners = append(listeners, Listener{Listener: l, FD: 7 + i})
	}
	args := Args(msg, listeners, -1)
	want := []string{"weir-proxy", "serve", "abc", "2", "shop/front",
		"outbound,tcp4,0.0.0.0:15001,7", "outbound,tcp6,[::]:15001,8", "inbound,tcp4,0.0.0.0:15006,9"}
	if diff := cmp.Diff(want, args); diff != "" {
		t.Error(diff)
	}
	got, err := ParseArgs(args)
	if err != nil {
		t.Fatal(err)
	}
	if got.ContainerID != "abc" || got.Generation != 2 || got.Pod != "shop/front" || got.Listeners[1].FD != 8 ||
		got.Listeners[1].GetNetwork() != "tcp6" || got.Listeners[2].GetName() != "inbound" {
		t.Errorf("got %v", got)
	}
	msg.KeepNetRaw = true
	if got, err = ParseArgs(Args(msg, listeners, -1)); err != nil || !got.KeepNetRaw || len(got.Listeners) != 3 {
		t.Errorf("with CAP_NET_RAW: %v, %v", got, err)
	}
	if got.Identity != -1 {
		t.Errorf("without an identity: descriptor %d", got.Identity)
	}
	if got, err = ParseArgs(Args(msg, listeners, 6)); err != nil || got.Identity != 6 || !got.KeepNetRaw || len(got.Listeners) != 3 {
		t.Errorf("with an identity: %v, %v", got, err)
	}
	for _, bad := range [][]string{nil, append(want[:5:5], "identity=-1", want[5]), {"weir-proxy", "serve"}, append(want[:5:5], "outbound,tcp4,0.0.0.0:15001"),
		append(want[:5:5], "outbound,tcp4,0.0.0.0:15001,-1"), append(want[:5:5], "outbound,tcp4,elsewhere,7")} {
		if _, err := ParseArgs(bad); err == nil {
			t.Errorf("%q parsed", bad)
		}
	}
}

func TestEnvironment(t *testing.T) {
	got := environment([]string{"PATH=/bin", "GOMAXPROCS=2", "GOMEMLIMIT=1", "GODEBUG=a=1", "GOGC=1", "KUBECONFIG=x"})
	if diff := cmp.Diff([]string{"GOMAXPROCS=2", "GOMEMLIMIT=1", "GODEBUG=a=1"}, got); diff != "" {
		t.Error(diff)
	}
}

// TestReceiveLaunch: over a real socket, with and without descriptors.
func TestReceiveLaunch(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(pair[1:])
	b, err := proto.Marshal(goodLaunch())
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Sendmsg(pair[0], b, unix.UnixRights(pair[0]), nil, 0); err != nil {
		t.Fatal(err)
	}
	msg, fds, err := receiveLaunch(pair[1])
	if err != nil || len(fds) != 1 || msg.GetPodName() != "front" {
		t.Fatalf("%v, %v, %v", msg, fds, err)
	}
	closeAll(fds)
	if err := unix.Sendmsg(pair[0], make([]byte, maxPacket+1), nil, nil, 0); err != nil {
		t.Fatal(err)
	}
	if _, _, err := receiveLaunch(pair[1]); err == nil || !strings.Contains(err.Error(), "truncated") {
		t.Errorf("too long: %v", err)
	}
	unix.Close(pair[0])
	if _, _, err := receiveLaunch(pair[1]); err == nil || !strings.Contains(err.Error(), "hung up") {
		t.Errorf("closed: %v", err)
	}
}
