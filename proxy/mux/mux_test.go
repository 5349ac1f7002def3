package mux

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long what must happen may take.
const patience = 10 * time.Second

// end is one end of a connection with room for so many bytes under way, read by a
// goroutine as by a poller.
type end struct {
	*Session
	turn  Turn
	other *end
	room  int

	mu      sync.Mutex
	changed *sync.Cond
	in      []byte
	closed  bool
	writes  int
	come    chan struct{}
}

func (e *end) ReadNow(p []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := copy(p, e.in)
	e.in = e.in[n:]
	e.changed.Broadcast()
	switch {
	case n > 0:
		return n, nil
	case e.closed:
		return 0, nil
	}
	return 0, unix.EAGAIN
}

func (e *end) WriteNow(p []byte) (int, error) {
	o := e.other
	o.mu.Lock()
	defer o.mu.Unlock()
	n := min(len(p), o.room-len(o.in))
	switch {
	case o.closed:
		return 0, unix.EPIPE
	case n <= 0:
		return 0, unix.EAGAIN
	}
	o.in = append(o.in, p[:n]...)
	o.writes++
	o.stir()
	return n, nil
}

func (e *end) Unsent() bool { return false }

func (e *end) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		n, err := e.WriteNow(p[done:])
		if done += n; err == nil {
			continue
		}
		if !errors.Is(err, unix.EAGAIN) {
			return done, err
		}
		o := e.other
		o.mu.Lock()
		for len(o.in) >= o.room && !o.closed {
			o.changed.Wait()
		}
		o.mu.Unlock()
	}
	return done, nil
}

func (e *end) stir() {
	select {
	case e.come <- struct{}{}:
	default:
	}
}

func (e *end) run() {
	for {
		select {
		case <-e.come:
			e.mu.Lock()
			ended := e.closed
			e.mu.Unlock()
			e.Ready(ended)
			e.turn.Flush()
		case <-e.Done():
			return
		}
	}
}

// hangUp is when the connection ends.
func (e *end) hangUp() {
	for _, e := range []*end{e, e.other} {
		e.mu.Lock()
		e.closed = true
		e.changed.Broadcast()
		e.mu.Unlock()
		e.stir()
	}
}

// connect makes a client and a server, whose streams it gives to serve.
func connect(t testing.TB, room int, serve func(*Stream)) (*end, *end) {
	t.Helper()
	client, server := &end{room: room, come: make(chan struct{}, 1)}, &end{room: room, come: make(chan struct{}, 1)}
	client.other, server.other = server, client
	client.changed, server.changed = sync.NewCond(&client.mu), sync.NewCond(&server.mu)
	var running sync.WaitGroup
	client.Session = New(client, &client.turn, nil)
	server.Session = New(server, &server.turn, func(st *Stream) { running.Go(func() { serve(st) }) })
	running.Go(client.run)
	running.Go(server.run)
	t.Cleanup(func() {
		client.hangUp()
		<-client.Done()
		<-server.Done()
		running.Wait()
	})
	return client, server
}

