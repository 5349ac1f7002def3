package place

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	stdruntime "runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/install/conflist"
)

// onceEnv makes the test program do one thing to a node's folders and end: it is
// what TestKilled kills.
const onceEnv = "WEIR_TEST_ONCE"

// node is a folder with a node's two folders, and the program to be placed.
type node string

func (n node) keeper(form Form) *Keeper {
	root := string(n)
	return &Keeper{
		Plugin: Plugin{Source: filepath.Join(root, "image"), Dir: filepath.Join(root, "bin")},
		Chain: Chain{Dir: filepath.Join(root, "net.d"), Entry: conflist.Entry{
			Socket: "/run/weir/attach.sock", Timeout: 5 * time.Second, Backend: "auto",
		}},
		Form: form,
		Log:  slog.New(slog.DiscardHandler),
	}
}

// do is a run of the installer that comes to an end.
func (n node) do(what string) error {
	if what == "replace" {
		return replaceOften(n)
	}
	if what == "remove" {
		k := n.keeper(Entry)
		if _, err := k.Chain.Remove(); err != nil {
			return err
		}
		_, err := k.Plugin.Remove()
		return err
	}
	k := n.keeper(Form(what))
	if err := k.place(); err != nil {
		return err
	}
	_, err := k.chain(context.Background())
	return err
}

// once runs in the program that is killed. On one thread, so that strace, which
// counts each thread's calls, counts all of them.
func once(command string) int {
	stdruntime.LockOSThread()
	what, root, _ := strings.Cut(command, " ")
	if err := node(root).do(what); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// killedAt are the calls of the writer that change something: killed at one that
// does not, it leaves what the one before it left.
var killedAt = []string{
	"openat", "write", "copy_file_range", "fchmod", "fsync", "renameat", "unlinkat", "mkdirat", "flock",
}

// mustKill are those without which it would not be a writer.
var mustKill = []string{"openat", "write", "fchmod", "fsync", "renameat", "flock"}

// TestKilled kills the writer at each of its system calls, one run for each, and
// then runs it again: each file is the old or the new one, then the new one, and
// nothing else is there.
func TestKilled(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		t.Skip("needs strace (Debian package strace)")
	}
	const oldPlugin, newPlugin = "the old plugin", "the new plugin"
	empty := map[string]string{"net.d/10-a.conflist": list, "bin/weir-cni": oldPlugin}
	entered := map[string]string{"net.d/10-a.conflist": chainedWith(t, list), "bin/weir-cni": newPlugin}
	besides := map[string]string{"net.d/10-a.conflist": list, "net.d/" + dropIn: dropInText(t), "bin/weir-cni": newPlugin}
	alone := map[string]string{"net.d/10-a.conflist": list}
	for _, tt := range []struct {
		name, what    string
		before, after map[string]string
	}{
		{"an entry is written", "entry", empty, entered},
		{"a drop-in is written", "dropin", empty, besides},
		{"an entry becomes a drop-in", "dropin", entered, besides},
		{"a drop-in becomes an entry", "entry", besides, entered},
		{"an entry is taken out", "remove", entered, alone},
		{"a drop-in is taken out", "remove", besides, alone},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			kills := map[string]int{}
			for _, call := range killedAt {
				for n := 1; ; n++ {
					root := makeNode(t, tt.before, newPlugin)
					if !kill(t, fmt.Sprintf("%s %s", tt.what, root), call, n) {
						break
					}
					kills[call]++
					expectEither(t, root, fmt.Sprintf("killed at %s %d", call, n), tt.before, tt.after)
					if err := root.do(tt.what); err != nil {
						t.Errorf("killed at %s %d, and run again: %v", call, n, err)
					}
					expectExactly(t, root, fmt.Sprintf("killed at %s %d, and run again", call, n), tt.after)
					if t.Failed() {
						return
					}
				}
			}
			t.Log("killed at", kills)
			if tt.what == "remove" {
				return
			}
			for _, call := range mustKill {
				if kills[call] == 0 {
					t.Errorf("never killed at %s: the test does not see the writer's calls", call)
				}
			}
		})
	}
}

// kill runs the program until its n-th call; false: it made fewer.
func kill(t *testing.T, command, call string, n int) bool {
	t.Helper()
	inject := fmt.Sprintf("inject=%s:signal=KILL:when=%d", call, n)
	cmd := exec.Command("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace="+call, "-e", inject, os.Args[0])
	cmd.Env = append(os.Environ(), onceEnv+"="+command, "GORACE=atexit_sleep_ms=0")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err := cmd.Run()
	if err == nil {
		return false
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		status := exit.Sys().(syscall.WaitStatus)
		if status.Signaled() && status.Signal() == syscall.SIGKILL || status.ExitStatus() == 128+int(syscall.SIGKILL) {
			return true
		}
	}
	t.Fatalf("strace: %v\n%s", err, &stderr)
	return false
}

func makeNode(t *testing.T, files map[string]string, image string) node {
	t.Helper()
	root, err := os.MkdirTemp(t.TempDir(), "node")
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"net.d", "bin"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	put(t, root, "image", image)
	for name, content := range files {
		put(t, root, name, content)
	}
	return node(root)
}

// filesOf are the node's, by name; folders are not told.
func filesOf(t *testing.T, root node) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(string(root), func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		name, err := filepath.Rel(string(root), path)
		if err != nil {
			return err
		}
		content, err := os.ReadFile(path)
		out[name] = string(content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	delete(out, "image")
	return out
}

// expectEither: each file as it was or as it is to be; a temporary one, which no
// runtime reads, may be left until the next run.
func expectEither(t *testing.T, root node, when string, before, after map[string]string) {
	t.Helper()
	files := filesOf(t, root)
	for name, content := range files {
		was, had := before[name]
		is, has := after[name]
		temp := strings.HasPrefix(filepath.Base(name), tempPrefix) && strings.HasSuffix(name, tempSuffix)
		if !temp && (!had || content != was) && (!has || content != is) {
			t.Errorf("%s: %s is neither the old nor the new one: %q", when, name, content)
		}
	}
	for name := range before {
		if _, both := after[name]; both && files[name] == "" {
			t.Errorf("%s: %s is gone", when, name)
		}
	}
}

func expectExactly(t *testing.T, root node, when string, want map[string]string) {
	t.Helper()
	files := filesOf(t, root)
	for name, content := range want {
		if files[name] != content {
			t.Errorf("%s: %s is %q, want %q", when, name, files[name], content)
		}
		delete(files, name)
	}
	for name := range files {
		t.Errorf("%s: %s is left", when, name)
	}
}

func chainedWith(t *testing.T, conf string) string {
	t.Helper()
	out, err := conflist.Add([]byte(conf), node("").keeper(Entry).Chain.Entry)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func dropInText(t *testing.T) string {
	t.Helper()
	out, err := conflist.DropIn(node("").keeper(Entry).Chain.Entry)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}
