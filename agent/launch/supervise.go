package launch

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"
)

// steady is how long a proxy must have run for its death to count as a first.
const steady = 10 * time.Second

// supervise starts looking after a's process and its session. The caller holds
// a.life.
func (m *Manager) supervise(a *attachment, i *Instance) {
	ctx, cancel := context.WithCancel(m.ctx)
	a.cancel, a.done = cancel, make(chan struct{})
	m.work.Add(1)
	go m.run(ctx, a, i)
}

// run owns one attachment's processes: it keeps a session with each, and when the newest
// dies, or takes no connections any more, puts another in its place. It returns when ctx
// is done, and leaves the processes that run then to whoever ended ctx.
func (m *Manager) run(ctx context.Context, a *attachment, i *Instance) {
	defer m.work.Done()
	defer close(a.done)
	var before sync.WaitGroup // proxies that are retired
	defer before.Wait()
	for _, w := range m.watchRetired(ctx, a) {
		before.Go(func() { m.seeOff(ctx, a, w) })
	}
	for failures := 0; ; {
		started := time.Now()
		w := m.watch(ctx, i, a.process)
		select {
		case <-w.dead:
		case <-ctx.Done():
		case <-i.draining.c:
		}
		retired := a.retire(w)
		if retired {
			before.Go(func() { m.seeOff(ctx, a, w) })
		} else {
			select {
			case <-w.dead:
			case <-ctx.Done(): // the process lives on; only the watching ends
			}
			w.stop()
		}
		if ctx.Err() != nil {
			return
		}
		if st := a.snapshot(); st.Released {
			before.Wait()
			if ctx.Err() == nil {
				go m.drained(st)
			}
			return
		}
		if time.Since(started) > steady {
			failures = 0
		}
		log := m.opts.Log.With("pod", i.Attachment.PodNamespace+"/"+i.Attachment.PodName,
			"container", i.Attachment.ContainerID, "generation", i.Attachment.Generation)
		told := m.opts.Restarted
		if retired || i.drains() {
			log.Info("proxy takes no new connections, another takes its place")
			told = m.opts.Upgraded
		} else {
			log.Warn("proxy died")
		}
		if i = m.replace(ctx, a, &failures); i == nil {
			return
		}
		if told != nil {
			told(i.Attachment)
		}
	}
}

// retire has the process that is watched go on beside the next one, until its last
// connection has ended. It reports false if it is not to: it has died, or it is released
// and nobody comes after it.
func (a *attachment) retire(w *watched) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	select {
	case <-w.dead:
		return false
	default:
	}
	if !w.instance.drains() || a.state.Released {
		return false
	}
	a.retired = append(a.retired, retired{w.instance.Attachment.Generation, a.process})
	a.process = nil
	return true
}

// watchRetired watches those that were retired before.
func (m *Manager) watchRetired(ctx context.Context, a *attachment) []*watched {
	a.mu.Lock()
	defer a.mu.Unlock()
	var all []*watched
	for _, r := range a.retired {
		st := a.state
		st.Generation = r.generation
		all = append(all, m.watch(ctx, m.instance(st), r.process))
	}
	return all
}

// seeOff returns when a retired process has ended, or ctx is done.
func (m *Manager) seeOff(ctx context.Context, a *attachment, w *watched) {
	select {
	case <-w.dead:
	case <-ctx.Done():
		w.stop()
		return
	}
	w.stop()
	a.mu.Lock()
	a.retired = slices.DeleteFunc(a.retired, func(r retired) bool { return r.process == w.process })
	a.mu.Unlock()
	w.process.release()
	_ = os.Remove(w.instance.Socket) // else it goes with the attachment
}

// drained ends an attachment whose released proxy has ended. It cannot be run's
// own doing, for which End waits.
func (m *Manager) drained(st Attachment) {
	if m.opts.Drained != nil {
		m.opts.Drained(st)
	}
	m.End(st.ContainerID, "")
}

// watched is a process with what looks after it.
type watched struct {
	instance *Instance
	process  *process
	dead     chan struct{} // closed when the process has ended
	cancel   context.CancelFunc
	work     sync.WaitGroup
}

// watch has a process looked after until stop is called, which must be: there is a session
// with it until then, or until ctx is done.
func (m *Manager) watch(ctx context.Context, i *Instance, p *process) *watched {
	w := &watched{instance: i, process: p, dead: make(chan struct{})}
	ctx, w.cancel = context.WithCancel(ctx)
	w.work.Go(func() { m.opts.Session(ctx, i) })
	w.work.Go(func() {
		if p.wait() == nil {
			close(w.dead)
		}
	})
	return w
}

// stop ends the session and the watching, not the process, and returns when they have.
func (w *watched) stop() {
	w.cancel()
	_ = w.process.pidfd.SetReadDeadline(time.Now())
	w.work.Wait()
	_ = w.process.pidfd.SetReadDeadline(time.Time{})
}

// replace starts a proxy on the listeners of the one that died, again and again
// until one serves or ctx is done; then it returns nil. A sandbox whose
// namespace is gone is left to Reap.
func (m *Manager) replace(ctx context.Context, a *attachment, failures *int) *Instance {
	a.mu.Lock()
	last := a.process
	a.process = nil
	a.mu.Unlock()
	if last != nil {
		last.release()
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(restartDelay(*failures)):
		}
		*failures++
		st := a.snapshot()
		i, err := m.again(a, st)
		if err == nil {
			if a.snapshot().Released { // while there was none to be told
				a.terminate()
			}
			return i
		}
		if ctx.Err() == nil {
			m.opts.Log.Error("proxy not restarted", "pod", st.PodNamespace+"/"+st.PodName, "container", st.ContainerID,
				"error", err, "retry", restartDelay(*failures))
		}
	}
}

// again starts one more generation in the namespace that a was attached to.
func (m *Manager) again(a *attachment, st Attachment) (*Instance, error) {
	ns, err := openNamespace(st.Netns)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	if ns.inode != st.NetnsInode {
		return nil, fmt.Errorf("%s is another namespace now", st.Netns)
	}
	return m.generation(a, ns)
}
