package main

import (
	"log/slog"
	"net"
	"testing"
)

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
