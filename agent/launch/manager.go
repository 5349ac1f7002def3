// Package launch ships a proxy into a pod's network namespace and looks after
// it: it starts one weir-proxy per captured sandbox, starts it again on the same
// listeners when it dies, takes over those that run when the agent itself starts
// again, and ends them with the sandbox.
//
// The way of an attachment: Start (state file, cgroup, process, first config
// acknowledged) → Commit (rules are in place) → End. Whatever happens in
// between, the state file is there before anything else of it and goes last, so
// Recover always finds what an agent left behind.
//
// It knows no Kubernetes and no rules, and it does not speak to the proxies: the
// Session function it is given does, once for every proxy started or adopted.
package launch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/plugin/capture"
)

// Options is what a Manager is told of its node.
type Options struct {
	RunDir       string // /run/weir: sockets and state, on a tmpfs
	NetnsDir     string // where the host's /run/netns is seen
	CgroupRoot   string // where the host's /sys/fs/cgroup is seen
	CgroupParent string // cgroup of all proxies, relative to each hierarchy's root
	PodsCgroup   string // cgroup of all pods, relative to the v2 root; empty: it is looked for
	Proxy        string // weir-proxy, on a file system of the host that may execute
	Plugin       string // weir-cni, to have rules put in by
	HostCgroupNS string // the cgroup namespace that runtimes run plugins in, /proc/1/ns/cgroup
	HostMountNS  string // the mount namespace that they do so in, /proc/1/ns/mnt
	UIDBase      uint32 // proxies run as UIDBase, UIDBase+1, …
	MaxProcs     int    // GOMAXPROCS of a proxy
	Limits       Limits // of a proxy whose pod asks for none

	Log *slog.Logger
	// Session speaks to one proxy until ctx is done. It calls
	// Instance.Acknowledged once the proxy took its first config.
	Session func(ctx context.Context, i *Instance)
	// Restarted is told when a proxy died and another took its place.
	Restarted func(a Attachment)
	// Upgraded is told when a proxy was asked to end and another took its place; the one
	// before ends with its last connection. It may be nil.
	Upgraded func(a Attachment)
	// Drained is told when a released proxy has ended with its last connection: its
	// rules can go.
	Drained func(a Attachment)
	// Changed is told, and must not wait, when what List says of who is captured is
	// another. It may be nil.
	Changed func()
}

// Traffic is a Spec of which only what is captured counts, not ports and bypass.
type Traffic = capture.Spec

// Request asks for a proxy in a sandbox's network namespace.
type Request struct {
	ContainerID, IfName           string
	Netns                         string // path in the host's mount namespace
	PodNamespace, PodName, PodUID string
	PodLabels                     map[string]string // nil: not known
	Addresses                     []netip.Addr
	// Spec is without bypass and, unless others than the usual ones are wanted,
	// without ports: Start fills them in.
	Spec        capture.Spec
	Limits      Limits // what the pod asks for
	OpaquePorts []capture.PortRange
}

// Instance is one running proxy: one generation of an attachment.
type Instance struct {
	Attachment Attachment
	Socket     string // its control API

	manager         *Manager // nil: it is nobody's
	acked, draining event
}

// event happens once, or again to no effect.
type event struct {
	once sync.Once
	c    chan struct{} // closed when it has
}

func (e *event) happen() { e.once.Do(func() { close(e.c) }) }

// NewInstance names a proxy that serves its control API on socket.
func NewInstance(a Attachment, socket string) *Instance {
	return &Instance{Attachment: a, Socket: socket, acked: event{c: make(chan struct{})}, draining: event{c: make(chan struct{})}}
}

// Acknowledged says that the proxy took its first config.
func (i *Instance) Acknowledged() { i.acked.happen() }

// Acked is closed once the proxy took its first config.
func (i *Instance) Acked() <-chan struct{} { return i.acked.c }

// Draining says that the proxy takes no new connections and ends with its last one.
func (i *Instance) Draining() { i.draining.happen() }

func (i *Instance) drains() bool {
	select {
	case <-i.draining.c:
		return true
	default:
		return false
	}
}

// Manager holds the node's attachments.
type Manager struct {
	opts    Options
	cgroups *cgroups
	store   store
	host    uint64 // inode of the host's network namespace

	starting chan struct{} // a place for each Start that may be at work

	ctx    context.Context // of the supervisors
	cancel context.CancelFunc
	work   sync.WaitGroup

	mu          sync.Mutex
	attachments map[string]*attachment
}

// attachment is an Attachment and what runs of it.
type attachment struct {
	life   sync.Mutex         // held by Start and End, from their beginning to their end
	ended  bool               // guarded by life
	cancel context.CancelFunc // ends supervisor and session; guarded by life
	done   chan struct{}      // closed when the supervisor has returned; guarded by life

	mu        sync.Mutex // held for moments: guards what the supervisor changes too
	state     Attachment
	listeners []listener
	identity  *os.File // memory file of the proxy's key and certificate; nil: none
	process   *process // the newest, which takes connections; nil: there is none
	retired   []retired
}

