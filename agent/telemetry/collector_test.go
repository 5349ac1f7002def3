package telemetry

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/agent/journal"
	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/proxypb"
)

// proxy is one with a journal, for those who ask for it.
type proxy struct {
	*journal.Writer
	instance *launch.Instance
	refuse   atomic.Int32 // so many to come are not given it
	asked    atomic.Int32
	end      func()
}

func newProxy(t *testing.T, pod string) *proxy {
	t.Helper()
	w, err := journal.Create()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "p.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{Writer: w, instance: launch.NewInstance(launch.Attachment{PodNamespace: "shop", PodName: pod}, path)}
	var serving sync.WaitGroup
	serving.Go(func() { p.serve(l) })
	p.end = sync.OnceFunc(func() {
		l.Close()
		serving.Wait()
		w.Close()
	})
	t.Cleanup(p.end)
	return p
}

func (p *proxy) serve(l *net.UnixListener) {
	reply, err := proto.Marshal(&proxypb.LaunchReply{Stage: proxypb.LaunchReply_JOURNAL})
	if err != nil {
		panic(err)
	}
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			return
		}
		ask := make([]byte, 1)
		_, _ = conn.Read(ask)
		p.asked.Add(1)
		if ask[0] == 'J' && p.refuse.Add(-1) < 0 {
			_, _, _ = conn.WriteMsgUnix(reply, unix.UnixRights(p.File()), nil)
		}
		conn.Close()
	}
}

// put has a record of this number.
func (p *proxy) put(n int) { p.Put(&journal.Record{SentBytes: uint64(n)}) }

// output is what was written.
type output struct {
	t   *testing.T
	mu  sync.Mutex
	b   bytes.Buffer
	log bytes.Buffer // the agent's own; to be read when it has stopped
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !bytes.HasSuffix(b, []byte("\n")) {
		o.t.Errorf("half a line was written: %q", b)
	}
	return o.b.Write(b)
}

// lines are pod and number of what was written, in its order.
func (o *output) lines() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	var out []string
	for line := range strings.Lines(o.b.String()) {
		var r Record
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			o.t.Fatal(err)
		}
		out = append(out, r.Pod+" "+strconv.FormatUint(r.Sent, 10))
	}
	return out
}

// wait waits for so many lines.
func (o *output) wait(n int) []string {
	o.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		o.mu.Lock()
		got := bytes.Count(o.b.Bytes(), []byte("\n"))
		o.mu.Unlock()
		if got >= n {
			return o.lines()
		}
		if time.Now().After(deadline) {
			o.t.Fatalf("%d lines, want %d", got, n)
		}
	}
}

// running is an access log that is written until the test ends, or the function is called.
func running(t *testing.T) (*AccessLog, *output, func()) {
	out := &output{t: t}
	l := NewAccessLog(out, slog.New(slog.NewTextHandler(&out.log, nil)))
	ctx, cancel := context.WithCancel(t.Context())
	var done sync.WaitGroup
	done.Go(func() { l.Run(ctx) })
	stop := func() {
		cancel()
		done.Wait()
	}
	t.Cleanup(stop)
	return l, out, stop
}

