package place

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
)

func TestPace(t *testing.T) {
	var p pace
	now := time.Now()
	var pauses []time.Duration
	for range 20 {
		pause := p.next(now)
		pauses = append(pauses, pause)
		now = now.Add(pause + time.Millisecond)
	}
	for i, pause := range pauses {
		if i < freeWrites != (pause == 0) {
			t.Errorf("write %d waits %s", i, pause)
		}
	}
	if pauses[freeWrites] != firstPause || pauses[19] != maxPause {
		t.Errorf("pauses from %s to %s, want %s to %s", pauses[freeWrites], pauses[19], firstPause, maxPause)
	}
	if pause := p.next(now.Add(2 * contested)); pause != 0 {
		t.Errorf("long after, it waits %s", pause)
	}
	for range 1000 { // a primary that writes its file now and then
		now = now.Add(contested + time.Second)
		if pause := p.next(now); pause != 0 {
			t.Fatalf("it waits %s for what is no contest", pause)
		}
	}
}

// TestTwoKeepers: of the same installation they agree, of two that differ they do
// not spin.
func TestTwoKeepers(t *testing.T) {
	for _, tt := range []struct {
		name    string
		differ  func(*Keeper)
		atLeast int
		atMost  int
	}{
		{"alike", func(*Keeper) {}, 1, 1},
		{"of two versions", func(k *Keeper) { k.Chain.Entry.Socket = "/run/other.sock" }, freeWrites, 2*freeWrites + 6},
		{"of two forms", func(k *Keeper) { k.Form = DropIn }, freeWrites, 2*freeWrites + 6},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := testChain(t, map[string]string{"10-a.conflist": list})
			one, oneLog := testKeeper(t, c)
			two, twoLog := testKeeper(t, c)
			tt.differ(two)
			stopOne, stopTwo := run(t, one), run(t, two)
			time.Sleep(2 * time.Second)
			stopOne()
			stopTwo()
			log := oneLog.String() + twoLog.String()
			if n := strings.Count(log, "msg=chained"); n < tt.atLeast || n > tt.atMost {
				t.Errorf("%d writes in 2 s, want %d to %d\n%s", n, tt.atLeast, tt.atMost, log)
			}
			if tt.atMost > 1 && !strings.Contains(log, "reason=ChainContested") {
				t.Errorf("nothing is said about it:\n%s", log)
			}
			if strings.Contains(log, "level=ERROR") {
				t.Errorf("they disturb each other:\n%s", log)
			}
			if _, err := c.Chained(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestStubbornPrimary: one that writes its file whenever that is not its own
// template.
func TestStubbornPrimary(t *testing.T) {
	t.Parallel()
	c := testChain(t, map[string]string{"10-a.conflist": list})
	path := filepath.Join(c.Dir, "10-a.conflist")
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		t.Fatal(err)
	}
	if err := watcher.Add(c.Dir); err != nil {
		t.Fatal(err)
	}
	written := make(chan int)
	go insist(watcher, path, written)
	k, log := testKeeper(t, c)
	stop := run(t, k)
	time.Sleep(3 * time.Second)
	stop()
	watcher.Close()
	if n := <-written; n < freeWrites || n > freeWrites+4 {
		t.Errorf("the primary wrote %d times in 3 s, want about %d\n%s", n, freeWrites+2, log)
	}
	if !strings.Contains(log.String(), "reason=ChainContested") {
		t.Errorf("nothing is said about it:\n%s", log)
	}
}

// insist writes the file until the watcher is closed, and says how often.
func insist(watcher *fsnotify.Watcher, path string, written chan<- int) {
	n := 0
	for range watcher.Events {
		now, err := os.ReadFile(path)
		if bytes.Equal(now, []byte(list)) || err != nil && !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := os.WriteFile(path, []byte(list), 0o600); err == nil {
			n++
		}
	}
	written <- n
}
