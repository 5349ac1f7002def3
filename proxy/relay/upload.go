package relay

import (
	"time"

	"github.com/weirmesh/weir/proxy/http1"
	"github.com/weirmesh/weir/proxy/reason"
)

// upload passes on a request's body while its answer is awaited. Until it is done
// it has the client's buffer.
type upload struct {
	done     chan struct{}
	complete bool          // all of it was passed on
	cause    *reason.Error // the client's failure; nil: the upstream wanted no more
	moved    uint64
}

// startUpload has the rest of body, which follows in client, sent to up.
func startUpload(client *conn, up *httpUpstream, body http1.Body) *upload {
	u := &upload{done: make(chan struct{})}
	go u.run(client, up, body)
	return u
}

func (u *upload) run(client *conn, up *httpUpstream, body http1.Body) {
	u.move(client, up, body)
	close(u.done)
	if u.cause != nil {
		// Whoever waits for the answer looks up, and breaks the connection off: the
		// upstream must not take what it got for all.
		_ = up.SetLinger(0)
		_ = up.SetReadDeadline(time.Unix(1, 0))
	}
}

func (u *upload) move(client *conn, up *httpUpstream, body http1.Body) {
	for !body.Done() {
		if err := client.fill(); err != nil {
			u.cause = &reason.Error{Reason: reason.ClientGone, Err: err}
			return
		}
		n, err := body.Next(client.bytes())
		if err != nil {
			u.cause = &reason.Error{Reason: reason.BadRequest, Err: err}
			return
		}
		if _, err := up.Write(client.bytes()[:n]); err != nil {
			return // who hung up may have answered: the answer counts
		}
		u.moved += uint64(n)
		client.skip(n)
	}
	u.complete = true
}

// failure is why the body could not be read to its end, if that is so by now.
func (u *upload) failure() error {
	if u == nil {
		return nil
	}
	select {
	case <-u.done:
		if u.cause != nil {
			return u.cause
		}
	default:
	}
	return nil
}

// wait waits until all is passed on, and reports whether it is.
func (u *upload) wait(limit time.Duration) bool {
	select {
	case <-u.done:
		return true
	default:
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-u.done:
		return true
	case <-timer.C:
		return false
	}
}