func open(t testing.TB, e *end) *Stream {
	t.Helper()
	st, err := e.Open()
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// read reads what is there, or waits for it.
func (st *Stream) read(p []byte) (int, error) {
	var n int
	var failed error
	err := st.Read(func(uintptr) bool {
		n, failed = st.ReadNow(p)
		return !errors.Is(failed, unix.EAGAIN)
	})
	return n, errors.Join(err, failed)
}

// readAll reads to the end.
func (st *Stream) readAll() ([]byte, error) {
	var all []byte
	p := make([]byte, 10_000)
	for {
		n, err := st.read(p)
		if all = append(all, p[:n]...); n == 0 || err != nil {
			return all, err
		}
	}
}

// write writes all, and waits for room.
func (st *Stream) write(p []byte) error {
	var failed error
	err := st.Write(func(uintptr) bool {
		for len(p) > 0 {
			n, err := st.WriteNow(p)
			if errors.Is(err, unix.EAGAIN) {
				return false
			}
			if p = p[n:]; err != nil {
				failed = err
				return true
			}
		}
		return true
	})
	return errors.Join(err, failed)
}

// echo sends back what comes.
func echo(st *Stream) {
	defer st.Close()
	p := make([]byte, 3000)
	for {
		n, err := st.read(p)
		if n == 0 || err != nil || st.write(p[:n]) != nil {
			break
		}
	}
	_ = st.CloseWrite()
	_, _ = st.readAll()
}

// linger reads nothing, and stays until the other end has gone.
func linger(st *Stream) {
	_ = st.Read(func(uintptr) bool { return st.Broken() != nil })
	st.Close()
}

func TestBytesArriveAsTheyWereSent(t *testing.T) {
	for _, room := range []int{100, 10_000, 1 << 20} {
		client, _ := connect(t, room, echo)
		var running sync.WaitGroup
		for i := range 20 {
			st := open(t, client)
			size := []int{0, 1, maxData - 1, maxData, maxData + 1, Window, Window + 1, 300_000}[i%8]
			if room == 100 {
				size /= 10
			}
			want := make([]byte, size)
			for j := range want {
				want[j] = byte(rand.Uint32())
			}
			running.Go(func() {
				if err := errors.Join(st.write(want), st.CloseWrite()); err != nil {
					t.Error(err)
				}
			})
			running.Go(func() {
				defer st.Close()
				if got, err := st.readAll(); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%d bytes, %v, of %d, with room for %d", len(got), err, len(want), room)
				}
			})
		}
		running.Wait()
	}
}

func TestWhatIsGatheredGoesInOnePiece(t *testing.T) {
	client, server := connect(t, 1<<20, echo)
	var streams []*Stream
	for range 20 {
		st := open(t, client)
		if _, err := st.WriteNow([]byte("a request")); err != nil {
			t.Fatal(err)
		}
		streams = append(streams, st)
	}
	client.turn.Flush()
	server.mu.Lock()
	if server.writes != 1 {
		t.Errorf("%d pieces", server.writes)
	}
	server.mu.Unlock()
	for _, st := range streams {
		if n, err := st.read(make([]byte, 100)); n != 9 || err != nil {
			t.Errorf("%d bytes, %v", n, err)
		}
		st.Close()
	}
}

func TestAStreamThatNobodyReadsHoldsUpNoOther(t *testing.T) {
	client, _ := connect(t, 1<<20, func(st *Stream) {
		var p [1]byte
		if n, _ := st.read(p[:]); n == 1 && p[0] == 'e' {
			echo(st)
			return
		}
		linger(st)
	})
	stuck, other := open(t, client), open(t, client)
	_ = stuck.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
	if err := stuck.write(make([]byte, 2*Window)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("writing more than there is room for: %v", err)
	}
	if _, err := stuck.WriteNow([]byte("x")); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("there is room: %v", err)
	}
	if err := other.write([]byte("e12345")); err != nil {
		t.Error(err)
	}
	if n, err := other.read(make([]byte, 10)); n != 5 || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
	other.Close()
	stuck.Close()
}

// TestWhoReadsAtOnceHasMoreUnderWay, and no more than is good for all.
func TestWhoReadsAtOnceHasMoreUnderWay(t *testing.T) {
	got := make(chan int, 2)
	grownOf := func(s *Session) int {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.grown
	}
	client, server := connect(t, 1<<20, func(st *Stream) {
		all, _ := st.readAll()
		got <- len(all)
		got <- grownOf(st.session)
		st.Close()
	})
	st := open(t, client)
	if err := errors.Join(st.write(make([]byte, 4<<20)), st.CloseWrite()); err != nil {
		t.Fatal(err)
	}
	n, grown := <-got, <-got
	if n != 4<<20 || grown == 0 || grown > maxGrown {
		t.Errorf("%d bytes, windows grown by %d", n, grown)
	}
	st.Close()
	for deadline := time.Now().Add(patience); grown != 0 && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		grown = grownOf(server.Session)
	}
	if grown != 0 {
		t.Errorf("%d bytes are not given back", grown)
	}
}

