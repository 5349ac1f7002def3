package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// traces are the places where a captured pod can be found on its node.
type traces struct {
	sandbox
	uid       string
	link      string // the node's end of the pod's veth
	netns     string // the file that holds the network namespace
	addresses []string
}

func tracesOf(t *testing.T, pod *corev1.Pod) traces {
	t.Helper()
	x := traces{sandbox: sandboxOf(t, pod), uid: string(pod.UID)}
	for _, ip := range pod.Status.PodIPs {
		x.addresses = append(x.addresses, ip.IP)
	}
	held, err := filepath.Glob(filepath.Join(x.node.Path("/run/netns"), "*"))
	must(t, err)
	for _, file := range held {
		if number, err := inode(file); err == nil && number == x.pause.netns {
			x.netns = file
		}
	}
	if x.netns == "" {
		t.Fatalf("no file in /run/netns of %s is the network namespace of pod %s", x.node.Name, pod.Name)
	}
	// The pod's own sysfs shows the interfaces of its network namespace.
	peer, err := os.ReadFile(x.pause.path("root", "sys", "class", "net", "eth0", "iflink"))
	must(t, err)
	links, err := filepath.Glob(filepath.Join(x.node.Path("/sys/class/net"), "*", "ifindex"))
	must(t, err)
	for _, link := range links {
		if own, err := os.ReadFile(link); err == nil && string(own) == string(peer) {
			x.link = filepath.Base(filepath.Dir(link))
		}
	}
	if x.link == "" {
		t.Fatalf("no interface of %s is the peer of pod %s's, number %s", x.node.Name, pod.Name, peer)
	}
	return x
}

// trace is one kind of thing that a pod leaves, and how to look for it.
type trace struct {
	what string
	find func(traces) ([]string, error)
}

var allTraces = []trace{
	{"process", traces.processes},
	{"cgroup", traces.cgroups},
	{"network namespace", traces.namespaces},
	{"file of Weir's", traces.files},
	{"unix socket", traces.sockets},
	{"interface", traces.interfaces},
	{"reserved address", traces.reserved},
}

// processes finds those in the pod's cgroups, in its proxy's, and in its network
// namespace, whoever's they are. The number of a namespace that is gone may be
// another pod's soon: then it says nothing.
func (x traces) processes() ([]string, error) {
	all, err := processes()
	reused := slices.ContainsFunc(all, func(p process) bool {
		return p.isPause() && p.netns == x.pause.netns && p.pid != x.pause.pid
	})
	var found []string
	for _, p := range all {
		if p.in(x.id) || p.in("pod"+x.uid) || p.netns == x.pause.netns && !reused {
			found = append(found, fmt.Sprintf("%d %s", p.pid, p.args[0]))
		}
	}
	return found, err
}

func (x traces) cgroups() ([]string, error) {
	hierarchies, err := filepath.Glob("/sys/fs/cgroup/*/" + x.node.Name)
	if err != nil {
		return nil, err
	}
	var found []string
	for _, root := range append(hierarchies, "/sys/fs/cgroup/"+x.node.Name) {
		names, err := namesBelow(root, x.id, x.uid)
		if err != nil {
			return nil, err
		}
		found = append(found, names...)
	}
	return found, nil
}

func (x traces) namespaces() ([]string, error) { return existing(x.netns) }

// files finds what is called like the sandbox: state, sockets, locks.
func (x traces) files() ([]string, error) { return namesBelow(x.node.Path("/run/weir"), x.id) }

func (x traces) sockets() ([]string, error) {
	table, err := os.Open(fmt.Sprintf("/proc/%d/net/unix", x.node.PID()))
	if err != nil {
		return nil, err
	}
	defer table.Close()
	var found []string
	lines := bufio.NewScanner(table)
	for lines.Scan() {
		if strings.Contains(lines.Text(), x.id) && strings.Contains(lines.Text(), "/weir/") {
			found = append(found, lines.Text())
		}
	}
	return found, lines.Err()
}

func (x traces) interfaces() ([]string, error) {
	return existing(filepath.Join(x.node.Path("/sys/class/net"), x.link))
}

// reserved finds the addresses that the primary plugin keeps for the pod.
func (x traces) reserved() ([]string, error) {
	var found []string
	for _, address := range x.addresses {
		path := filepath.Join(x.node.Path("/var/lib/cni/networks/podnet"), address)
		owner, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		// The address may be another pod's by now.
		if strings.HasPrefix(string(owner), x.id) {
			found = append(found, path)
		}
	}
	return found, nil
}

func existing(path string) ([]string, error) {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	return []string{path}, nil
}

// namesBelow finds what has one of parts in its name, below a folder that may be
// changing.
func namesBelow(root string, parts ...string) ([]string, error) {
	var found []string
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, part := range parts {
			if strings.Contains(entry.Name(), part) {
				found = append(found, path)
			}
		}
		return nil
	})
	return found, err
}

// nothingLeft looks for every trace of a pod while it runs, which is the
// control, and after it was deleted.
func nothingLeft(t *testing.T) {
	ns := newNamespace(t, captured())
	service(t, ns, "server", 8080)
	pods := startAll(t, ns, appPod("server", "serve"), appPod("stays", "serve"))
	server, stays := pods[0], pods[1]
	expectCaptured(t, server)
	allServed(t, "before", get(t, stays, "-retry", "10s", "http://server:8080/"))
	x := tracesOf(t, server)
	for _, kind := range allTraces {
		found, err := kind.find(x)
		must(t, err)
		if len(found) == 0 {
			t.Errorf("the running pod has no %s: the test looks in the wrong place", kind.what)
		}
	}
	remove(t, server)
	x.expectNone(t)
	expectCaptured(t, stays)
}

// expectNone waits until no trace is left; kubelet removes some at its leisure.
func (x traces) expectNone(t *testing.T) {
	t.Helper()
	eventually(t, soon, "nothing to be left of sandbox "+x.id, func() error {
		var left []error
		for _, kind := range allTraces {
			found, err := kind.find(x)
			if err != nil {
				return err
			}
			if len(found) > 0 {
				left = append(left, fmt.Errorf("%s: %s", kind.what, strings.Join(found, ", ")))
			}
		}
		return errors.Join(left...)
	})
}

// uidOf is the user a proxy runs as.
func uidOf(p process) (int, error) {
	status, err := p.status()
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(status["Uid"][0])
}
