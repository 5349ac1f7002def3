package launch

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Recover takes up what an earlier agent of this boot left: proxies that run are
// adopted with their listeners, those that died meanwhile are started again, and
// attachments that were never committed, or whose sandbox is gone, are ended. What
// no file speaks of any more is rebuilt.
func (m *Manager) Recover() error {
	states, bad, err := m.store.load()
	if err != nil {
		return fmt.Errorf("launch: %w", err)
	}
	for _, path := range bad {
		m.opts.Log.Error("corrupt attachment set aside", "file", path+".bad")
	}
	for _, st := range states {
		a := &attachment{state: st}
		m.mu.Lock()
		m.attachments[st.ContainerID] = a
		m.mu.Unlock()
		m.resume(a)
	}
	m.rebuild()
	return nil
}

// resume takes up one attachment.
func (m *Manager) resume(a *attachment) {
	a.life.Lock()
	defer a.life.Unlock()
	st := a.state
	log := m.opts.Log.With("pod", st.PodNamespace+"/"+st.PodName, "container", st.ContainerID)
	ns, err := openNamespace(st.Netns)
	if err == nil {
		defer ns.Close()
		if ns.inode != st.NetnsInode {
			err = fmt.Errorf("%s is another namespace now", st.Netns)
		}
	}
	switch {
	case err != nil:
		log.Info("sandbox is gone, its proxy ends", "cause", err)
		m.end(a)
		return
	case !st.Committed:
		log.Info("attachment was never finished, its proxy ends")
		m.end(a)
		return
	}
	pids, err := m.running(st.ContainerID)
	if err == nil && len(pids) > 0 {
		err = m.takeUp(a, pids)
	}
	switch {
	case err != nil:
		log.Warn("proxy not adopted, another takes its place", "error", err)
	case a.process != nil:
		if st.Released {
			a.terminate() // in case nobody had come to that
		}
		m.supervise(a, m.instance(st))
		log.Info("proxy adopted", "pid", pids[st.Generation], "generation", st.Generation)
		return
	case len(a.retired) > 0:
		log.Warn("proxy died, an older one has connections left")
		m.retryLater(a)
		return
	}
	if err := m.cgroups.remove(st.ContainerID); err != nil {
		log.Error("proxy not ended", "error", err)
	}
	if st.Released {
		log.Info("the released proxy has ended")
		go m.drained(st)
		return
	}
	if _, err := m.start(a, ns); err != nil {
		// Its rules are there and its ports closed: nothing leaves it uncaptured.
		log.Error("proxy not restarted", "error", err)
		m.retryLater(a)
	}
}

// running are the processes of a container's proxies, by generation: one, or more while
// older ones have connections left.
func (m *Manager) running(id string) (map[uint32]int, error) {
	all := map[uint32]int{}
	for _, pid := range m.cgroups.pids(id) {
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil || len(line) == 0 {
			continue // it has ended
		}
		generation, err := generationOf(string(line))
		if err != nil {
			return nil, fmt.Errorf("process %d of its cgroup: %w", pid, err)
		}
		all[generation] = pid
	}
	return all, nil
}

// newest is the highest generation of at least one.
func newest(pids map[uint32]int) uint32 { return slices.Max(slices.Collect(maps.Keys(pids))) }

// generationOf reads a proxy's command line (proc_pid_cmdline(5)): "weir-proxy", "serve",
// container ID, generation, and more, as package jail has it.
func generationOf(cmdline string) (uint32, error) {
	args := strings.Split(cmdline, "\x00")
	if len(args) < 4 || args[1] != "serve" {
		return 0, fmt.Errorf("%q is no proxy that serves", args)
	}
	generation, err := strconv.ParseUint(args[3], 10, 32)
	return uint32(generation), err
}

// takeUp adopts an attachment's running proxies, at least one. Where the newest has died,
// what it had is had from one before.
func (m *Manager) takeUp(a *attachment, pids map[uint32]int) error {
	from := a.state
	if pids[from.Generation] == 0 {
		from.Generation = newest(pids)
	}
	p, listeners, err := m.adopt(from, pids[from.Generation])
	if err != nil {
		return err
	}
	a.listeners, a.identity = listeners, m.adoptIdentity(from)
	for g, pid := range pids {
		switch {
		case g != from.Generation:
			if older, err := openProcess(pid); err == nil { // else it has ended
				a.retired = append(a.retired, retired{g, older})
			}
		case g == a.state.Generation:
			a.process = p
		default:
			a.retired = append(a.retired, retired{g, p})
		}
	}
	return nil
}

// retryLater has a proxy that could not be resumed started in the background.
func (m *Manager) retryLater(a *attachment) {
	ctx, cancel := context.WithCancel(m.ctx)
	a.cancel, a.done = cancel, make(chan struct{})
	m.work.Add(1)
	go m.runFromNothing(ctx, a)
}

// runFromNothing is run for an attachment without a process.
func (m *Manager) runFromNothing(ctx context.Context, a *attachment) {
	failures := 1
	i := m.replace(ctx, a, &failures)
	if i == nil {
		defer m.work.Done()
		close(a.done)
		return
	}
	m.run(ctx, a, i)
}

// reapInterval is how often sandboxes are looked for that went without a DEL.
const reapInterval = 5 * time.Second

// Reap ends attachments whose namespace the runtime has removed without a DEL,
// until ctx is done: the proxy in it would keep the namespace and its
// interfaces, and the dead pod's address could answer.
func (m *Manager) Reap(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(reapInterval):
		}
		for _, st := range m.List() {
			ns, err := openNamespace(st.Netns)
			if err == nil {
				ns.Close()
				if ns.inode == st.NetnsInode {
					continue
				}
			}
			m.opts.Log.Info("sandbox went without a DEL, its proxy ends", "pod", st.PodNamespace+"/"+st.PodName, "container", st.ContainerID)
			m.End(st.ContainerID, "")
		}
	}
}