func TestHowAStreamEnds(t *testing.T) {
	for _, c := range []struct {
		name   string
		end    func(*end, *Stream)
		read   error // by the other end, behind the bytes
		broken bool
	}{
		{"it sends no more", func(_ *end, st *Stream) { _ = st.CloseWrite() }, nil, false},
		{"it is closed", func(_ *end, st *Stream) { st.Close() }, nil, true},
		{"it is broken off", func(_ *end, st *Stream) { _ = errors.Join(st.SetLinger(0), st.Close()) }, unix.ECONNRESET, true},
		{"the connection ends", func(e *end, _ *Stream) { e.hangUp() }, unix.ECONNRESET, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			served := make(chan *Stream, 1)
			client, _ := connect(t, 1<<20, func(st *Stream) { served <- st })
			near := open(t, client)
			if err := near.write([]byte("hello")); err != nil {
				t.Fatal(err)
			}
			far := <-served
			p := make([]byte, 10)
			if n, err := far.read(p); n != 5 || err != nil {
				t.Fatalf("%d bytes, %v", n, err)
			}
			c.end(client, near)
			_ = far.SetReadDeadline(time.Now().Add(patience))
			if n, err := far.read(p); n != 0 || !errors.Is(err, c.read) || (err == nil) != (c.read == nil) {
				t.Errorf("read %d, %v, want %v", n, err, c.read)
			}
			if err := far.Broken(); (err != nil) != c.broken {
				t.Errorf("broken: %v", err)
			}
			if _, err := far.WriteNow(p); (err != nil) != c.broken {
				t.Errorf("written: %v", err)
			}
			far.Close()
			if !c.broken {
				if n, err := near.readAll(); len(n) != 10 || err != nil {
					t.Errorf("%d bytes come back, %v", len(n), err)
				}
			}
			near.Close()
			if _, err := near.ReadNow(p); !errors.Is(err, os.ErrClosed) {
				t.Errorf("read once closed: %v", err)
			}
			if err := near.Read(func(uintptr) bool { return false }); !errors.Is(err, os.ErrClosed) {
				t.Errorf("waited once closed: %v", err)
			}
		})
	}
}

func TestWaitingHasDeadlines(t *testing.T) {
	client, _ := connect(t, 1<<20, echo)
	st := open(t, client)
	defer st.Close()
	never := func(uintptr) bool { return false }
	_ = st.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if err := st.Read(never); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	_ = st.SetReadDeadline(time.Now().Add(time.Hour))
	time.AfterFunc(20*time.Millisecond, func() { _ = st.SetReadDeadline(time.Unix(1, 0)) })
	if err := st.Read(never); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("one that is made to have passed: %v", err)
	}
	_ = st.SetDeadline(time.Time{})
	if err := st.write([]byte("on it goes")); err != nil {
		t.Error(err)
	}
	if n, err := st.read(make([]byte, 20)); n != 10 || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
}

func TestWhoLeavesTakesNoMoreStreams(t *testing.T) {
	for _, which := range []string{"client", "server"} {
		client, server := connect(t, 1<<20, echo)
		st := open(t, client)
		if err := st.write([]byte("1")); err != nil {
			t.Fatal(err)
		}
		if n, err := st.read(make([]byte, 9)); n != 1 || err != nil {
			t.Fatalf("%d bytes, %v", n, err)
		}
		map[string]*end{"client": client, "server": server}[which].Leave()
		for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			another, err := client.Open()
			if errors.Is(err, ErrLeft) {
				break
			}
			another.Close() // the news is under way
		}
		if _, err := client.Open(); !errors.Is(err, ErrLeft) {
			t.Errorf("the %s left: %v", which, err)
		}
		if err := st.write([]byte("12")); err != nil {
			t.Errorf("what there is goes on: %v", err)
		}
		if n, err := st.read(make([]byte, 9)); n != 2 || err != nil {
			t.Errorf("what there is goes on: %d bytes, %v", n, err)
		}
		st.Close()
		for _, e := range []*end{client, server} {
			select {
			case <-e.Done():
			case <-time.After(patience):
				t.Fatal("it does not end with its last stream")
			}
			if e == client {
				client.hangUp() // as its owner does
			}
			if err := e.Why(); !errors.Is(err, io.EOF) {
				t.Error(err)
			}
		}
	}
}

