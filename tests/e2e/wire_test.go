package e2e

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/tests/cluster"
)

// wordPrefix is what each word begins with that is looked for on the wire.
const wordPrefix = "e2e-word-"

// newWord is one that nobody has said yet.
func newWord() string { return wordPrefix + rand.Text() }

// wire is what goes from a node to others and back, as far as it is words.
type wire struct {
	socket *os.File
	done   chan error

	mu    sync.Mutex
	words map[string]bool
}

// watchWire looks at all frames of a node until the test ends, and fails it if one was
// not looked at.
func watchWire(t *testing.T, node *cluster.Node) *wire {
	t.Helper()
	socket, err := node.Packets("eth0")
	must(t, err)
	w := &wire{socket: socket, done: make(chan error, 1), words: map[string]bool{}}
	go func() { w.done <- w.read() }()
	t.Cleanup(func() {
		dropped, err := w.dropped()
		if err != nil || dropped > 0 {
			t.Errorf("%d frames were not looked at, %v", dropped, err)
		}
		socket.Close()
		if err := <-w.done; !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
	return w
}

func (w *wire) read() error {
	frame := make([]byte, 1<<17)
	for {
		n, err := w.socket.Read(frame)
		if err != nil {
			return err
		}
		w.look(frame[:n])
	}
}

// look finds the words in a frame.
func (w *wire) look(frame []byte) {
	length := len(newWord())
	for {
		at := bytes.Index(frame, []byte(wordPrefix))
		if at < 0 {
			return
		}
		frame = frame[at:]
		w.mu.Lock()
		w.words[string(frame[:min(length, len(frame))])] = true
		w.mu.Unlock()
		frame = frame[len(wordPrefix):]
	}
}

// saw reports whether a word went by.
func (w *wire) saw(word string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.words[word]
}

// waitWord waits until a word has gone by. What went before it has been looked at then.
func (w *wire) waitWord(t *testing.T, word string) {
	t.Helper()
	eventually(t, soon, "the word "+word+" on the wire", func() error {
		if !w.saw(word) {
			return errors.New("it has not gone by")
		}
		return nil
	})
}

// dropped is how many frames came too fast.
func (w *wire) dropped() (uint32, error) {
	raw, err := w.socket.SyscallConn()
	if err != nil {
		return 0, err
	}
	var dropped uint32
	var statErr error
	err = raw.Control(func(fd uintptr) {
		stats, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS)
		if err != nil {
			statErr = fmt.Errorf("packet statistics: %w", err)
			return
		}
		dropped = stats.Drops
	})
	return dropped, errors.Join(err, statErr)
}
