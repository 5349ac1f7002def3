package cluster

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// namespaces are what a machine has of its own. The cgroup namespace stays the
// host's: kubelet and container runtimes want to see the tree from its root.
const namespaces = unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC

// Machine is a pretended machine: namespaces held open by a process that does
// nothing, and a cgroup. When that process dies, the kernel kills every other
// one in its PID namespace, and the namespaces go with their mounts and links.
type Machine struct {
	// Name is the machine's hostname; its cgroup, below the root of every
	// hierarchy, is called the same.
	Name string

	state     string // the cluster's state folder
	path      string // PATH of the machine's processes
	init      *process
	processes map[string]*process
}

func newMachine(state, name, path string) *Machine {
	m := &Machine{Name: name, state: state, path: path, processes: map[string]*process{}}
	m.init = m.process("init")
	return m
}

func (m *Machine) process(name string, args ...string) *process {
	return &process{
		Name: name, Args: args,
		record: filepath.Join(m.state, "run", m.Name+"."+name+".json"),
		log:    filepath.Join(m.state, "logs", m.Name+"-"+name+".log"),
	}
}

// create makes the namespaces, with pause as their first process.
func (m *Machine) create(pause string) error {
	m.init.Args = []string{pause}
	attr := &syscall.SysProcAttr{Setsid: true, Cloneflags: namespaces}
	if err := m.spawn(m.init, attr, (*exec.Cmd).Start); err != nil {
		return fmt.Errorf("machine %s: %w", m.Name, err)
	}
	return nil
}

// attach finds the running machine's processes from their notes.
func (m *Machine) attach() error {
	if err := m.init.load(); err != nil {
		return fmt.Errorf("machine %s: %w", m.Name, err)
	}
	notes, err := filepath.Glob(filepath.Join(m.state, "run", m.Name+".*.json"))
	if err != nil {
		return err
	}
	for _, note := range notes {
		name := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(note), m.Name+"."), ".json")
		p := m.process(name)
		if err := p.load(); err != nil {
			return fmt.Errorf("machine %s: %w", m.Name, err)
		}
		if name != "init" {
			m.processes[name] = p
		}
	}
	return nil
}

// spawn starts p, as launch does it, in the machine's cgroup and notes it. It
// does not wait for p: the process is to outlive this one.
func (m *Machine) spawn(p *process, attr *syscall.SysProcAttr, launch func(*exec.Cmd) error) error {
	system, err := makeCgroup(m.Name)
	if err != nil {
		return err
	}
	group, err := os.Open(system)
	if err != nil {
		return err
	}
	defer group.Close()
	attr.UseCgroupFD, attr.CgroupFD = true, int(group.Fd())
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()

	cmd := &exec.Cmd{
		Path: p.Args[0], Args: p.Args, Dir: "/", SysProcAttr: attr,
		Env:    append([]string{"PATH=" + m.path, "HOME=/root"}, p.Env...),
		Stdout: log, Stderr: log,
	}
	if err := launch(cmd); err != nil {
		return fmt.Errorf("start %s: %w", p.Name, err)
	}
	p.PID = cmd.Process.Pid
	start, _, err := processStat(p.PID)
	if err != nil {
		return fmt.Errorf("start %s: %w", p.Name, err)
	}
	p.Start = start
	if err := cmd.Process.Release(); err != nil {
		return err
	}
	if err := joinCgroup(m.Name, p.PID); err != nil {
		return err
	}
	return p.save()
}

// start runs p in the machine, in the background.
func (m *Machine) start(p *process) error {
	m.processes[p.Name] = p
	return m.spawn(p, &syscall.SysProcAttr{Setsid: true}, func(cmd *exec.Cmd) error {
		return m.inside(cmd.Start)
	})
}

// inside runs do on a thread that has entered the machine's namespaces. Child
// processes of that thread, and sockets it makes, are the machine's; but the
// thread itself stays in the host's PID namespace, and do must not start
// goroutines and expect them to be inside.
func (m *Machine) inside(do func() error) error {
	result := make(chan error)
	go m.enterAndDo(do, result)
	return <-result
}

