package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/weirmesh/weir/tests/bench/report"
	"github.com/weirmesh/weir/tests/pod"
)

// namespace is where the benchmark's pods are.
const namespace = "bench"

const (
	// destinations is how many Services each idle proxy has been asked for.
	destinations = 20
	// serverPort is where the one server behind all of them listens, on the node.
	serverPort = 9000
	// calm is how long after its last connection a proxy counts as idle.
	calm = 3 * time.Second
)

// services are the destinations. Behind each is the node itself.
func services() []pod.Service {
	var out []pod.Service
	for i := range destinations {
		out = append(out, pod.Service{Namespace: namespace, Name: fmt.Sprintf("s%d", i), Port: 80, ClusterIPs: []netip.Addr{
			netip.AddrFrom4([4]byte{10, 96, 1, byte(i + 1)}),
		}})
	}
	return out
}

// writeManifests writes all pods and Services there will be.
func (b *addBench) writeManifests(f addFlags) error {
	node := &pod.Pod{Addresses: []netip.Addr{pod.PodRange4.Masked().Addr().Next()}}
	objects := []any{pod.CapturedNamespace(namespace), (&pod.Pod{Namespace: namespace, Name: "pod"}).Manifest()}
	for i := range f.proxies {
		objects = append(objects, idlePod(i).Manifest())
	}
	for i := range f.burst {
		objects = append(objects, burstPod(i).Manifest())
	}
	for _, s := range services() {
		objects = append(objects, s.Manifest())
		objects = append(objects, s.Slices(serverPort, node)...)
	}
	return b.node.Write("bench.yaml", objects...)
}

func idlePod(i int) *pod.Pod {
	return &pod.Pod{Namespace: namespace, Name: fmt.Sprintf("idle-%d", i), ContainerID: fmt.Sprintf("idle-%d", i)}
}

// idle makes pods whose proxies know all destinations, and measures the proxies'
// memory, with the connections open and after they have ended.
func (b *addBench) idle(ctx context.Context, n int) ([]report.Series, error) {
	server, err := net.Listen("tcp4", fmt.Sprintf(":%d", serverPort))
	if err != nil {
		return nil, err
	}
	var serving sync.WaitGroup
	serving.Go(func() { echo(server) })
	defer serving.Wait()
	defer server.Close()

	var pods []*pod.Pod
	var open []net.Conn
	for i := range n {
		p := idlePod(i)
		if p.Netns, err = b.node.NewNamespace(p.ContainerID); err != nil {
			return nil, err
		}
		if err := b.chain.Add(ctx, p); err != nil {
			return nil, err
		}
		conns, err := callAll(ctx, p)
		if err != nil {
			return nil, fmt.Errorf("pod %s: %w", p.ID(), err)
		}
		pods, open = append(pods, p), append(open, conns...)
	}
	busy, err := proxyMemory(b.node, nameOpen, pods)
	if err != nil {
		return nil, err
	}
	for _, c := range open {
		c.Close()
	}
	select {
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-time.After(calm):
	}
	if err := b.records.checkServices(n * destinations); err != nil {
		return nil, err
	}
	quiet, err := proxyMemory(b.node, nameIdle, pods)
	if err != nil {
		return nil, err
	}
	return []report.Series{busy, quiet}, nil
}

// callAll opens a connection from the pod to every Service, and sees it answered.
func callAll(ctx context.Context, p *pod.Pod) ([]net.Conn, error) {
	var open []net.Conn
	err := pod.In(p.Netns, func() error {
		for _, s := range services() {
			dialer := net.Dialer{Timeout: 5 * time.Second}
			c, err := dialer.DialContext(ctx, "tcp4", netip.AddrPortFrom(s.ClusterIPs[0], s.Port).String())
			if err != nil {
				return err
			}
			open = append(open, c)
			if err := ping(c); err != nil {
				return fmt.Errorf("service %s: %w", s.Name, err)
			}
		}
		return nil
	})
	return open, err
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
		pids, err := node.CgroupPIDs(p.ContainerID)
		if err != nil {
			return s, err
		}
		if len(pids) != 1 {
			return s, fmt.Errorf("pod %s: %d proxies", p.ID(), len(pids))
		}
		m, err := pss(pids[0])
		if err != nil {
			return s, err
		}
		s.Samples = append(s.Samples, m)
	}
	return s, nil
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

var proxyMillis = regexp.MustCompile(`msg="pod captured".* container=(\S+) .*\bproxy_ms=([0-9.]+)`)

// launchTimes reads from the agent's log how long proxies took, in ms, of
// containers whose ID begins with prefix.
func launchTimes(log, prefix string) ([]float64, error) {
	var out []float64
	for line := range strings.Lines(log) {
		m := proxyMillis.FindStringSubmatch(line)
		if m == nil || !strings.HasPrefix(m[1], prefix) {
			continue
		}
		ms, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			return nil, fmt.Errorf("agent's log: %w", err)
		}
		out = append(out, ms)
	}
	if len(out) == 0 {
		return nil, errors.New("the agent's log tells of no proxy")
	}
	return out, nil
}