// heard is a Handler.
type heard struct {
	st   *Stream
	take int // so many bytes at a time
	mu   sync.Mutex
	got  []byte
	told chan bool
}

func (h *heard) Ready(ended bool) {
	p := make([]byte, h.take)
	h.mu.Lock()
	n, _ := h.st.ReadNow(p)
	h.got = append(h.got, p[:n]...)
	h.mu.Unlock()
	h.told <- ended
}

func TestWhoWatchesIsTold(t *testing.T) {
	served := make(chan *Stream, 1)
	client, _ := connect(t, 1<<20, func(st *Stream) { served <- st })
	near := open(t, client)
	defer near.Close()
	if err := near.write([]byte("before")); err != nil {
		t.Fatal(err)
	}
	far := <-served
	defer far.Close()
	if n, err := far.read(make([]byte, 6)); n != 6 || err != nil {
		t.Fatalf("%d bytes, %v", n, err)
	}
	h := &heard{st: far, take: 4, told: make(chan bool, 10)}
	if far.Watch(h) {
		t.Error("there is something")
	}
	if err := near.write([]byte("while it is watched")); err != nil {
		t.Fatal(err)
	}
	if ended := <-h.told; ended || string(h.got) != "whil" {
		t.Errorf("%q, ended: %v", h.got, ended)
	}
	// What it did not read is there, behind it what comes when nobody watches.
	far.Watch(nil)
	if err := errors.Join(near.write([]byte(" and after")), near.CloseWrite()); err != nil {
		t.Fatal(err)
	}
	if rest, err := far.readAll(); string(rest) != "e it is watched and after" || err != nil {
		t.Errorf("%q, %v", rest, err)
	}
	if !far.Watch(h) {
		t.Error("the end is nothing")
	}
	near.Close()
	if ended := <-h.told; !ended {
		t.Error("it ended, and that is not told")
	}
}

// said is a frame's bytes.
func said(id uint32, k kind, payload string) []byte {
	b := binary.BigEndian.AppendUint32(nil, id)
	b = append(b, byte(k), byte(len(payload)>>16), byte(len(payload)>>8), byte(len(payload)))
	return append(b, payload...)
}

func TestWhatBreaksARuleEndsTheConnection(t *testing.T) {
	opened := said(1, kindOpen, "")
	var vain []byte
	for id := range uint32(maxVain + 1) {
		vain = append(append(vain, said(id+1, kindOpen, "")...), said(id+1, kindReset, "")...)
	}
	full := bytes.Repeat(said(1, kindData, string(make([]byte, maxData))), Window/maxData)
	for name, text := range map[string][]byte{
		"a kind that there is not":     said(1, 9, ""),
		"the same of a stream":         slices.Concat(opened, said(1, 9, "")),
		"a frame too long":             slices.Concat(opened, said(1, kindData, string(make([]byte, maxData+1)))),
		"a length of what has none":    said(1, kindOpen, "x"),
		"a credit too short":           slices.Concat(opened, said(1, kindCredit, "123")),
		"a credit too large":           slices.Concat(opened, said(1, kindCredit, "\x7f\xff\xff\xff")),
		"credits too large":            slices.Concat(opened, bytes.Repeat(said(1, kindCredit, "\x00\x10\x00\x00"), 3)),
		"a stream that was not opened": said(1, kindData, "x"),
		"no stream":                    said(0, kindData, "x"),
		"a stream again":               slices.Concat(opened, opened),
		"an earlier stream":            slices.Concat(said(2, kindOpen, ""), opened),
		"a stream of no number":        said(0, kindOpen, ""),
		"more than there is room for":  slices.Concat(opened, full, said(1, kindData, "x")),
		"bytes behind the end":         slices.Concat(opened, said(1, kindEnd, ""), said(1, kindData, "x")),
		"a stream by who has left":     slices.Concat(said(0, kindLeave, ""), opened),
		"streams for nothing":          vain,
		"a stream that leaves":         slices.Concat(opened, said(1, kindLeave, "")),
	} {
		t.Run(name, func(t *testing.T) {
			client, server := connect(t, 1<<20, linger)
			_, _ = client.Write(text)
			select {
			case <-server.Done():
			case <-time.After(patience):
				t.Fatal("it goes on")
			}
			if err := server.Why(); !errors.Is(err, errFrame) {
				t.Error(err)
			}
		})
	}
	t.Run("a stream of the server's", func(t *testing.T) {
		client, server := connect(t, 1<<20, echo)
		_, _ = server.Write(opened)
		<-client.Done()
		if err := client.Why(); !errors.Is(err, errFrame) {
			t.Error(err)
		}
	})
}

