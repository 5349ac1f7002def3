package launch

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/plugin/capture"
)

// rebuild takes up the proxies that run and of which no file speaks, because it was
// corrupt or somebody removed it. What the kernel and the proxy know of an
// attachment is taken from them; which pod it is of, and what that wants, is not:
// see Identify. A proxy that cannot be taken up is ended; its pod is captured anew.
func (m *Manager) rebuild() {
	for _, id := range m.cgroups.names() {
		if m.find(id) != nil {
			continue
		}
		a, err := m.rebuilt(id)
		if err == nil {
			st := a.snapshot()
			m.opts.Log.Warn("attachment rebuilt: no file says what it was", "container", id, "netns", st.Netns, "addresses", st.Addresses, "generation", st.Generation)
			continue
		}
		m.opts.Log.Warn("cgroup of no attachment: what runs in it ends", "container", id, "cause", err)
		if err := errors.Join(m.cgroups.remove(id), m.removeSockets(id)); err != nil {
			m.opts.Log.Error("cgroup not removed", "container", id, "error", err)
		}
	}
}

// rebuilt takes up the proxy in the cgroup of that name.
func (m *Manager) rebuilt(id string) (*attachment, error) {
	if err := ValidID(id); err != nil {
		return nil, err
	}
	pids, err := m.running(id)
	if err != nil {
		return nil, err
	}
	if len(pids) == 0 {
		return nil, errors.New("no proxy runs")
	}
	bypass, err := m.cgroups.bypass()
	if err != nil {
		return nil, err
	}
	st := Attachment{ContainerID: id, IfNames: []string{firstIfName}, Spec: capture.Spec{Bypass: bypass}, Committed: true}
	st.Generation = newest(pids)
	if err := m.place(&st, pids[st.Generation]); err != nil {
		return nil, err
	}
	a := &attachment{state: st}
	if err := m.takeUp(a, pids); err != nil {
		return nil, err
	}
	for _, l := range a.listeners {
		addr, err := netip.ParseAddrPort(l.GetAddress())
		switch {
		case err != nil:
		case l.GetName() == "outbound":
			st.Spec.OutboundPort = addr.Port()
		case l.GetName() == "inbound":
			st.Spec.InboundPort = addr.Port()
		}
	}
	a.state = st
	st, err = m.change(a, func(*Attachment) {})
	if err == nil {
		err = st.Spec.Validate()
	}
	if err != nil {
		a.letGo()
		return nil, errors.Join(err, m.store.remove(id))
	}
	m.mu.Lock()
	m.attachments[id] = a
	m.mu.Unlock()
	a.life.Lock()
	defer a.life.Unlock()
	m.supervise(a, m.instance(st))
	return a, nil
}

// place fills in what the kernel knows of a proxy: where it is, and as what it runs.
func (m *Manager) place(st *Attachment, pid int) error {
	proc := fmt.Sprintf("/proc/%d", pid)
	own, err := openNamespace(proc + "/ns/net")
	if err != nil {
		return err
	}
	defer own.Close()
	entries, err := os.ReadDir(m.opts.NetnsDir)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(entries, func(e os.DirEntry) bool {
		ns, err := openNamespace(filepath.Join(m.opts.NetnsDir, e.Name()))
		if err != nil {
			return false
		}
		defer ns.Close()
		return ns.inode == own.inode
	})
	if i < 0 || own.inode == m.host {
		return fmt.Errorf("its network namespace is none of %s", m.opts.NetnsDir)
	}
	st.Netns, st.NetnsInode = filepath.Join(m.opts.NetnsDir, entries[i].Name()), own.inode
	if st.Addresses, err = own.addresses(); err != nil {
		return err
	}
	status, err := os.ReadFile(proc + "/status")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(status)) {
		fields := strings.Fields(line)
		switch {
		case len(fields) < 2:
		case fields[0] == "Uid:":
			uid, err := strconv.ParseUint(fields[1], 10, 32)
			if err != nil {
				return err
			}
			st.ProxyUID = uint32(uid)
		case fields[0] == "CapEff:":
			st.Spec.KeepClient = strings.Trim(fields[1], "0") != "" // it has one capability, or none
		}
	}
	if st.ProxyUID < m.opts.UIDBase {
		return fmt.Errorf("it runs as uid %d, which is no proxy's", st.ProxyUID)
	}
	return nil
}

// Identify says which pod a rebuilt attachment is of, and what that wants of its
// proxy. What traffic is captured is for Change to say.
func (m *Manager) Identify(id string, pod Request) error {
	a := m.find(id)
	if a == nil {
		return errDeleted
	}
	a.life.Lock()
	defer a.life.Unlock()
	if a.ended || a.done == nil {
		return errDeleted
	}
	// A session is of the attachment as it was when that began.
	a.cancel()
	<-a.done
	st, err := m.change(a, func(st *Attachment) {
		st.PodNamespace, st.PodName, st.PodUID = pod.PodNamespace, pod.PodName, pod.PodUID
		st.PodLabels = pod.PodLabels
		st.Limits, st.OpaquePorts = pod.Limits, pod.OpaquePorts
	})
	m.supervise(a, m.instance(st))
	return err
}

// Identified reports whether it is known which pod the attachment is of.
func (a Attachment) Identified() bool { return a.PodName != "" }
