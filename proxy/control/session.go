package control

import (
	"context"
	"errors"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/identity"
	"github.com/weirmesh/weir/proxy/telemetry"
)

// service is proxypb.Control. Of its sessions the newest counts.
type service struct {
	proxypb.UnimplementedControlServer
	store    *Store
	identity *identity.Holder
	records  *telemetry.Ring
	meter    *telemetry.Meter
	version  string
	draining <-chan struct{} // closed when the proxy takes no new connections
	done     <-chan struct{} // closed when the server ends

	mu    sync.Mutex
	newer chan struct{} // closed when another session begins
}

// stream is a session's.
type stream = grpc.BidiStreamingServer[proxypb.ToProxy, proxypb.FromProxy]

// session is one life with one agent.
type session struct {
	*service
	stream stream
	number uint64
	newer  <-chan struct{}

	// What report uses again and again, while there is something to report. gRPC has
	// encoded a message when Send returns.
	batch []telemetry.Record
	wire  proxypb.AccessLogWriter
	pause time.Duration // after the last message
}

// Session serves an agent until the stream breaks or another session begins.
func (s *service) Session(stream stream) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	messages, broken := make(chan *proxypb.ToProxy), make(chan error, 1)
	go receive(ctx, stream, messages, broken)

	current, first := s.begin(stream)
	// What this session was woken for and did not do is the next one's.
	defer s.store.wake()
	defer s.records.Wake()
	defer s.identity.Wake()
	s.records.Wake()
	if err := current.subscribe(first); err != nil {
		return err
	}
	if err := current.measure(s.meter.Resume()); err != nil {
		return err
	}
	pause, due := newTimer(), newTimer() // for records, for metrics
	defer pause.Stop()
	defer due.Stop()
	ready, measured, draining := s.records.Ready(), s.meter.Ready(), s.draining
	for {
		// One goroutine applies, answers and asks, so an Ack is always ahead of
		// anything that was asked after its update.
		var err error
		select {
		case <-current.newer:
			return status.Error(codes.Aborted, errSuperseded.Error())
		case <-s.done:
			_, err := current.report(telemetry.Limit / telemetry.Batch)
			return errors.Join(err, current.measure(s.meter.Last()))
		case <-draining:
			draining = nil
			err = stream.Send(&proxypb.FromProxy{Message: &proxypb.FromProxy_Draining{Draining: &proxypb.Draining{}}})
		case err = <-broken:
			return err
		case msg := <-messages:
			err = current.answer(msg)
		case <-s.store.dirty:
			err = current.ask()
		case <-s.identity.Woken():
			err = current.identify()
		case <-ready:
			ready, err = current.gather(pause)
		case <-s.records.Filling():
			ready, err = current.gather(pause)
		case <-pause.C:
			ready, err = current.gather(pause)
		case <-measured:
			measured = nil
			due.Reset(measureEvery)
		case <-due.C:
			measured, err = s.meter.Ready(), current.measure(s.meter.Take())
		}
		if err != nil {
			return err
		}
	}
}

// begin makes a session the newest.
func (s *service) begin(stream stream) (*session, *proxypb.Subscribe) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.newer != nil {
		close(s.newer)
	}
	s.newer = make(chan struct{})
	number, first := s.store.begin()
	first.ProxyVersion = s.version
	s.identity.Resume(number)
	return &session{service: s, stream: stream, number: number, newer: s.newer, pause: gatherFor}, first
}

// receive hands on what the agent says until the stream breaks. It ends with its
// session: that cancels the stream.
func receive(ctx context.Context, stream stream, messages chan<- *proxypb.ToProxy, broken chan<- error) {
	for {
		msg, err := stream.Recv()
		if err != nil {
			broken <- err
			return
		}
		select {
		case messages <- msg:
		case <-ctx.Done():
			return
		}
	}
}