// retired is a process that takes no new connections, with its generation: there is a
// newer one.
type retired struct {
	generation uint32
	process    *process
}

// change changes a's state and writes it down.
func (m *Manager) change(a *attachment, f func(*Attachment)) (Attachment, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f(&a.state)
	return a.state, m.store.save(a.state)
}

func (a *attachment) snapshot() Attachment {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state
}

// startsPerCPU bounds the proxies that are being started. To start one is work for
// the CPU: of all the pods of a node at once, each would be ready when the last is.
const startsPerCPU = 2

// NamespaceError says that a network namespace is gone, or not the pod's.
type NamespaceError struct{ Err error }

func (e *NamespaceError) Error() string { return e.Err.Error() }
func (e *NamespaceError) Unwrap() error { return e.Err }

// Open prepares the node: folders and the parent cgroup. Nothing is started.
func Open(opts Options) (*Manager, error) {
	for _, dir := range []string{opts.RunDir, socketDir(opts.RunDir)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("launch: %w", err)
		}
	}
	s, err := openStore(storeDir(opts.RunDir))
	if err != nil {
		return nil, fmt.Errorf("launch: %w", err)
	}
	c, err := openCgroups(opts.CgroupRoot, opts.CgroupParent)
	if err != nil {
		return nil, fmt.Errorf("launch: %w", err)
	}
	host, err := hostInode()
	if err != nil {
		return nil, fmt.Errorf("launch: %w", err)
	}
	m := &Manager{opts: opts, cgroups: c, store: s, host: host, starting: make(chan struct{}, startsPerCPU*runtime.NumCPU()), attachments: map[string]*attachment{}}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	return m, nil
}

// Bypass is what rules need to recognise the proxies' own connections.
func (m *Manager) Bypass() (capture.Bypass, error) { return m.cgroups.bypass() }

// Start makes sure that a proxy serves in the sandbox and has its first config.
// As soon as the sandbox is known to be sound, and before the proxy is started,
// it calls claimed with the attachment, its Spec complete: rules can be put in
// meanwhile. A second Start of one container finds the first one's proxy. On
// error, claimed's included, nothing is left of it.
func (m *Manager) Start(ctx context.Context, req Request, claimed func(Attachment) error) (Attachment, error) {
	if err := ValidID(req.ContainerID); err != nil {
		return Attachment{}, err
	}
	select {
	case m.starting <- struct{}{}:
		defer func() { <-m.starting }()
	case <-ctx.Done():
		return Attachment{}, fmt.Errorf("%d proxies are being started, and this one's turn did not come: %w", cap(m.starting), context.Cause(ctx))
	}
	bypass, err := m.cgroups.bypass()
	if err != nil {
		return Attachment{}, err
	}
	ns, err := m.checkNamespace(req)
	if err != nil {
		return Attachment{}, &NamespaceError{err}
	}
	defer ns.Close()

	a, err := m.claim(req, ns.inode, bypass)
	if err != nil {
		return Attachment{}, err
	}
	a.life.Lock()
	defer a.life.Unlock()
	if a.ended {
		return Attachment{}, errDeleted
	}
	if err := claimed(a.snapshot()); err != nil {
		if a.done == nil {
			m.end(a)
		}
		return Attachment{}, err
	}
	if a.done != nil { // a further interface of the same sandbox, or a repeated ADD
		return m.change(a, func(st *Attachment) {
			if !slices.Contains(st.IfNames, req.IfName) {
				st.IfNames = append(slices.Clone(st.IfNames), req.IfName)
			}
		})
	}
	i, err := m.start(a, ns)
	if err == nil {
		select {
		case <-i.acked.c:
			return i.Attachment, nil
		case <-ctx.Done():
			err = fmt.Errorf("the proxy did not acknowledge its first config: %w", context.Cause(ctx))
		}
	}
	m.end(a)
	return Attachment{}, err
}

// errDeleted: DEL overtook ADD.
var errDeleted = errors.New("the sandbox was deleted meanwhile")

// checkNamespace opens the sandbox's namespace and makes sure that it is the
// pod's own: not the host's, and holding the addresses the primary plugin gave.
func (m *Manager) checkNamespace(req Request) (namespace, error) {
	ns, err := openNamespace(hostNetnsPath(m.opts.NetnsDir, req.Netns))
	if err != nil {
		return namespace{}, err
	}
	if ns.inode == m.host {
		ns.Close()
		return namespace{}, fmt.Errorf("%s is the host's network namespace", req.Netns)
	}
	missing, err := ns.missing(req.Addresses)
	if err == nil && len(missing) > 0 {
		err = fmt.Errorf("%s does not hold %v, which the primary plugin reported", req.Netns, missing)
	}
	if err != nil {
		ns.Close()
		return namespace{}, err
	}
	return ns, nil
}

