package relay

import (
	"errors"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/mtls"
	"github.com/weirmesh/weir/proxy/reason"
)

// pair is a client's connection joined to an upstream's. Each end sees the other
// as it is: what it sends, that it has finished sending, and that it broke off.
type pair struct {
	client, upstream *conn
	pipes            *pipes
	gate             gate

	mu       sync.Mutex
	finished int // directions that came to their end
	cause    *reason.Error
}

// join moves bytes both ways until both have ended or one failed, and returns how
// many went up, how many came down, and the failure. The caller
// closes both connections; after a failure that resets them.
func (p *pair) join() (uint64, uint64, *reason.Error) {
	up, err := p.pump(p.upstream, p.client)
	if err != nil {
		p.abort(reason.ClientGone, err)
		return 0, 0, p.cause
	}
	down, err := p.pump(p.client, p.upstream)
	if err != nil {
		p.abort(reason.UpstreamClosed, err)
		return 0, 0, p.cause
	}
	done := make(chan uint64)
	go p.upward(up, done)
	received := p.direction(down, p.upstream, reason.UpstreamClosed, reason.ClientGone)
	sent := <-done
	return sent, received, p.cause
}

// mover moves the bytes of one direction.
type mover interface {
	// run moves them until the source ends, and half-closes the destination. It returns
	// their number; with an error, whether it was the source that failed.
	run() (uint64, bool, error)
}

func (p *pair) upward(m mover, done chan<- uint64) {
	done <- p.direction(m, p.client, reason.ClientGone, reason.UpstreamClosed)
}

func (p *pair) pump(dst, src *conn) (mover, error) {
	var out mover = &copier{src: src, dst: dst}
	if src.secure == nil && dst.secure == nil {
		var err error
		if out, err = newPump(dst.tcp, src.tcp, p.pipes); err != nil {
			return nil, err
		}
	}
	if src.stream != nil {
		return out, nil
	}
	var failed error
	err := src.raw.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_OOBINLINE, 1)
	})
	return out, errors.Join(err, failed)
}

// direction moves bytes from one end to the other. When they have ended it stays
// for a reset of its source, which nobody else would notice.
func (p *pair) direction(m mover, source *conn, sourceFailed, destinationFailed reason.Reason) uint64 {
	moved, fromSource, err := m.run()
	switch {
	case err != nil && fromSource:
		p.abort(sourceFailed, err)
	case err != nil:
		p.abort(destinationFailed, err)
	case p.finish():
		// The other direction waits in awaitReset.
	default:
		if err := source.awaitReset(); err != nil {
			p.abort(sourceFailed, err)
		}
	}
	return moved
}

// finish counts a direction's end, and reports whether it was the last one.
func (p *pair) finish() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.finished++
	if p.finished == 1 {
		return false
	}
	past := time.Unix(1, 0)
	_ = p.client.SetReadDeadline(past)
	_ = p.upstream.SetReadDeadline(past)
	return true
}

// drain leaves it: what its protocol is, nobody knows.
func (p *pair) drain() {}

// abort ends both connections at once; closing them will send resets. The first
// cause counts.
func (p *pair) abort(r reason.Reason, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cause != nil || p.finished == 2 {
		return
	}
	if errors.Is(err, mtls.ErrRefused) {
		r = reason.TLSRefused
	}
	p.cause = &reason.Error{Reason: r, Err: err}
	past := time.Unix(1, 0)
	for _, c := range []*conn{p.client, p.upstream} {
		_ = c.SetLinger(0)
		_ = c.SetDeadline(past)
	}
}
