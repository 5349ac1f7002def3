package telemetry

import (
	"context"
	"io"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weirmesh/weir/agent/journal"
	"github.com/weirmesh/weir/agent/launch"
)

const (
	// few is how many bytes of a proxy's records, some 80 of them, are read at a time if that
	// is not too often: whoever is served by this processor meanwhile is late.
	few = 32 << 10
	// rarely is how long records wait for each other while there are few of them, often while
	// there are many. To wake is what costs an agent the most, and those whom its runtime's
	// threads take turns with.
	rarely = 250 * time.Millisecond
	often  = 25 * time.Millisecond

	// openAfter keeps the agent from asking for a journal while the proxy's pod is being made.
	openAfter = 100 * time.Millisecond
	// openAgain is how long it waits the longest until it asks again for one that it did not get.
	openAgain = 5 * time.Second
)

// AccessLog writes one JSON object a line for each request that the proxies saw, and
// each connection without one. Make it with NewAccessLog, and Run it.
type AccessLog struct {
	out io.Writer
	log *slog.Logger

	hurry chan struct{}

	mu       sync.Mutex
	journals map[*launch.Instance]*followed
	order    []*followed // those of journals that are open, and those that were left and not read to the end
}

// followed is a proxy whose records are written.
type followed struct {
	pod    string          // "namespace/name"
	stop   func()          // of opening it
	reader *journal.Reader // nil: not yet
	left   atomic.Bool     // it ends when it is read
}

// NewAccessLog writes to out, whole lines at a time.
func NewAccessLog(out io.Writer, log *slog.Logger) *AccessLog {
	return &AccessLog{out: out, log: log, hurry: make(chan struct{}, 1), journals: map[*launch.Instance]*followed{}}
}

// Follow writes a proxy's records from now on.
func (l *AccessLog) Follow(i *launch.Instance) {
	ctx, cancel := context.WithCancel(context.Background())
	f := &followed{pod: i.Attachment.PodNamespace + "/" + i.Attachment.PodName, stop: cancel}
	l.mu.Lock()
	l.journals[i] = f
	l.mu.Unlock()
	go l.open(ctx, i.Journal, f)
}

// open has a proxy's journal, and tries again until it is left.
func (l *AccessLog) open(ctx context.Context, fetch func() (*os.File, error), f *followed) {
	for wait := openAfter; ; wait = min(2*wait, openAgain) {
		select {
		case <-ctx.Done(): // one last time: it may have ended as soon as it had begun
		case <-time.After(wait):
		}
		reader, err := openJournal(fetch)
		if err == nil {
			l.opened(f, reader)
			return
		}
		if ctx.Err() != nil {
			return
		}
		if wait == openAfter {
			l.log.Warn("a proxy's access log is not to be had; it is asked for again", "pod", f.pod, "error", err)
		}
	}
}

func openJournal(fetch func() (*os.File, error)) (*journal.Reader, error) {
	file, err := fetch()
	if err != nil {
		return nil, err
	}
	return journal.Open(file)
}

func (l *AccessLog) opened(f *followed, reader *journal.Reader) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f.reader = reader
	l.order = append(l.order, f)
	if f.left.Load() { // the round that Leave asked for may be over
		l.Hurry()
	}
}

// Leave writes what there still is of a proxy's records: it has ended.
func (l *AccessLog) Leave(i *launch.Instance) {
	l.mu.Lock()
	f := l.journals[i]
	delete(l.journals, i)
	if f != nil {
		f.left.Store(true)
		f.stop()
	}
	l.mu.Unlock()
	l.Hurry()
}

// Hurry has records written now.
func (l *AccessLog) Hurry() {
	select {
	case l.hurry <- struct{}{}:
	default:
	}
}

// Run writes records until ctx is done, and then once more. What does not come to be
// written is the next agent's.
func (l *AccessLog) Run(ctx context.Context) {
	// It looks for records by itself: to be woken by each proxy would cost all of them more than
	// to write and to read them.
	writer := &writer{out: l.out, buf: make([]byte, journal.MinBuffer)}
	wait := rarely
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-l.hurry:
		case <-timer.C:
		}
		wait = pause(wait, l.round(writer))
		timer.Reset(wait)
	}
	l.round(writer)
}

// pause is how long to wait after a round that has found so many bytes, the most of one
// journal, and the round before which there was this pause.
func pause(before time.Duration, found uint64) time.Duration {
	return min(max(before*few/time.Duration(max(found, few/2)), often), rarely)
}

// round reads all journals, and returns how many bytes the one had that had the most.
func (l *AccessLog) round(w *writer) uint64 {
	l.mu.Lock()
	order := l.order
	l.mu.Unlock()
	most := uint64(0)
	var ended []*followed
	for _, f := range order {
		last := f.left.Load() // before it is looked at
		most = max(most, f.reader.Waiting())
		err := w.write(f)
		if err != nil {
			l.log.Error("a proxy's access log cannot be read, and is not written any more", "pod", f.pod, "error", err)
		}
		if last || err != nil {
			ended = append(ended, f)
		}
	}
	for _, f := range ended {
		l.end(f)
	}
	return most
}

// end lets go of a journal.
func (l *AccessLog) end(f *followed) {
	l.mu.Lock()
	defer l.mu.Unlock()
	// A copy: round has the one before.
	l.order = slices.DeleteFunc(slices.Clone(l.order), func(other *followed) bool { return other == f })
	f.reader.Close()
}

// writer writes lines.
type writer struct {
	out   io.Writer
	buf   []byte
	lines []byte
}

// write writes what waits in a journal, and no more than fits in one: others wait.
func (w *writer) write(f *followed) error {
	for left := f.reader.Waiting(); left > 0; {
		n, err := f.reader.Read(w.buf, func(r *journal.Record) { w.lines = appendLine(w.lines, f.pod, r) })
		if len(w.lines) > 0 {
			_, _ = w.out.Write(w.lines)
		}
		w.lines = w.lines[:0]
		if err != nil {
			return err
		}
		if n == 0 {
			break
		}
		left -= min(n, left)
	}
	return nil
}
