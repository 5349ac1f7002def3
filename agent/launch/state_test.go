package launch

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestAnAttachmentIsReadBackAsItWasWritten(t *testing.T) {
	s, err := openStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	want := Attachment{ContainerID: "c1", IfNames: []string{"eth0"}, Netns: "/run/netns/x", NetnsInode: 7,
		Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}, ProxyUID: 5, Generation: 2, Committed: true}
	if err := s.save(want); err != nil {
		t.Fatal(err)
	}
	got, bad, err := s.load()
	if err != nil || len(bad) != 0 || len(got) != 1 {
		t.Fatalf("%v, bad %v, %v", got, bad, err)
	}
	if diff := cmp.Diff(want, got[0], cmpopts.IgnoreFields(Attachment{}, "BootID"), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}

func TestACorruptAttachmentIsSetAsideAndTheOthersAreRead(t *testing.T) {
	s, err := openStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.save(Attachment{ContainerID: "good"}); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"torn.json":  `{"ContainerID": "to`,
		"other.json": `{"ContainerID": "good"}`, // speaks of another container
	} {
		if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, bad, err := s.load()
	if err != nil || len(got) != 1 || len(bad) != 2 {
		t.Fatalf("got %d attachments, %d bad, %v", len(got), len(bad), err)
	}
	if _, err := os.Stat(s.path("torn") + ".bad"); err != nil {
		t.Error(err)
	}
}

func TestAnAttachmentOfAnotherBootIsDropped(t *testing.T) {
	s, err := openStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := (store{dir: s.dir, bootID: "yesterday"}).save(Attachment{ContainerID: "old"}); err != nil {
		t.Fatal(err)
	}
	got, _, err := s.load()
	if err != nil || len(got) != 0 {
		t.Fatalf("got %v, %v", got, err)
	}
	if _, err := os.Stat(s.path("old")); !os.IsNotExist(err) {
		t.Error("the file is still there")
	}
}

func TestAKilledWriterLeavesNothing(t *testing.T) {
	s, err := openStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.dir, ".c1.json12345"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.load(); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(s.dir)
	if err != nil || len(left) != 0 {
		t.Fatalf("left %v, %v", left, err)
	}
}

func TestContainerIDsThatNameOtherFilesAreRefused(t *testing.T) {
	for id, ok := range map[string]bool{
		"3f2a": true, "a.b-c_D": true,
		"": false, "..": false, "../x": false, "a/b": false, "-x": false, "a*": false, "a b": false,
	} {
		if err := ValidID(id); (err == nil) != ok {
			t.Errorf("%q: %v", id, err)
		}
	}
}

func TestTheHostsNetnsFolderIsSeenElsewhere(t *testing.T) {
	for in, want := range map[string]string{
		"/run/netns/cni-1":     "/host/netns/cni-1",
		"/var/run/netns/cni-1": "/host/netns/cni-1",
		"/proc/7/ns/net":       "/proc/7/ns/net",
	} {
		if got := hostNetnsPath("/host/netns", in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
		if got := runtimeNetnsPath("/host/netns", want); got != strings.Replace(in, "/var/run/", "/run/", 1) {
			t.Errorf("%s and back: %s", in, got)
		}
	}
}

func TestAProxyThatKeepsDyingIsLeftDownForLonger(t *testing.T) {
	if restartDelay(0) != 0 {
		t.Error("the first restart is at once")
	}
	for n := 1; n < 30; n++ {
		if d := restartDelay(n); d < restartDelay(n-1) || d > 1e9 {
			t.Errorf("failure %d: %v", n, d)
		}
	}
}

func TestThePodsCgroupIsFound(t *testing.T) {
	for tree, want := range map[string]string{
		"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice": "kubepods.slice",
		"kubepods/burstable/pod1":                       "kubepods",
		"kubelet/kubepods/burstable":                    "kubelet/kubepods",                     // kind
		"kubelet.slice/kubelet-kubepods.slice/x":        "kubelet.slice/kubelet-kubepods.slice", // kind, systemd
		"system.slice/docker-1.scope/kubepods/pod1":     "system.slice/docker-1.scope/kubepods", // k3d
		"system.slice/a.service/b/c/kubepods/too/far":   ".",
		"system.slice/containerd.service/kubepods-like": ".",
	} {
		root := t.TempDir()
		if err := os.MkdirAll(filepath.Join(root, tree), 0o755); err != nil {
			t.Fatal(err)
		}
		if got := findPods(root); got != want {
			t.Errorf("%s: %q, want %q", tree, got, want)
		}
	}
}
