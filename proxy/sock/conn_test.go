package sock

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"testing/iotest"
	"time"

	"github.com/weirmesh/weir/proxy/sock/socktest"
)

// pair is both ends of a connection; the second is a Conn.
func pair(t *testing.T) (net.Conn, *Conn) {
	t.Helper()
	one, accepted := socktest.Connected(t, "unix", filepath.Join(t.TempDir(), "s"))
	other, err := NewConn(accepted.(*net.UnixConn))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { other.Close() })
	return one, other
}

func TestConnReadsToTheEnd(t *testing.T) {
	peer, c := pair(t)
	want := bytes.Repeat([]byte("0123456789"), 100_000)
	go func() {
		_, _ = peer.Write(want)
		peer.Close()
	}()
	got, err := io.ReadAll(iotest.OneByteReader(io.LimitReader(c, 3)))
	if err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(append(got, rest...), want) {
		t.Errorf("%d bytes and %v, not all %d", len(got)+len(rest), err, len(want))
	}
}

func TestConnWritesAllThoughThereIsNoRoomAtFirst(t *testing.T) {
	peer, c := pair(t)
	want := bytes.Repeat([]byte("0123456789"), 1_000_000)
	wrote := make(chan error, 1)
	go func() {
		n, err := c.Write(want)
		if n != len(want) {
			err = errors.Join(err, io.ErrShortWrite)
		}
		wrote <- errors.Join(err, c.Close())
	}()
	got, err := io.ReadAll(peer)
	if err := errors.Join(err, <-wrote); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes and %v, not all %d", len(got), err, len(want))
	}
}

func TestConnKeepsToDeadlines(t *testing.T) {
	_, c := pair(t)
	if err := c.SetDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("reading: %v", err)
	}
	if _, err := c.Write(make([]byte, 10<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("writing: %v", err)
	}
}

func TestWritingToWhoIsGoneFails(t *testing.T) {
	peer, c := pair(t)
	peer.Close()
	if _, err := c.Write([]byte("x")); err == nil {
		t.Error("it was written")
	}
}
