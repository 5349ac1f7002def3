package pod

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// nodeVariable holds the node's name in the environment of all that runs on it.
const nodeVariable = "WEIR_NODE"

// lifeline is a pipe's descriptor in the isolated program: when its other end
// closes, the program outside is gone.
const lifeline = 3

// Interrupted is the exit code of a program that a signal ended.
const Interrupted = 130

// NodeDir is the tmpfs that hides the machine's own folder of that name on a
// node: its files go with the node.
const NodeDir = "/run"

// Node is this program's own piece of a machine.
type Node struct {
	// Name is unique on the machine while the node exists, and the name of the
	// cgroup of its proxies.
	Name string

	closing sync.Once
	closed  error
}

// Isolate runs this program again, with the same arguments, on a node of its own
// named after kind, and returns its exit code when it and all that it started
// have ended. A ctx that is done ends them at once.
func Isolate(ctx context.Context, kind string) (int, error) {
	if os.Geteuid() != 0 {
		return 0, errors.New("this needs root: it makes namespaces and cgroups; try sudo")
	}
	name := fmt.Sprintf("weir-%s-%d", kind, os.Getpid())
	ours, theirs, err := os.Pipe()
	if err != nil {
		return 0, fmt.Errorf("isolate: %w", err)
	}
	defer theirs.Close()
	defer ours.Close()

	cmd := exec.CommandContext(ctx, "/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), nodeVariable+"="+name)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{ours}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET,
		Setsid:     true, // a terminal's Ctrl-C reaches the program outside alone
	}
	// The first process of a PID namespace ends last: when it is waited for, the
	// kernel has ended and reaped all others.
	err = cmd.Run()
	err = errors.Join(exitError(ctx, cmd, err), removeCgroups(name))
	switch {
	case err != nil:
		return 0, err
	case ctx.Err() != nil:
		return Interrupted, nil
	}
	return cmd.ProcessState.ExitCode(), nil
}

// exitError leaves of a command's error what is not its exit code.
func exitError(ctx context.Context, cmd *exec.Cmd, err error) error {
	var exit *exec.ExitError
	switch {
	case err == nil, ctx.Err() != nil:
		return nil
	case errors.As(err, &exit) && exit.ExitCode() >= 0:
		return nil
	}
	return fmt.Errorf("isolate %s: %w", cmd.Args[0], err)
}

// Enter returns the node this program was isolated on, or nil if it was not.
// It must be called once, before anything is started.
func Enter() (*Node, error) {
	name := os.Getenv(nodeVariable)
	if name == "" || os.Getpid() != 1 {
		return nil, nil
	}
	unix.CloseOnExec(lifeline)
	if err := mountNode(); err != nil {
		return nil, fmt.Errorf("node %s: %w", name, err)
	}
	if err := setUpNetwork(); err != nil {
		return nil, fmt.Errorf("node %s: %w", name, err)
	}
	n := &Node{Name: name}
	go n.endWith(os.NewFile(lifeline, "lifeline"))
	return n, nil
}

func setUpNetwork() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	return acceptNewAddresses()
}

// Close ends all that runs on the node but this program. Without it the kernel
// does, when this program ends, and Isolate removes the cgroups.
func (n *Node) Close() error {
	n.closing.Do(func() { n.closed = errors.Join(killOthers(), n.leavePods(), removeCgroups(n.Name)) })
	return n.closed
}

// endWith ends this program when the one outside was killed: no Isolate is there
// to remove the cgroups.
func (n *Node) endWith(pipe *os.File) {
	_, _ = pipe.Read(make([]byte, 1))
	if err := n.Close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(Interrupted)
}

// killOthers ends all other processes of this PID namespace, whose first process
// this is, and waits for them: a parent that lives a moment longer may have
// started another.
func killOthers() error {
	for deadline := time.Now().Add(removeTimeout); ; time.Sleep(2 * time.Millisecond) {
		// This /proc must be the namespace's own, or these were the machine's.
		if self, err := os.Readlink("/proc/self"); err != nil || self != "1" || os.Getpid() != 1 {
			return errors.New("end the node: /proc is not its own")
		}
		entries, err := os.ReadDir("/proc")
		if err != nil {
			return fmt.Errorf("end the node: %w", err)
		}
		others := 0
		for _, e := range entries {
			if pid, err := strconv.Atoi(e.Name()); err == nil && pid > 1 {
				others++
				_ = unix.Kill(pid, unix.SIGKILL)
				_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil) // orphans are this process's to reap
			}
		}
		if others == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("end the node: %d processes do not end", others)
		}
	}
}

// mountNode gives the node its own /proc, which speaks of its own processes, and
// its own /run.
func mountNode() error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	if dir, err := os.Getwd(); err == nil && strings.HasPrefix(dir, NodeDir+"/") || strings.HasPrefix(exe, NodeDir+"/") {
		return fmt.Errorf("this does not run from a folder below %s: a node hides it", NodeDir)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := unix.Mount("tmpfs", NodeDir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return fmt.Errorf("mount %s: %w", NodeDir, err)
	}
	return os.Mkdir(netnsDir, 0o755)
}

// acceptNewAddresses lets interfaces that are made from now on use their IPv6
// addresses at once: detecting duplicates takes a second or two, and here there
// are none. A kernel without IPv6 needs nothing.
func acceptNewAddresses() error {
	err := os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
