package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/weirmesh/weir/tests/e2e/app/report"
	"github.com/weirmesh/weir/tests/probe"
)

// flood starts many connections to each address at once and prints how many were
// answered, as JSON. It fails only if none was: a pod's init container that fails
// would run again.
func flood(args []string, stdout io.Writer) error {
	var to []netip.AddrPort
	for _, arg := range args {
		address, err := netip.ParseAddrPort(arg)
		if err != nil {
			return err
		}
		to = append(to, address)
	}
	if len(to) == 0 {
		return errors.New("flood needs an address, such as 10.0.0.1:9000")
	}
	answered, err := probe.Flood(10*time.Second, to...)
	if err != nil {
		return err
	}
	if answered == 0 {
		return fmt.Errorf("none of %d connections was answered", probe.Connections*len(to))
	}
	return json.NewEncoder(stdout).Encode(map[string]int{"answered": answered})
}

// sink counts connections, and answers each with a byte.
type sink struct {
	mu     sync.Mutex
	counts report.Sink
}

func (s *sink) accept(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return // as acceptEchoes does
		}
		s.count(conn.RemoteAddr())
		_, _ = conn.Write([]byte{1})
		conn.Close()
	}
}

func (s *sink) count(from net.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if tcp, ok := from.(*net.TCPAddr); ok && probe.Uncaptured(tcp.AddrPort()) {
		s.counts.Uncaptured++
		return
	}
	s.counts.Others++
}

func (s *sink) counted() report.Sink {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.counts
}
