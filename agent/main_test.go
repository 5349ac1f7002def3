package main

import (
	"log/slog"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestNoGoroutineGetsTheFirstThread has more of them at once, each on a thread of its
// own, than there are threads.
func TestNoGoroutineGetsTheFirstThread(t *testing.T) {
	const goroutines = 64
	var all sync.WaitGroup
	var together sync.WaitGroup
	together.Add(goroutines)
	for range goroutines {
		all.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			if unix.Gettid() == os.Getpid() {
				t.Error("it is on the thread whose namespaces are the process's")
			}
			together.Done()
			together.Wait()
		})
	}
	all.Wait()
}

func TestAnAddressThatIsInUseIsListenedOnOnceItIsFree(t *testing.T) {
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := other.Addr().String()
	later := make(chan net.Listener)
	go func() { later <- listenLater(t.Context(), address, slog.New(slog.DiscardHandler)) }()
	other.Close()
	if l := <-later; l.Addr().String() != address {
		t.Errorf("listens on %s, want %s", l.Addr(), address)
	} else {
		l.Close()
	}
}
