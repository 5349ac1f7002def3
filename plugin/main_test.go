package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/weirmesh/weir/agent/attachpb"
	"github.com/weirmesh/weir/plugin/capture/nstest"
	"google.golang.org/grpc"
)

// asPlugin makes this test binary the plugin.
const asPlugin = "WEIR_CNI_TEST_AS_PLUGIN"

func TestMain(m *testing.M) {
	if os.Getenv(asPlugin) != "" {
		main()
	}
	os.Exit(m.Run())
}

// agent is a fake agent on a socket of its own.
type agent struct {
	attachpb.UnimplementedAttachServer
	add func(grpc.BidiStreamingServer[attachpb.AddRequest, attachpb.AddReply]) error
	del func() error

	dir, socket string

	mu      sync.Mutex
	begin   *attachpb.Begin
	applied *attachpb.Applied
	dels    []*attachpb.DelRequest
	gcs     []*attachpb.GCRequest
	checked *attachpb.CheckReply // what Check answers
}

func (a *agent) Check(context.Context, *attachpb.CheckRequest) (*attachpb.CheckReply, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.checked == nil {
		return &attachpb.CheckReply{}, nil
	}
	return a.checked, nil
}

func (a *agent) GC(_ context.Context, req *attachpb.GCRequest) (*attachpb.GCReply, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.gcs = append(a.gcs, req)
	return &attachpb.GCReply{}, nil
}

// newAgent serves until the end of the test. Its folder may be entered by
// anybody, so that a plugin without root fails for its own reasons.
func newAgent(t testing.TB) *agent {
	t.Helper()
	a := &agent{dir: t.TempDir()}
	a.socket = filepath.Join(a.dir, "attach.sock")
	l, err := net.Listen("unix", a.socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	attachpb.RegisterAttachServer(s, a)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		<-done
	})
	return a
}

type addStream = grpc.BidiStreamingServer[attachpb.AddRequest, attachpb.AddReply]

func (a *agent) Add(s addStream) error {
	in, err := s.Recv()
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.begin = in.GetBegin()
	a.mu.Unlock()
	if a.add == nil {
		return errors.New("no add expected")
	}
	return a.add(s)
}

func (a *agent) Del(_ context.Context, r *attachpb.DelRequest) (*attachpb.DelReply, error) {
	a.mu.Lock()
	a.dels = append(a.dels, r)
	a.mu.Unlock()
	if a.del != nil {
		return &attachpb.DelReply{}, a.del()
	}
	return &attachpb.DelReply{}, nil
}

func (a *agent) Status(context.Context, *attachpb.StatusRequest) (*attachpb.StatusReply, error) {
	return &attachpb.StatusReply{Version: "test"}, nil
}

func skipReply(s addStream) error {
	return s.Send(&attachpb.AddReply{Step: &attachpb.AddReply_Skip{Skip: &attachpb.Skip{Reason: "no label"}}})
}

func refuse(s addStream, code, message string) error {
	return s.Send(&attachpb.AddReply{Step: &attachpb.AddReply_Refused{Refused: &attachpb.Refused{Code: code, Message: message}}})
}

// captureWith sends the spec, notes what is applied, and ends with last.
func (a *agent) captureWith(spec *attachpb.Spec, last func(addStream) error) {
	a.add = func(s addStream) error {
		if err := s.Send(&attachpb.AddReply{Step: &attachpb.AddReply_Spec{Spec: spec}}); err != nil {
			return err
		}
		in, err := s.Recv()
		if err != nil {
			return err
		}
		a.mu.Lock()
		a.applied = in.GetApplied()
		a.mu.Unlock()
		return last(s)
	}
}

func committed(s addStream) error {
	return s.Send(&attachpb.AddReply{Step: &attachpb.AddReply_Committed{Committed: &attachpb.Committed{}}})
}

// invocation is one run of the plugin.
type invocation struct {
	command string
	version string            // "" is 1.1.0
	netns   string            // "" is a file that is not there
	args    string            // CNI_ARGS; "" is a pod of namespace shop
	conf    map[string]any    // merged over a valid configuration; nil values delete
	stdin   string            // instead of conf
	env     map[string]string // over the usual; empty values delete
	uid     uint32
}

type outcome struct {
	stdout, stderr string
	exit           int
	took           time.Duration
}

const goodArgs = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=front-0;K8S_POD_UID=u-1;K8S_POD_INFRA_CONTAINER_ID=c-1"

// prevResult is what a primary plugin answered, as libcni hands it on.
func prevResult(version string) map[string]any {
	ip := func(addr, gw string) map[string]any {
		out := map[string]any{"address": addr, "gateway": gw, "interface": 0}
		if version < "1.0.0" {
			out["version"] = "4"
			if strings.Contains(addr, "::") {
				out["version"] = "6"
			}
		}
		return out
	}
	return map[string]any{
		"cniVersion": version,
		"interfaces": []any{map[string]any{"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/x"}},
		"ips":        []any{ip("10.88.0.2/16", "10.88.0.1"), ip("fd00:88::2/64", "fd00:88::1")},
		"routes":     []any{map[string]any{"dst": "0.0.0.0/0", "gw": "10.88.0.1"}},
		"dns":        map[string]any{"nameservers": []any{"10.96.0.10"}},
	}
}

func (i invocation) config(socket string) string {
	if i.stdin != "" {
		return i.stdin
	}
	version := i.version
	if version == "" {
		version = "1.1.0"
	}
	c := map[string]any{
		"cniVersion": version, "name": "pods", "type": "weir-cni",
		"socket": socket, "timeout": "2s", "prevResult": prevResult(version),
	}
	for k, v := range i.conf {
		if c[k] = v; v == nil {
			delete(c, k)
		}
	}
	out, err := json.Marshal(c)
	if err != nil {
		panic(err)
	}
	return string(out)
}