// enterAndDo ends its thread with its goroutine, as it does not unlock it: no
// other goroutine ever runs in the machine's namespaces.
func (m *Machine) enterAndDo(do func() error, result chan<- error) {
	runtime.LockOSThread()
	result <- func() error {
		fd, err := unix.PidfdOpen(m.init.PID, 0)
		if err != nil || !m.init.alive() {
			if err == nil {
				unix.Close(fd)
			}
			return fmt.Errorf("machine %s is not running", m.Name)
		}
		defer unix.Close(fd)
		// A mount namespace can be entered only by a thread that shares its
		// working directory with no other.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("enter %s: %w", m.Name, err)
		}
		if err := unix.Setns(fd, namespaces); err != nil {
			return fmt.Errorf("enter %s: %w", m.Name, err)
		}
		return do()
	}()
}

// Command prepares a program to run inside the machine: in all its namespaces,
// with its PATH, in its root folder (Cmd.Dir has no effect). It is an exec.Cmd
// like any other; when ctx ends the program is killed with its children.
func (m *Machine) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	enter := []string{"--target", strconv.Itoa(m.init.PID), "--mount", "--net", "--pid", "--uts", "--ipc", "--", name}
	cmd := exec.CommandContext(ctx, "nsenter", append(enter, args...)...)
	cmd.Env = append(os.Environ(), "PATH="+m.path)
	// nsenter forks, as only a child can be in another PID namespace.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error {
		if err := unix.Kill(-cmd.Process.Pid, unix.SIGKILL); err != nil {
			return os.ErrProcessDone
		}
		return nil
	}
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// script runs a shell script in the machine.
func (m *Machine) script(ctx context.Context, text string) error {
	return output(m.Command(ctx, "sh", "-eu"), text)
}

// DialContext connects from inside the machine; it fits http.Transport. The
// address must be numeric: names are the caller's to resolve.
func (m *Machine) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	var conn net.Conn
	err := m.inside(func() error {
		// A dial of one address happens on the calling goroutine.
		c, err := (&net.Dialer{}).DialContext(ctx, network, address)
		conn = c
		return err
	})
	return conn, err
}

// receiveBuffer is how many bytes of frames wait to be read.
const receiveBuffer = 16 << 20

// Packets opens a packet socket (packet(7)): each Read is a frame that went through one
// of the machine's interfaces, in or out.
func (m *Machine) Packets(device string) (*os.File, error) {
	var socket *os.File
	err := m.inside(func() error {
		link, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		every := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("packet socket on %s: %w", m.Name, err)
		}
		socket = os.NewFile(uintptr(fd), "packets of "+device+" on "+m.Name)
		return errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: every, Ifindex: link.Index}))
	})
	if err != nil && socket != nil {
		socket.Close()
		socket = nil
	}
	return socket, err
}

// PID is the process that holds the machine's namespaces, in the host's PID
// namespace: /proc/<PID>/ns/net and /proc/<PID>/root are the machine's.
func (m *Machine) PID() int { return m.init.PID }

// Cgroup is the machine's cgroup, as /proc/<pid>/cgroup writes it. What a test
// puts below it goes away with the cluster.
func (m *Machine) Cgroup() string { return "/" + m.Name }

// Log is the path, on the host, of a process's log.
func (m *Machine) Log(process string) string { return m.process(process).log }

// Stop ends one of the machine's processes ("kubelet", "containerd",
// "kube-proxy"; on the fabric "etcd", "kube-apiserver",
// "kube-controller-manager", "kube-scheduler"): SIGTERM, after 3 s SIGKILL, which
// the API server comes to when clients watch.
func (m *Machine) Stop(ctx context.Context, process string) error {
	p, ok := m.processes[process]
	if !ok {
		return fmt.Errorf("machine %s has no process %q", m.Name, process)
	}
	return p.stop(ctx, 3*time.Second)
}

// Start starts a stopped process again, as it was, and does not wait for it to
// be ready.
func (m *Machine) Start(_ context.Context, process string) error {
	p, ok := m.processes[process]
	if !ok {
		return fmt.Errorf("machine %s has no process %q", m.Name, process)
	}
	if p.alive() {
		return nil
	}
	return m.start(p)
}

// running is a check for poll: it fails for good when the process has ended.
func (m *Machine) running(process string) error {
	p := m.processes[process]
	if p.alive() {
		return nil
	}
	return permanent{fmt.Errorf("%s on %s has ended; %s", process, m.Name, p.logTail())}
}

var errNotRunning = errors.New("the cluster is not running")
