package chain

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/tests/pod"
)

var probed = flag.Int("pods", 100, "pods whose first packets are watched")

const (
	// sinkPort is where the sink listens: on the node, outside all pods.
	sinkPort = 9000
	// probePorts is the first of the ports that a probe connects from, and
	// probePorts+flood-1 the last. They are below the kernel's range for sockets that
	// did not choose, so a proxy's own connections never come from them.
	probePorts = 20000
	// flood is how many connections of each family a probe starts, at once.
	flood = 40
)

// sinkRules count, on the node, the first packets to the sink by who sent them.
var sinkRules = fmt.Sprintf(`table inet sink {
	counter uncaptured {}
	counter captured {}
	chain first {
		type filter hook prerouting priority raw;
		tcp dport %d tcp flags & (syn | ack) == syn tcp sport %d-%d counter name uncaptured
		tcp dport %d tcp flags & (syn | ack) == syn tcp sport != %d-%d counter name captured
	}
}`, sinkPort, probePorts, probePorts+flood-1, sinkPort, probePorts, probePorts+flood-1)

// TestFirstPacketsAreCaptured floods connections from pods the moment that ADD
// returns, where a runtime starts the pod's first process.
func TestFirstPacketsAreCaptured(t *testing.T) {
	onNode(t)
	startSink(t)
	chain, err := node.NewChain(programs.Folders(), nil)
	if err != nil {
		t.Fatal(err)
	}
	answered := probeAll(t, chain, pods(t, "probe", *probed))
	uncaptured, captured := counted(t, "uncaptured"), counted(t, "captured")
	t.Logf("%d pods, %d connections each: %d answered; first packets at the sink: %d by proxies, %d uncaptured", *probed, 2*flood, answered, captured, uncaptured)
	if uncaptured != 0 {
		t.Errorf("%d first packets got away uncaptured", uncaptured)
	}
	// Every connection that is answered went through a proxy, and most must be.
	if want := *probed * flood; answered < want || captured < answered {
		t.Errorf("%d connections answered, by %d of proxies, want %d at least", answered, captured, want)
	}

	// The same probe, without weir-cni.
	bare, err := node.NewBareChain(programs.Folders())
	if err != nil {
		t.Fatal(err)
	}
	const controls = 3
	probeAll(t, bare, pods(t, "control", controls))
	if got := counted(t, "uncaptured"); got < controls*2*flood {
		t.Errorf("control: %d first packets of %d pods without weir-cni are seen, want %d", got, controls, controls*2*flood)
	}
}

// startSink answers on the node, and counts.
func startSink(t *testing.T) {
	t.Helper()
	listener, err := net.Listen("tcp", fmt.Sprintf(":%d", sinkPort))
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() { answer(listener) })
	t.Cleanup(func() {
		listener.Close()
		serving.Wait()
	})
	nft := exec.CommandContext(t.Context(), "nft", "-f", "-")
	nft.Stdin = strings.NewReader(sinkRules)
	if out, err := nft.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("nft", "delete", "table", "inet", "sink").CombinedOutput(); err != nil {
			t.Errorf("nft: %v: %s", err, out)
		}
	})
}

// answer sends each connection a byte.
func answer(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		_, _ = conn.Write([]byte{1})
		conn.Close()
	}
}

var packets = regexp.MustCompile(`packets (\d+)`)

// counted is what a counter of the sink stands at.
func counted(t *testing.T, name string) int {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "nft", "list", "counter", "inet", "sink", name).CombinedOutput()
	if err != nil {
		t.Fatalf("nft: %v: %s", err, out)
	}
	match := packets.FindSubmatch(out)
	if match == nil {
		t.Fatalf("nft says %q", out)
	}
	n, err := strconv.Atoi(string(match[1]))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// probeAll takes each pod through the chain with a probe in it, atWork at once,
// and returns how many connections were answered.
func probeAll(t *testing.T, chain *pod.Chain, ps []*pod.Pod) int {
	t.Helper()
	answered, errs := make([]int, len(ps)), make([]error, len(ps))
	var running sync.WaitGroup
	places := make(chan struct{}, atWork)
	for i, p := range ps {
		places <- struct{}{}
		running.Go(func() {
			defer func() { <-places }()
			answered[i], errs[i] = probe(t.Context(), chain, p)
		})
	}
	running.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	sum := 0
	for _, n := range answered {
		sum += n
	}
	return sum
}

// probe is one pod's. Its thread waits in the namespace while ADD is under way.
func probe(ctx context.Context, chain *pod.Chain, p *pod.Pod) (int, error) {
	if err := sandbox(p, p.Name); err != nil {
		return 0, err
	}
	added, flooded := make(chan bool, 1), make(chan error, 1)
	answered := 0
	go func() {
		flooded <- pod.In(p.Netns, func() error {
			if !<-added {
				return nil
			}
			var err error
			answered, err = floodSink()
			return err
		})
	}()
	err := chain.Add(ctx, p)
	added <- err == nil
	err = errors.Join(err, <-flooded)
	if err == nil {
		err = chain.Del(ctx, p)
	}
	if err != nil {
		return 0, err
	}
	return answered, node.RemoveNamespace(p.Netns)
}

// floodSink starts all connections from the calling thread's namespace, without
// waiting for any, and then counts those that are answered.
func floodSink() (int, error) {
	sink4 := pod.PodRange4.Masked().Addr().Next().As4()
	sink6 := pod.PodRange6.Masked().Addr().Next().As16()
	var fds []int
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	for i := range flood {
		for _, to := range []struct {
			family   int
			from, to unix.Sockaddr
		}{
			{unix.AF_INET, &unix.SockaddrInet4{Port: probePorts + i}, &unix.SockaddrInet4{Port: sinkPort, Addr: sink4}},
			{unix.AF_INET6, &unix.SockaddrInet6{Port: probePorts + i}, &unix.SockaddrInet6{Port: sinkPort, Addr: sink6}},
		} {
			fd, err := unix.Socket(to.family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return 0, err
			}
			fds = append(fds, fd)
			if to.family == unix.AF_INET6 {
				if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
					return 0, err
				}
			}
			if err := unix.Bind(fd, to.from); err != nil {
				return 0, fmt.Errorf("port %d: %w", probePorts+i, err)
			}
			if err := unix.Connect(fd, to.to); err != nil && !errors.Is(err, unix.EINPROGRESS) {
				return 0, fmt.Errorf("connect: %w", err)
			}
		}
	}
	answered := 0
	for _, fd := range fds {
		if readable(fd, 5*time.Second) {
			answered++
		}
	}
	return answered, nil
}

// readable reports whether a byte comes.
func readable(fd int, within time.Duration) bool {
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for deadline := time.Now().Add(within); ; {
		left := time.Until(deadline)
		if left <= 0 {
			return false
		}
		if _, err := unix.Poll(poll, int(left.Milliseconds())+1); errors.Is(err, unix.EINTR) {
			continue
		}
		n, err := unix.Read(fd, make([]byte, 1))
		return err == nil && n == 1
	}
}