// claim finds or makes the attachment of req, and refuses a namespace that
// belongs to another container.
func (m *Manager) claim(req Request, inode uint64, bypass capture.Bypass) (*attachment, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	uids := map[uint32]bool{}
	for id, other := range m.attachments {
		st := other.snapshot()
		if (id == req.ContainerID) != (st.NetnsInode == inode) {
			return nil, &NamespaceError{fmt.Errorf("container %s is attached to %s already", id, st.Netns)}
		}
		uids[st.ProxyUID] = true
	}
	if a := m.attachments[req.ContainerID]; a != nil {
		return a, nil
	}
	uid := m.opts.UIDBase
	for uids[uid] {
		uid++
	}
	spec := req.Spec
	spec.Bypass = bypass
	if spec.OutboundPort == 0 {
		spec.OutboundPort, spec.InboundPort = capture.DefaultOutboundPort, capture.DefaultInboundPort
	}
	a := &attachment{state: Attachment{
		ContainerID:  req.ContainerID,
		IfNames:      []string{req.IfName},
		Netns:        hostNetnsPath(m.opts.NetnsDir, req.Netns),
		NetnsInode:   inode,
		PodNamespace: req.PodNamespace,
		PodName:      req.PodName,
		PodUID:       req.PodUID,
		PodLabels:    req.PodLabels,
		Addresses:    req.Addresses,
		Spec:         spec,
		Limits:       req.Limits,
		OpaquePorts:  req.OpaquePorts,
		ProxyUID:     uid,
	}}
	m.attachments[req.ContainerID] = a
	return a, nil
}

// start brings a's next generation up, on the listeners it has or on new ones,
// and has it looked after. The caller holds a.life.
func (m *Manager) start(a *attachment, ns namespace) (*Instance, error) {
	i, err := m.generation(a, ns)
	if err != nil {
		return nil, err
	}
	m.supervise(a, i)
	return i, nil
}

// generation starts one more proxy for a. Where the parent cgroup was made anew
// since the last one, the pod's rules let nothing by until they are compared with
// what they should be now; until then its proxy closes what comes back to it.
func (m *Manager) generation(a *attachment, ns namespace) (*Instance, error) {
	bypass, err := m.cgroups.bypass()
	if err != nil {
		return nil, err
	}
	st, err := m.change(a, func(st *Attachment) {
		st.Generation++
		st.Spec.Bypass = bypass
	})
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	kept, identity := a.listeners, a.identity // nobody changes them while no proxy runs
	a.mu.Unlock()
	p, listeners, err := m.spawn(ns, st, kept, identity)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.process, a.listeners = p, listeners
	return m.instance(st), nil
}

func (m *Manager) instance(st Attachment) *Instance {
	i := NewInstance(st, m.socketPath(st.ContainerID, st.Generation))
	i.manager = m
	return i
}

// Commit marks the attachment as captured: an agent that starts again keeps it.
func (m *Manager) Commit(id string) error {
	_, err := m.update(id, func(st *Attachment) { st.Committed = true })
	return err
}

// End detaches one interface; with the last (or an empty name: with all) the
// proxy ends, and nothing of the attachment is left. Unknown ones are no error.
func (m *Manager) End(id, ifname string) {
	a := m.find(id)
	if a == nil {
		return
	}
	a.life.Lock()
	defer a.life.Unlock()
	if a.ended {
		return
	}
	st, err := m.change(a, func(st *Attachment) {
		st.IfNames = slices.DeleteFunc(slices.Clone(st.IfNames), func(n string) bool { return ifname == "" || n == ifname })
	})
	if err != nil {
		m.opts.Log.Error("attachment not written", "container", id, "error", err)
	}
	if len(st.IfNames) == 0 {
		m.end(a)
	}
}

func (m *Manager) find(id string) *attachment {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.attachments[id]
}

// Is reports whether an attachment is the one of a container, or of a network
// namespace by the runtime's path.
func (m *Manager) Is(a Attachment, id, netns string) bool {
	return a.ContainerID == id || netns != "" && a.Netns == hostNetnsPath(m.opts.NetnsDir, netns)
}

// EndNamespace ends the attachment of a network namespace, by the path that the
// runtime has for it: one that was captured in place is not known by the
// runtime's name for the container.
func (m *Manager) EndNamespace(netns string) {
	for _, st := range m.List() {
		if m.Is(st, "", netns) {
			m.End(st.ContainerID, "")
		}
	}
}

