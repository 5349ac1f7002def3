package chain

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weirmesh/weir/tests/pod"
	"github.com/weirmesh/weir/tests/probe"
)

var probed = flag.Int("pods", 100, "pods whose first packets are watched")

// sinkPort is where the sink listens: on the node, outside all pods.
const sinkPort = 9000

// flood is how many connections a probe starts, of both families.
const flood = 2 * probe.Connections

// sinkRules count, on the node, the first packets to the sink by who sent them.
var sinkRules = fmt.Sprintf(`table inet sink {
	counter uncaptured {}
	counter captured {}
	chain first {
		type filter hook prerouting priority raw;
		tcp dport %d tcp flags & (syn | ack) == syn tcp sport %d-%d counter name uncaptured
		tcp dport %d tcp flags & (syn | ack) == syn tcp sport != %d-%d counter name captured
	}
}`, sinkPort, probe.FirstPort, probe.LastPort, sinkPort, probe.FirstPort, probe.LastPort)

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
	t.Logf("%d pods, %d connections each: %d answered; first packets at the sink: %d by proxies, %d uncaptured", *probed, flood, answered, captured, uncaptured)
	if uncaptured != 0 {
		t.Errorf("%d first packets got away uncaptured", uncaptured)
	}
	// Every connection that is answered went through a proxy, and most must be.
	if want := *probed * flood / 2; answered < want || captured < answered {
		t.Errorf("%d connections answered, by %d of proxies, want %d at least", answered, captured, want)
	}

	// The same probe, without weir-cni.
	bare, err := node.NewBareChain(programs.Folders())
	if err != nil {
		t.Fatal(err)
	}
	const controls = 3
	probeAll(t, bare, pods(t, "control", controls))
	if got := counted(t, "uncaptured"); got < controls*flood {
		t.Errorf("control: %d first packets of %d pods without weir-cni are seen, want %d", got, controls, controls*flood)
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
			answered[i], errs[i] = probeOne(t.Context(), chain, p)
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

// probeOne is the probe of one pod. Its thread waits in the namespace while ADD is under way.
func probeOne(ctx context.Context, chain *pod.Chain, p *pod.Pod) (int, error) {
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
			answered, err = probe.Flood(5*time.Second,
				netip.AddrPortFrom(pod.PodRange4.Masked().Addr().Next(), sinkPort),
				netip.AddrPortFrom(pod.PodRange6.Masked().Addr().Next(), sinkPort))
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