func TestThereIsABoundToStreams(t *testing.T) {
	client, server := connect(t, 1<<20, linger)
	var streams []*Stream
	for range MaxStreams {
		streams = append(streams, open(t, client))
	}
	if _, err := client.Open(); !errors.Is(err, ErrLeft) {
		t.Errorf("one more: %v", err)
	}
	client.turn.Flush()
	// Who does not keep to it is refused.
	client.Session.mu.Lock()
	client.last++
	one := client.add(client.last)
	client.frame(one.id, kindOpen, nil)
	client.Session.mu.Unlock()
	client.Flush()
	_ = one.SetReadDeadline(time.Now().Add(patience))
	if _, err := one.read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("one more: %v", err)
	}
	if n := server.Streams(); n != MaxStreams {
		t.Errorf("%d streams", n)
	}
	for _, st := range append(streams, one) {
		st.Close()
	}
}

// TestWhoReadsNothingIsNotToldMuch: of each stream that is refused an answer waits.
func TestWhoReadsNothingIsNotToldMuch(t *testing.T) {
	client, server := connect(t, 1<<20, linger)
	client.mu.Lock()
	client.room = 0
	client.mu.Unlock()
	var text []byte
	for id := range uint32(MaxStreams + 3*outCap/headSize) {
		text = append(text, said(id+1, kindOpen, "")...)
	}
	go func() { _, _ = client.Write(text) }()
	select {
	case <-server.Done():
	case <-time.After(patience):
		t.Fatal("it goes on")
	}
	if err := server.Why(); !errors.Is(err, errFrame) {
		t.Error(err)
	}
}

// FuzzFrames: whatever comes, an end goes on or ends, and keeps no more than it has given
// room for.
func FuzzFrames(f *testing.F) {
	f.Add(slices.Concat(said(1, kindOpen, ""), said(1, kindData, "GET / HTTP/1.1\r\n\r\n"), said(1, kindEnd, "")), true)
	f.Add(slices.Concat(said(1, kindOpen, ""), said(1, kindCredit, "\x00\x00\x10\x00"), said(1, kindReset, ""), said(0, kindLeave, "")), true)
	f.Add(said(1, kindData, "HTTP/1.1 200 OK\r\n\r\n"), false)
	f.Fuzz(func(t *testing.T, text []byte, server bool) {
		e := &end{in: text}
		e.changed = sync.NewCond(&e.mu)
		other := &end{room: 1 << 30, come: make(chan struct{}, 1)}
		other.changed = sync.NewCond(&other.mu)
		e.other = other
		var streams []*Stream
		if server {
			e.Session = New(e, &e.turn, func(st *Stream) { streams = append(streams, st) })
		} else {
			e.Session = New(e, &e.turn, nil)
			streams = append(streams, open(t, e))
		}
		e.Ready(false)
		e.turn.Flush()
		kept := 0
		for _, st := range streams {
			kept += st.behind.n
			for n := 1; n > 0; {
				n, _ = st.ReadNow(make([]byte, 1000))
			}
			st.Close()
		}
		if kept > len(text) || kept > len(streams)*Window {
			t.Fatalf("%d bytes of %d, in %d streams", kept, len(text), len(streams))
		}
		if why := e.Why(); why != nil && !errors.Is(why, errFrame) && !errors.Is(why, io.EOF) {
			t.Fatal(fmt.Errorf("why it ended: %w", why))
		}
		e.Close(io.EOF)
	})
}