func (i invocation) run(t testing.TB, a *agent) outcome {
	t.Helper()
	env := map[string]string{
		"CNI_COMMAND": i.command, "CNI_CONTAINERID": "c-1", "CNI_NETNS": i.netns, "CNI_IFNAME": "eth0",
		"CNI_ARGS": i.args, "CNI_PATH": "/opt/cni/bin", asPlugin: "1", "PATH": os.Getenv("PATH"),
		// The race detector has a process wait for a second when it ends.
		"GORACE": "atexit_sleep_ms=0",
	}
	if i.netns == "" {
		env["CNI_NETNS"] = filepath.Join(t.TempDir(), "gone")
	}
	if i.args == "" {
		env["CNI_ARGS"] = goodArgs
	}
	for k, v := range i.env {
		if env[k] = v; v == "" {
			delete(env, k)
		}
	}
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	// By descriptor: another user may not reach the folder that it lies in.
	cmd := exec.Command("/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{self}
	if i.uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: i.uid, Gid: i.uid}}
	}
	for k, v := range env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	cmd.Stdin = strings.NewReader(i.config(a.socket))
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	start := time.Now()
	err = cmd.Run()
	o := outcome{stdout: stdout.String(), stderr: stderr.String(), took: time.Since(start)}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		o.exit = exit.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	return o
}

// succeeded fails the test unless the plugin exited with 0.
func (o outcome) succeeded(t *testing.T) {
	t.Helper()
	if o.exit != 0 {
		t.Fatalf("exit %d: %s%s", o.exit, o.stdout, o.stderr)
	}
}

// failed checks an error of the specification's form: its number, and a message
// of one line that ends with our code.
func (o outcome) failed(t *testing.T, cni uint, code attachpb.Code, words ...string) {
	t.Helper()
	var e types.Error
	if err := json.Unmarshal([]byte(o.stdout), &e); err != nil {
		t.Fatalf("exit %d, standard output is no error: %v: %q, standard error %q", o.exit, err, o.stdout, o.stderr)
	}
	t.Logf("%d %s", e.Code, e.Msg)
	if o.exit == 0 || e.Code != cni {
		t.Errorf("exit %d, CNI error %d; want %d", o.exit, e.Code, cni)
	}
	if !strings.HasPrefix(e.Msg, "weir: ") || !strings.HasSuffix(e.Msg, "["+code.ID+"]") || strings.ContainsAny(e.Msg, "\n\r") {
		t.Errorf("message %q is not “weir: … [%s]” in one line", e.Msg, code.ID)
	}
	for _, w := range append(words, code.Next, code.Remedy) {
		if !strings.Contains(e.Msg, w) {
			t.Errorf("message %q does not say %q", e.Msg, w)
		}
	}
}

// pod is a namespace with an interface that has the addresses of prevResult.
func newPod(t testing.TB) *nstest.NS {
	t.Helper()
	ns := nstest.New(t)
	ns.Run(t, "sh", "-ec", `ip link add eth0 type veth peer name peer0; ip link set eth0 up; ip link set peer0 up
		ip addr add 10.88.0.2/16 dev eth0; ip addr add fd00:88::2/64 dev eth0 nodad`)
	return ns
}

func ruleset(t testing.TB, ns *nstest.NS) string {
	t.Helper()
	return ns.Run(t, "nft", "list", "ruleset")
}

func newSpec(t testing.TB) *attachpb.Spec {
	t.Helper()
	b := nstest.NewCgroup(t).Bypass
	return &attachpb.Spec{OutboundPort: 15001, InboundPort: 15006, BypassPath: b.Path, BypassId: b.ID, BypassLevel: uint32(b.Level)}
}

func TestUsage(t *testing.T) {
	var out, errs bytes.Buffer
	none := func(string) string { return "" }
	if code := run(nil, none, &out, &errs); code != 0 || !strings.Contains(errs.String(), "weir-cni show") {
		t.Errorf("without arguments: exit %d, %q", code, errs.String())
	}
	errs.Reset()
	if code := run([]string{"frobnicate"}, none, &out, &errs); code != 2 || !strings.Contains(errs.String(), `no command "frobnicate"`) {
		t.Errorf("unknown command: exit %d, %q", code, errs.String())
	}
	if out.Len() > 0 {
		t.Errorf("on standard output: %q", out.String())
	}
}

func TestVersion(t *testing.T) {
	o := invocation{command: "VERSION", stdin: "{}"}.run(t, &agent{})
	o.succeeded(t)
	var got struct{ SupportedVersions []string }
	if err := json.Unmarshal([]byte(o.stdout), &got); err != nil {
		t.Fatal(err)
	}
	if want := "[0.3.0 0.3.1 0.4.0 1.0.0 1.1.0]"; fmt.Sprint(got.SupportedVersions) != want {
		t.Errorf("%v, want %s", got.SupportedVersions, want)
	}
}

// BenchmarkExec is the plugin from exec to exit, where it has nothing to do.
func BenchmarkExec(b *testing.B) {
	for name, i := range map[string]invocation{
		"version": {command: "VERSION"},
		"exempt":  {command: "ADD", args: "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=x"},
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if o := i.run(b, &agent{socket: "/nowhere/none.sock"}); o.exit != 0 {
					b.Fatal(o)
				}
			}
		})
	}
}