// answer applies an update and says whether it was taken.
func (s *session) answer(msg *proxypb.ToProxy) error {
	if ack := msg.GetMetricsAck(); ack != nil {
		s.meter.Acknowledged(ack.GetNumber())
		return nil
	}
	if c := msg.GetCertificate(); c != nil {
		s.identity.Answered(c)
		s.store.tell() // roots came with it
		return nil
	}
	u := msg.GetUpdate()
	if u == nil {
		return nil // something of an agent newer than this proxy
	}
	if err := s.store.apply(s.number, u); err != nil {
		return s.stream.Send(&proxypb.FromProxy{Message: &proxypb.FromProxy_Nack{
			Nack: &proxypb.Nack{Nonce: u.GetNonce(), Error: err.Error()},
		}})
	}
	s.meter.Refresh()
	return s.stream.Send(&proxypb.FromProxy{Message: &proxypb.FromProxy_Ack{
		Ack: &proxypb.Ack{Nonce: u.GetNonce()},
	}})
}

// ask subscribes to what is new and unsubscribes from what is held no more.
func (s *session) ask() error {
	sub, unsub := s.store.changes(s.number)
	if sub != nil {
		if err := s.subscribe(sub); err != nil {
			return err
		}
	}
	if unsub != nil {
		return s.stream.Send(&proxypb.FromProxy{Message: &proxypb.FromProxy_Unsubscribe{Unsubscribe: unsub}})
	}
	return nil
}

// identify says what there is to say of the pod's certificate.
func (s *session) identify() error {
	for msg := s.identity.Next(s.number); msg != nil; msg = s.identity.Next(s.number) {
		if err := s.stream.Send(msg); err != nil {
			return err
		}
	}
	return nil
}

func (s *session) subscribe(m *proxypb.Subscribe) error {
	return s.stream.Send(&proxypb.FromProxy{Message: &proxypb.FromProxy_Subscribe{Subscribe: m}})
}

const (
	// gatherFor is how long records wait for each other, after those that were sent
	// last, unless the ring fills up. Each message costs more than it seems: the Go runtime's
	// monitor wakes with the system call, and looks around every 20 µs for a millisecond;
	// and whichever request comes by here or where the agent writes its log is late.
	gatherFor = 500 * time.Millisecond
	// measureEvery is how long counts wait for each other.
	measureEvery = 5 * time.Second
)

// newTimer returns one that is not running.
func newTimer() *time.Timer {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return t
}

// gather sends a message of the records that are there. The rest, and those that come
// while pause runs, go when it is over; it returns what else to wait for, nil meanwhile.
func (s *session) gather(pause *time.Timer) (<-chan struct{}, error) {
	sent, err := s.report(1)
	if !sent {
		return s.records.Ready(), err
	}
	s.pause = pauseAfter(s.pause, s.records.Len())
	pause.Reset(s.pause)
	return nil, err
}

// pauseAfter is between messages: before is the one before this message, which has left
// so many records. What was gathered goes in as much time as it took to gather: all at
// once would keep requests waiting, here and where the agent writes its log.
func pauseAfter(before time.Duration, left int) time.Duration {
	if left == 0 {
		return gatherFor
	}
	return min(before, gatherFor/time.Duration(left/telemetry.Batch+1))
}

// report sends access log records in so many messages at most, and reports whether
// there were any.
func (s *session) report(messages int) (bool, error) {
	sent := false
	for range messages {
		records := s.records.Take(s.batch)
		if records == nil {
			break
		}
		s.batch = records
		if err := s.stream.Send(&proxypb.FromProxy{Message: &proxypb.FromProxy_AccessLogs{AccessLogs: s.records.Message(records, &s.wire)}}); err != nil {
			s.records.Return(records)
			return sent, err
		}
		sent = true
	}
	if !sent {
		s.batch, s.wire = nil, proxypb.AccessLogWriter{}
	}
	return sent, nil
}

// measure sends metrics, if there are any.
func (s *session) measure(m *proxypb.Metrics) error {
	if m == nil {
		return nil
	}
	return s.stream.Send(&proxypb.FromProxy{Message: &proxypb.FromProxy_Metrics{Metrics: m}})
}
