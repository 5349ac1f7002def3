package nstest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/plugin/capture"
	"golang.org/x/sys/unix"
)

// Cgroup is a fresh cgroup of the v2 hierarchy.
type Cgroup struct {
	Dir    string
	Bypass capture.Bypass
}

// NewCgroup makes a cgroup below the root that is removed at the end of the
// test, when its processes are gone.
func NewCgroup(t testing.TB) *Cgroup {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("cgroups need root")
	}
	root, err := CgroupRoot()
	if err != nil {
		t.Skip(err)
	}
	name := fmt.Sprintf("weirtest-%d-%x", os.Getpid(), rand.Uint32())
	dir := filepath.Join(root, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { remove(t, dir) })
	var st syscall.Stat_t
	if err := syscall.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	return &Cgroup{Dir: dir, Bypass: capture.Bypass{Path: name, ID: st.Ino, Level: 1}}
}

// remove waits a little for the cgroup's processes: a killed one leaves it only
// when it has been reaped.
func remove(t testing.TB, dir string) {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := os.Remove(dir)
		if err == nil || errors.Is(err, os.ErrNotExist) {
			return
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			t.Errorf("remove cgroup: %v", err)
			return
		}
	}
}

// CgroupRoot finds where the v2 hierarchy is mounted.
func CgroupRoot() (string, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			return f[1], nil
		}
	}
	return "", errors.New("no cgroup v2 hierarchy is mounted")
}
