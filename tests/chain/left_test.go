package chain

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/weirmesh/weir/tests/pod"
)

// held is what a node holds, in words that do not change while it stays the same.
type held struct {
	Processes   []string
	Descriptors map[string]int // of the agent, by kind
	Threads     map[string]int // of all processes, by network namespace: the node's, or another
	Mounts      []string       // of namespaces, as the node and the agent see them
	Links       []string       // on the node
	Cgroups     []string       // below the parent of all proxies
	Files       []string       // below /run
}

// look finds out what the node holds.
func look() (held, error) {
	h := held{Descriptors: map[string]int{}, Threads: map[string]int{}}
	err := errors.Join(h.processes(), h.descriptors(), h.mounts(), h.links(), h.files())
	var cgroupErr error
	h.Cgroups, cgroupErr = node.Cgroups()
	return h, errors.Join(err, cgroupErr)
}

func (h *held) processes() error {
	threads, err := filepath.Glob("/proc/[0-9]*/task/[0-9]*")
	if err != nil {
		return err
	}
	here, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return err
	}
	for _, task := range threads {
		comm, err := os.ReadFile(filepath.Join(task, "comm"))
		ns, nsErr := os.Readlink(filepath.Join(task, "ns/net"))
		if err != nil || nsErr != nil || ns == "" {
			continue // it ended, and is a zombie at most
		}
		pid := filepath.Base(filepath.Dir(filepath.Dir(task)))
		if pid == filepath.Base(task) {
			h.Processes = append(h.Processes, strings.TrimSpace(string(comm)))
		}
		// The tests' own threads come and go.
		if pid != "1" && ns != here {
			h.Threads["elsewhere"]++
		}
	}
	slices.Sort(h.Processes)
	return nil
}

func (h *held) descriptors() error {
	dir := fmt.Sprintf("/proc/%d/fd", agent.PID())
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil {
			continue
		}
		kind, _, _ := strings.Cut(target, ":[") // "socket:[12345]"
		h.Descriptors[kind]++
	}
	return nil
}

func (h *held) mounts() error {
	for _, pid := range []int{os.Getpid(), agent.PID()} {
		content, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/mountinfo")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(content)) {
			if strings.Contains(line, " - nsfs ") {
				h.Mounts = append(h.Mounts, strings.Fields(line)[4])
			}
		}
	}
	return nil
}

func (h *held) links() error {
	links, err := netlink.LinkList()
	if err != nil {
		return err
	}
	for _, l := range links {
		h.Links = append(h.Links, l.Attrs().Name)
	}
	slices.Sort(h.Links)
	return nil
}

func (h *held) files() error {
	return filepath.WalkDir(pod.NodeDir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && !d.IsDir() {
			h.Files = append(h.Files, path)
		}
		return err
	})
}

// anonymous is the memory of the agent that no file backs, in KiB.
func anonymous() (int, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", agent.PID()))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(content)) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == "RssAnon:" {
			return strconv.Atoi(fields[1])
		}
	}
	return 0, errors.New("no RssAnon in the agent's status")
}

// TestWhatIsLeftIsSeen is the control of the test of cycles.
func TestWhatIsLeftIsSeen(t *testing.T) {
	onNode(t)
	for _, c := range []struct {
		name  string
		leave func(t *testing.T) func() error
	}{
		{"a process in a namespace", func(t *testing.T) func() error {
			path, err := node.NewNamespace("left")
			if err != nil {
				t.Fatal(err)
			}
			sleep := exec.CommandContext(t.Context(), "sleep", "60")
			if err := pod.In(path, sleep.Start); err != nil {
				t.Fatal(err)
			}
			if err := node.RemoveNamespace(path); err != nil {
				t.Fatal(err)
			}
			return func() error { return errors.Join(sleep.Process.Kill(), ignoreExit(sleep.Wait())) }
		}},
		{"a descriptor of the agent", func(t *testing.T) func() error {
			conn, err := net.Dial("unix", filepath.Join(pod.NodeDir, "weir/attach.sock"))
			if err != nil {
				t.Fatal(err)
			}
			return conn.Close
		}},
		{"a namespace", func(t *testing.T) func() error {
			path, err := node.NewNamespace("left")
			if err != nil {
				t.Fatal(err)
			}
			return func() error { return node.RemoveNamespace(path) }
		}},
		{"a link", func(t *testing.T) func() error {
			link := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "left"}}
			if err := netlink.LinkAdd(link); err != nil {
				t.Fatal(err)
			}
			return func() error { return netlink.LinkDel(link) }
		}},
		{"a cgroup", func(t *testing.T) func() error {
			parents, err := filepath.Glob("/sys/fs/cgroup/*/" + node.Name)
			if len(parents) == 0 { // v2 alone
				parents = []string{filepath.Join("/sys/fs/cgroup", node.Name)}
			}
			left := filepath.Join(parents[0], "left")
			if err := errors.Join(err, os.Mkdir(left, 0o755)); err != nil {
				t.Fatal(err)
			}
			return func() error { return os.Remove(left) }
		}},
		{"a file", func(t *testing.T) func() error {
			path := filepath.Join(pod.NodeDir, "weir/attachments/left.json.bad")
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			return func() error { return os.Remove(path) }
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := settled(t, nil)
			remove := c.leave(t)
			if !seen(t, before) {
				t.Error("it is not seen")
			}
			if err := remove(); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(before, settled(t, &before)); diff != "" {
				t.Errorf("it is gone, and still seen (-before, +after):\n%s", diff)
			}
		})
	}
}

// seen reports whether the node comes to hold something else: an agent takes a
// connection when it gets round to it.
func seen(t *testing.T, before held) bool {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		now, err := look()
		if err != nil {
			t.Fatal(err)
		}
		if !cmp.Equal(before, now) {
			return true
		}
	}
	return false
}

func ignoreExit(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil
	}
	return err
}
