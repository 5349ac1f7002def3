package launch

import (
	"context"
	"fmt"
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

// run owns one attachment's process: it keeps a session with it, and when it
// dies puts another in its place. It returns when ctx is done, and leaves the
// process that runs then to whoever ended ctx.
func (m *Manager) run(ctx context.Context, a *attachment, i *Instance) {
	defer m.work.Done()
	defer close(a.done)
	for failures := 0; ; {
		started := time.Now()
		m.attend(ctx, i, a.process)
		if ctx.Err() != nil {
			return
		}
		if st := a.snapshot(); st.Released {
			go m.drained(st)
			return
		}
		if time.Since(started) > steady {
			failures = 0
		}
		m.opts.Log.Warn("proxy died", "pod", i.Attachment.PodNamespace+"/"+i.Attachment.PodName,
			"container", i.Attachment.ContainerID, "generation", i.Attachment.Generation)
		if i = m.replace(ctx, a, &failures); i == nil {
			return
		}
		if m.opts.Restarted != nil {
			m.opts.Restarted(i.Attachment)
		}
	}
}

// drained ends an attachment whose released proxy has ended. It cannot be run's
// own doing, for which End waits.
func (m *Manager) drained(st Attachment) {
	if m.opts.Drained != nil {
		m.opts.Drained(st)
	}
	m.End(st.ContainerID, "")
}

// attend runs the session of one process until the process has ended or ctx is
// done.
func (m *Manager) attend(ctx context.Context, i *Instance, p *process) {
	ctx, cancel := context.WithCancel(ctx)
	session, dead, turns := make(chan struct{}), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(session)
		m.opts.Session(ctx, i)
	}()
	go func() {
		defer close(turns)
		select {
		case <-i.acked:
			p.takeShortTurns()
		case <-ctx.Done():
		}
	}()
	go func() {
		defer close(dead)
		_ = p.wait()
	}()
	select {
	case <-dead:
	case <-ctx.Done():
		// The process lives on; only the watching ends.
		_ = p.pidfd.SetReadDeadline(time.Now())
		<-dead
		_ = p.pidfd.SetReadDeadline(time.Time{})
	}
	cancel()
	<-session
	<-turns
}

// replace starts a proxy on the listeners of the one that died, again and again
// until one serves or ctx is done; then it returns nil. A sandbox whose
// namespace is gone is left to Reap.
func (m *Manager) replace(ctx context.Context, a *attachment, failures *int) *Instance {
	if a.process != nil {
		a.process.release()
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
