package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/weirmesh/weir/tests/bench/report"
	"github.com/weirmesh/weir/tests/pod"
)

// namespace is where the benchmark's pods are.
const namespace = "bench"

const (
	// serverPort is the first port of the servers behind the Services, on the node.
	serverPort = 9000
	// calm is how long after its last connection a proxy counts as idle.
	calm = 3 * time.Second
)

// services are n destinations. Behind each is the node itself, on a port of its own.
func services(n int) []pod.Service {
	var out []pod.Service
	for i := range n {
		out = append(out, pod.Service{Namespace: namespace, Name: fmt.Sprintf("s%d", i), Port: 80, ClusterIPs: []netip.Addr{
			netip.AddrFrom4([4]byte{10, 96, 1, byte(i + 1)}),
		}})
	}
	return out
}

func idlePod(i int) *pod.Pod {
	return &pod.Pod{Namespace: namespace, Name: fmt.Sprintf("idle-%d", i), ContainerID: fmt.Sprintf("idle-%d", i)}
}

// idle makes n pods whose proxies know all destinations, and measures the proxies'
// memory some time after their last connections have ended and they have their
// certificates.
func (b *memoryBench) idle(ctx context.Context, n, destinations int) (report.Series, error) {
	var serving sync.WaitGroup
	defer serving.Wait()
	for i := range destinations {
		server, err := net.Listen("tcp4", fmt.Sprintf(":%d", serverPort+i))
		if err != nil {
			return report.Series{}, err
		}
		serving.Go(func() { echo(server) })
		defer server.Close()
	}

	var pods []*pod.Pod
	for i := range n {
		p := idlePod(i)
		if err := b.node.Create(ctx, b.chain, p); err != nil {
			return report.Series{}, err
		}
		if err := callAll(ctx, p, destinations); err != nil {
			return report.Series{}, fmt.Errorf("pod %s: %w", p.ID(), err)
		}
		pods = append(pods, p)
	}
	for _, p := range pods {
		if err := awaitCertificate(ctx, b.node, p); err != nil {
			return report.Series{}, err
		}
	}
	if err := wait(ctx, calm); err != nil {
		return report.Series{}, err
	}
	if err := b.records.checkServices(n * destinations); err != nil {
		return report.Series{}, err
	}
	return proxyMemory(b.node, nameIdle(destinations), pods)
}

// wait waits, unless ctx is done.
func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// callAll connects from the pod to every Service once, and sees it answered.
func callAll(ctx context.Context, p *pod.Pod, destinations int) error {
	return pod.In(p.Netns, func() error {
		for _, s := range services(destinations) {
			dialer := net.Dialer{Timeout: 5 * time.Second}
			c, err := dialer.DialContext(ctx, "tcp4", netip.AddrPortFrom(s.ClusterIPs[0], s.Port).String())
			if err != nil {
				return err
			}
			err = ping(c)
			c.Close()
			if err != nil {
				return fmt.Errorf("service %s: %w", s.Name, err)
			}
		}
		return nil
	})
}

func ping(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if _, err := c.Write([]byte{1}); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}

// echo serves until l is closed, and returns when its connections have ended.
func echo(l net.Listener) {
	var serving sync.WaitGroup
	defer serving.Wait()
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		serving.Go(func() {
			defer c.Close()
			_, _ = io.Copy(c, c)
		})
	}
}

// proxyMemory measures the proxies of pods.
func proxyMemory(node *pod.Node, name string, pods []*pod.Pod) (report.Series, error) {
	s := report.Series{Name: name, Unit: "MB"}
	for _, p := range pods {
		m, err := proxyPSS(node, p)
		if err != nil {
			return s, err
		}
		s.Samples = append(s.Samples, m)
	}
	return s, nil
}

// proxyPSS is the memory of a pod's proxy, in MB.
func proxyPSS(node *pod.Node, p *pod.Pod) (float64, error) {
	pid, err := proxyPID(node, p)
	if err != nil {
		return 0, err
	}
	return pss(pid)
}

func proxyPID(node *pod.Node, p *pod.Pod) (int, error) {
	pids, err := node.CgroupPIDs(p.ContainerID)
	if err != nil {
		return 0, err
	}
	if len(pids) != 1 {
		return 0, fmt.Errorf("pod %s: %d proxies", p.ID(), len(pids))
	}
	return pids[0], nil
}

// awaitCertificate waits until a pod's proxy has a certificate, which it keeps in a memory
// file.
func awaitCertificate(ctx context.Context, node *pod.Node, p *pod.Pod) error {
	pid, err := proxyPID(node, p)
	if err != nil {
		return err
	}
	fds := fmt.Sprintf("/proc/%d/fd", pid)
	for end := time.Now().Add(30 * time.Second); ; {
		entries, err := os.ReadDir(fds)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if to, err := os.Readlink(filepath.Join(fds, e.Name())); err == nil && strings.HasPrefix(to, "/memfd:weir-identity") {
				return nil
			}
		}
		if time.Now().After(end) {
			return fmt.Errorf("pod %s: its proxy has no certificate", p.ID())
		}
		if err := wait(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
}

// lines counts the records of the access log that name a Service: each shows
// that a proxy knew a destination.
type lines struct {
	mu       sync.Mutex
	rest     []byte
	services int
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rest = append(l.rest, p...)
	for {
		line, rest, whole := bytes.Cut(l.rest, []byte("\n"))
		if !whole {
			return len(p), nil
		}
		if bytes.Contains(line, []byte(`"weir.destination.service":"`+namespace+`/s`)) {
			l.services++
		}
		l.rest = rest
	}
}

func (l *lines) checkServices(want int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.services != want {
		return fmt.Errorf("%d connections to Services are in the access log, %d were made", l.services, want)
	}
	return nil
}
