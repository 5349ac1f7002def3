package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/weirmesh/weir/tests/pod"
)

// steadyRate is how many requests a second the clients send that are neither slow nor
// idle.
const steadyRate = 500

// besideSlow measures clients alone, and beside others that send a request a byte a
// second, or nothing.
func besideSlow(ctx context.Context, l lane, length time.Duration, slow int, out results) error {
	measure := func(name func(string) string) error {
		s, err := newSteady(l, steadyRate)
		if err != nil {
			return err
		}
		defer s.close()
		if err := s.work(ctx, length); err != nil {
			return err
		}
		slices.Sort(s.times)
		for q, rank := range map[string]float64{"p50": 0.50, "p99": 0.99} {
			out.add(name(q), micros(s.times, rank))
		}
		return nil
	}
	if err := measure(nameSteady); err != nil {
		return err
	}
	conns, err := dialMany(l, 2*slow)
	defer closeAll(conns)
	if err != nil {
		return err
	}
	dripping, stop := context.WithCancel(ctx)
	var clients sync.WaitGroup
	defer clients.Wait()
	defer stop()
	for _, c := range conns[:slow] {
		clients.Go(func() { drip(dripping, c) })
	}
	if err := measure(func(q string) string { return nameBeside(q, slow) }); err != nil {
		return err
	}
	return undisturbed(conns[:slow])
}

// drip sends a request's head, a byte a second, which has no end before ctx has.
func drip(ctx context.Context, c net.Conn) {
	for next := "GET / HTTP/1.1\r\nHost: slow\r\nX-Slow: "; ; next = next[1:] + "x" {
		if _, err := io.WriteString(c, next[:1]); err != nil || wait(ctx, time.Second) != nil {
			return
		}
	}
}

// undisturbed wants connections to have lasted: what is closed is no slow client.
func undisturbed(conns []net.Conn) error {
	for _, c := range conns {
		if err := c.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
			return err
		}
		if n, err := c.Read(make([]byte, 1)); n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("a slow client got %d bytes, %w", n, err)
		}
	}
	return nil
}

// answer answers everything with 1 KB.
func answer(w http.ResponseWriter, _ *http.Request) {
	_, _ = io.WriteString(w, strings.Repeat("x", 1024))
}

// serveIn serves in a pod.
func serveIn(p *pod.Pod, port uint16, handler http.HandlerFunc) (*http.Server, error) {
	server := &http.Server{Handler: handler}
	err := pod.In(p.Netns, func() error {
		l, err := net.Listen("tcp4", fmt.Sprint(":", port))
		if err == nil {
			go func() { _ = server.Serve(l) }()
		}
		return err
	})
	return server, err
}
