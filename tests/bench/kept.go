package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/weirmesh/weir/tests/bench/report"
	"github.com/weirmesh/weir/tests/pod"
)

// Directions of connections, as seen from the proxy.
const (
	outbound = "outbound"
	inbound  = "inbound"
)

// keptPort is where the application of the rounds listens.
const keptPort = 8080

// keptPods are the caller and the callee of a round.
func keptPods(round int) []*pod.Pod {
	var out []*pod.Pod
	for _, role := range []string{"caller", "callee"} {
		name := fmt.Sprintf("%s-%d", role, round)
		out = append(out, &pod.Pod{Namespace: namespace, Name: name, ContainerID: name})
	}
	return out
}

// keptService is what a round's caller calls.
func keptService(round int) pod.Service {
	return backService(fmt.Sprintf("kept-%d", round), byte(100+round), "http")
}

// kept measures what a proxy holds for a connection that has carried one request
// and is kept for more. In each round the proxies are new.
func (b *memoryBench) kept(ctx context.Context, rounds, connections int, progress io.Writer) ([]report.Series, error) {
	series := []report.Series{
		{Name: nameKept(outbound), Unit: "KB"}, {Name: nameKernel(outbound), Unit: "KB"},
		{Name: nameKept(inbound), Unit: "KB"}, {Name: nameKernel(inbound), Unit: "KB"},
	}
	for round := range rounds {
		fmt.Fprintf(progress, "round %d of %d: %d idle connections each way\n", round+1, rounds, connections)
		pods := keptPods(round)
		caller, callee := pods[0], pods[1]
		for _, p := range pods {
			if err := b.node.Create(ctx, b.chain, p); err != nil {
				return nil, err
			}
		}
		service := keptService(round)
		if err := b.node.Write(service.Name+".yaml", service.Slices(keptPort, callee)...); err != nil {
			return nil, err
		}
		server, err := serveIn(callee, keptPort, answer)
		if err != nil {
			return nil, err
		}
		for i, way := range []struct {
			proxy *pod.Pod
			from  string // network namespace
			to    netip.AddrPort
		}{
			{caller, caller.Netns, netip.AddrPortFrom(service.ClusterIPs[0], service.Port)},
			// From the node itself, where no proxy gathers connections.
			{callee, "/proc/self/ns/net", netip.AddrPortFrom(callee.Address(false), keptPort)},
		} {
			one, kernel, err := b.grown(ctx, way.proxy, way.from, way.to, connections)
			if err != nil {
				server.Close()
				return nil, err
			}
			series[2*i].Samples = append(series[2*i].Samples, one)
			series[2*i+1].Samples = append(series[2*i+1].Samples, kernel)
		}
		server.Close()
	}
	return series, nil
}

// warmUp is how many connections come and go before it is measured.
const warmUp = 20

// grown is by how much a proxy's memory, and the kernel's for it, has grown with
// that many idle connections, in KB for each.
func (b *memoryBench) grown(ctx context.Context, proxy *pod.Pod, from string, to netip.AddrPort, n int) (float64, float64, error) {
	if err := awaitAnswer(ctx, lane{client: from, target: to}); err != nil {
		return 0, 0, err
	}
	conns, err := askEach(ctx, from, to, warmUp)
	closeAll(conns)
	if err != nil {
		return 0, 0, err
	}
	before, kernelBefore, err := b.calmMemory(ctx, proxy)
	if err != nil {
		return 0, 0, err
	}
	conns, err = askEach(ctx, from, to, n)
	defer closeAll(conns)
	if err != nil {
		return 0, 0, err
	}
	after, kernelAfter, err := b.calmMemory(ctx, proxy)
	each := func(before, after float64) float64 { return (after - before) * 1000 / float64(n) } // MB to KB
	return each(before, after), each(kernelBefore, kernelAfter), err
}

// calmMemory is a proxy's memory, and the kernel's for it, in MB, after a while.
func (b *memoryBench) calmMemory(ctx context.Context, proxy *pod.Pod) (float64, float64, error) {
	if err := wait(ctx, calm); err != nil {
		return 0, 0, err
	}
	own, err := proxyPSS(b.node, proxy)
	if err != nil {
		return 0, 0, err
	}
	kernel, err := b.kernelMemory(proxy)
	return own, kernel, err
}

// askEach opens n connections and has one request answered on each.
func askEach(ctx context.Context, from string, to netip.AddrPort, n int) ([]net.Conn, error) {
	var conns []net.Conn
	err := pod.In(from, func() error {
		for range n {
			c, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", to.String())
			if err != nil {
				return err
			}
			conns = append(conns, c)
			if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
				return err
			}
			if _, err := fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", to); err != nil {
				return err
			}
			if err := readAnswer(bufio.NewReader(c)); err != nil {
				return err
			}
		}
		return nil
	})
	return conns, err
}

func closeAll(conns []net.Conn) {
	for _, c := range conns {
		c.Close()
	}
}

// kernelMemory is what the kernel has charged to a proxy's cgroup for itself, in MB:
// in v1 memory.kmem and memory.kmem.tcp, in v2 "kernel" (Linux 5.18) and "sock" of
// memory.stat.
func (b *memoryBench) kernelMemory(p *pod.Pod) (float64, error) {
	dirs, err := b.node.Cgroups()
	if err != nil {
		return 0, err
	}
	for _, dir := range dirs {
		if filepath.Base(dir) != p.ContainerID {
			continue
		}
		stat, err := os.ReadFile(filepath.Join(dir, "memory.stat"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, err
		}
		var bytes []string
		for line := range strings.Lines(string(stat)) {
			if f := strings.Fields(line); f[0] == "kernel" || f[0] == "sock" {
				bytes = append(bytes, f[1])
			}
		}
		for _, name := range []string{"memory.kmem.usage_in_bytes", "memory.kmem.tcp.usage_in_bytes"} {
			if content, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
				bytes = append(bytes, strings.TrimSpace(string(content)))
			}
		}
		sum := 0.0
		for _, text := range bytes {
			n, err := strconv.ParseFloat(text, 64)
			if err != nil {
				return 0, fmt.Errorf("memory of %s: %w", dir, err)
			}
			sum += n
		}
		return sum / 1e6, nil
	}
	return 0, fmt.Errorf("there is no memory cgroup of %s", p.ContainerID)
}