func TestTheRecordsOfAllProxiesAreWritten(t *testing.T) {
	l, out, _ := running(t)
	const each = 20_000
	var writing sync.WaitGroup
	for _, pod := range []string{"a", "b", "c"} {
		p := newProxy(t, pod)
		p.put(0) // before it is known
		l.Follow(p.instance)
		writing.Go(func() {
			for n := 1; n < each; n++ {
				p.put(n)
				for n%5000 == 0 && p.Unread() { // or the oldest would give way
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	writing.Wait()
	next := map[string]int{}
	for _, line := range out.wait(3 * each) {
		pod, number, _ := strings.Cut(line, " ")
		if n, _ := strconv.Atoi(number); n != next[pod] {
			t.Fatalf("%s where %d was due", line, next[pod])
		}
		next[pod]++
	}
}

// TestAProxyThatHasEndedIsReadToItsEnd, and let go: also one that has hardly lived.
func TestAProxyThatHasEndedIsReadToItsEnd(t *testing.T) {
	before := descriptors(t)
	l, out, _ := running(t)
	long, short := newProxy(t, "long"), newProxy(t, "short")
	l.Follow(long.instance)
	long.put(1)
	out.wait(1)
	const more = 1000
	for n := range more {
		long.put(2 + n)
	}
	long.end() // it was killed, say
	l.Leave(long.instance)
	out.wait(1 + more)
	short.put(1)
	l.Follow(short.instance)
	l.Leave(short.instance)
	if got := out.wait(2 + more); got[1+more] != "shop/short 1" {
		t.Errorf("the last is %q", got[1+more])
	}
	short.end()
	for deadline := time.Now().Add(10 * time.Second); descriptors(t) > before; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d descriptors, %d before", descriptors(t), before)
		}
	}
}

// TestAJournalThatComesAfterItsProxyWasLeftIsReadAtOnce: else what the proxy held is held
// until records are looked for the next time.
func TestAJournalThatComesAfterItsProxyWasLeftIsReadAtOnce(t *testing.T) {
	l := NewAccessLog(&output{t: t}, slog.New(slog.DiscardHandler))
	reader, err := openJournal(newProxy(t, "a").instance.Journal)
	if err != nil {
		t.Fatal(err)
	}
	f := &followed{}
	f.left.Store(true)
	l.opened(f, reader)
	defer l.end(f)
	select {
	case <-l.hurry:
	default:
		t.Error("nobody is told that there is something to read")
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestAJournalThatIsNotToBeHadIsAskedForAgain(t *testing.T) {
	l, out, _ := running(t)
	p := newProxy(t, "a")
	p.refuse.Store(2)
	p.put(1)
	l.Follow(p.instance)
	out.wait(1)
	if got := p.asked.Load(); got != 3 {
		t.Errorf("it was asked %d times", got)
	}
}

// TestTheNextAgentWritesWhatTheLastOneDidNot, and nothing twice.
func TestTheNextAgentWritesWhatTheLastOneDidNot(t *testing.T) {
	p := newProxy(t, "a")
	for n := range 3 {
		l, out, stop := running(t)
		p.put(10 * n)
		l.Follow(p.instance)
		out.wait(1)
		p.put(10*n + 1) // it is written at the end, if not before
		stop()
		if got, want := strings.Join(out.lines(), ","), "shop/a "+strconv.Itoa(10*n)+",shop/a "+strconv.Itoa(10*n+1); got != want {
			t.Errorf("agent %d has %q, want %q", n, got, want)
		}
		l.Leave(p.instance)
	}
}

// TestADamagedJournalHarmsNoOther: it is left alone, and that is said once.
func TestADamagedJournalHarmsNoOther(t *testing.T) {
	l, out, stop := running(t)
	bad, good := newProxy(t, "bad"), newProxy(t, "good")
	for _, p := range []*proxy{bad, good} {
		l.Follow(p.instance)
		p.put(1)
	}
	out.wait(2)
	bad.put(2)
	if _, err := unix.Pwrite(bad.File(), bytes.Repeat([]byte{0xff}, 64<<10), 4096); err != nil {
		t.Fatal(err)
	}
	for n := range 3 {
		good.put(2 + n)
		out.wait(3 + n)
	}
	for _, line := range out.lines() {
		if line != "shop/bad 1" && line != "shop/bad 2" && !strings.HasPrefix(line, "shop/good ") {
			t.Errorf("a line of what nobody wrote: %q", line)
		}
	}
	stop()
	if said := out.log.String(); strings.Count(said, "cannot be read") != 1 || !strings.Contains(said, "pod=shop/bad") {
		t.Errorf("the agent says %q", said)
	}
}

// TestThePauseFollowsTheLoad: from rarely, while there is nothing, to few records each time.
func TestThePauseFollowsTheLoad(t *testing.T) {
	for _, c := range []struct {
		before time.Duration
		found  uint64
		want   time.Duration
	}{
		{rarely, 0, rarely},
		{rarely, 2 * few, rarely / 2},
		{rarely, journal.Capacity, often},
		{often, journal.Capacity, often},
		{often, 0, 2 * often},
		{2 * often, few, 2 * often},
		{2 * often, few * 2 / 3, 3 * often},
	} {
		if got := pause(c.before, c.found); got.Round(time.Millisecond) != c.want {
			t.Errorf("after %s and %d bytes: %s, want %s", c.before, c.found, got, c.want)
		}
	}
}