// Change sets which traffic an attachment captures. Ports, bypass, and whether the
// proxy may use callers' addresses stay. The rules are the caller's business.
func (m *Manager) Change(id string, traffic Traffic) (Attachment, error) {
	return m.update(id, func(st *Attachment) {
		traffic.OutboundPort, traffic.InboundPort, traffic.Bypass = st.Spec.OutboundPort, st.Spec.InboundPort, st.Spec.Bypass
		traffic.KeepClient = st.Spec.KeepClient
		st.Spec = traffic
	})
}

// Farewell says that an attachment will be released in a moment. Nothing happens to it
// yet: others get to know that its pod is captured no longer.
func (m *Manager) Farewell(id string) error {
	_, err := m.update(id, func(st *Attachment) { st.Leaving = true })
	return err
}

// Release lets a proxy end: it takes no new connections and exits with its last
// one, and is not replaced; then Drained is called and the attachment ends. The
// rules must turn nothing new aside any more.
func (m *Manager) Release(id string) error {
	if _, err := m.update(id, func(st *Attachment) { st.Released = true }); err != nil {
		return err
	}
	if a := m.find(id); a != nil {
		a.terminate()
	}
	return nil
}

// terminate asks the newest proxy to end with its last connection; older ones have been.
func (a *attachment) terminate() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.process != nil {
		a.process.signal(unix.SIGTERM)
	}
}

// update changes what is kept of an attachment that has not ended.
func (m *Manager) update(id string, f func(*Attachment)) (Attachment, error) {
	a := m.find(id)
	if a == nil {
		return Attachment{}, errDeleted
	}
	a.life.Lock()
	defer a.life.Unlock()
	if a.ended {
		return Attachment{}, errDeleted
	}
	defer m.changed()
	return m.change(a, f)
}

func (m *Manager) changed() {
	if m.opts.Changed != nil {
		m.opts.Changed()
	}
}

// Fault says what is wrong with the proxy of an attachment; empty: nothing.
func (m *Manager) Fault(st Attachment) string {
	if len(m.cgroups.pids(st.ContainerID)) == 0 {
		return "the pod's proxy does not run; the agent starts it again"
	}
	return ""
}

// List returns the attachments there are.
func (m *Manager) List() []Attachment {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]Attachment, 0, len(m.attachments))
	for _, a := range m.attachments {
		out = append(out, a.snapshot())
	}
	return out
}

// end takes everything of a down. The caller holds a.life.
func (m *Manager) end(a *attachment) {
	a.ended = true
	if a.done != nil {
		a.cancel()
		<-a.done
	}
	// The supervisor has returned: nothing changes any more.
	st := a.snapshot()
	for _, r := range a.retired {
		r.process.kill()
	}
	if a.process != nil {
		a.process.kill()
	}
	closeListeners(a.listeners)
	a.dropIdentity()
	err := m.cgroups.remove(st.ContainerID)
	err = errors.Join(err, m.removeSockets(st.ContainerID))
	if err == nil {
		err = m.store.remove(st.ContainerID)
	}
	if err != nil {
		// The state file stays: the next Recover tries again.
		m.opts.Log.Error("attachment not wholly removed", "container", st.ContainerID, "error", err)
	}
	m.mu.Lock()
	delete(m.attachments, st.ContainerID)
	m.mu.Unlock()
	m.changed()
}

// The folders of a Manager below Options.RunDir: proxies' control sockets, state
// files, and iptables' lock files of repairs.
func socketDir(runDir string) string { return filepath.Join(runDir, "p") }
func storeDir(runDir string) string  { return filepath.Join(runDir, "attachments") }
func lockDir(runDir string) string   { return filepath.Join(runDir, "lock") }

// RemoveFolders removes a closed Manager's folders, but for those with something
// in them of proxies that still run.
func RemoveFolders(runDir string) error {
	os.Remove(socketDir(runDir))
	os.Remove(storeDir(runDir))
	return os.RemoveAll(lockDir(runDir))
}

// Close stops looking after the proxies; they go on without an agent. A parent
// cgroup without a proxy goes.
func (m *Manager) Close() {
	m.cancel()
	m.work.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, a := range m.attachments {
		a.letGo()
	}
	m.cgroups.close()
}

// letGo lets go of what is held of an attachment; its proxies go on.
func (a *attachment) letGo() {
	closeListeners(a.listeners)
	a.dropIdentity()
	if a.process != nil {
		a.process.release()
	}
	for _, r := range a.retired {
		r.process.release()
	}
}

// restartDelay is how long a proxy that keeps dying is left down: nothing for
// the first time, then doubling. Its callers wait in the listeners' queues.
func restartDelay(failures int) time.Duration {
	if failures == 0 {
		return 0
	}
	return min(10*time.Millisecond<<min(failures, 10), time.Second)
}
