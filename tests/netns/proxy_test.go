package netns

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/plugin/capture/nstest"
	"github.com/weirmesh/weir/tests/pod"
)

// The tests' proxy is this test binary, started again in a cgroup.
const (
	asProxy  = "WEIR_NETNS_TEST_PROXY" // the value is how many connections it takes
	asDialer = "WEIR_NETNS_TEST_DIAL"  // the value is an address
	asSender = "WEIR_NETNS_TEST_SEND"  // the value is an address
	dialFrom = "WEIR_NETNS_TEST_FROM"  // for asDialer: the value is a port

	proxyUID = 23456
	// A bypass that does not work is a storm of connections; this ends it.
	calm = 300
)

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(asProxy) != "":
		os.Exit(proxyMain(os.Getenv(asProxy)))
	case os.Getenv(asDialer) != "":
		os.Exit(dialMain(os.Getenv(asDialer)))
	case os.Getenv(asSender) != "":
		os.Exit(sendMain(os.Getenv(asSender)))
	}
	os.Exit(m.Run())
}

// accepted is what the proxy says of each connection, one JSON object a line.
type accepted struct {
	Listener uint16         // the port it came to
	Original netip.AddrPort // where it was going, by SO_ORIGINAL_DST
	Peer     netip.AddrPort
}

// proxyMain accepts on both ports and both families, says so, and forwards each
// connection to where it was going.
func proxyMain(limit string) int {
	most, err := strconv.ParseInt(limit, 10, 64)
	if err != nil {
		return 2
	}
	var taken atomic.Int64
	var out sync.Mutex
	enc := json.NewEncoder(os.Stdout)
	for _, port := range []uint16{capture.DefaultOutboundPort, capture.DefaultInboundPort} {
		// Two sockets: one for both families does not answer SO_ORIGINAL_DST for
		// IPv4.
		for _, network := range []string{"tcp4", "tcp6"} {
			l, err := net.Listen(network, fmt.Sprintf(":%d", port))
			if errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT) {
				continue // the pod has no such family
			}
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					if taken.Add(1) > most {
						os.Exit(3)
					}
					go forward(c.(*net.TCPConn), port, func(a accepted) {
						out.Lock()
						defer out.Unlock()
						_ = enc.Encode(a)
					})
				}
			}()
		}
	}
	_ = enc.Encode(accepted{})
	_, _ = io.Copy(io.Discard, os.Stdin) // until the test is over
	return 0
}

func forward(c *net.TCPConn, port uint16, say func(accepted)) {
	defer c.Close()
	// Of a connection that has been reset already there is none any more.
	original, err := originalDst(c)
	say(accepted{port, original, c.RemoteAddr().(*net.TCPAddr).AddrPort()})
	if err != nil || original == c.LocalAddr().(*net.TCPAddr).AddrPort() {
		return
	}
	up, err := net.DialTimeout("tcp", endpoint(original).String(), time.Second)
	if err != nil {
		_ = c.SetLinger(0)
		return
	}
	defer up.Close()
	var wg sync.WaitGroup
	for _, p := range [][2]*net.TCPConn{{c, up.(*net.TCPConn)}, {up.(*net.TCPConn), c}} {
		wg.Go(func() {
			_, _ = io.Copy(p[0], p[1])
			_ = p[0].CloseWrite()
		})
	}
	wg.Wait()
}

// endpoint is where a connection goes: the only balancing that there is here.
func endpoint(original netip.AddrPort) netip.AddrPort {
	for _, f := range families {
		switch original.Addr() {
		case f.vip:
			return netip.AddrPortFrom(f.peer, original.Port())
		case f.ownVIP:
			return netip.AddrPortFrom(f.pod, original.Port())
		}
	}
	return original
}

func originalDst(c *net.TCPConn) (netip.AddrPort, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	var out netip.AddrPort
	var got error
	v6 := c.LocalAddr().(*net.TCPAddr).IP.To4() == nil
	err = raw.Control(func(fd uintptr) { out, got = pod.OriginalDestination(int(fd), v6) })
	if err != nil {
		return out, err
	}
	return out, got
}

// dialMain dials, and prints what the server says first.
func dialMain(addr string) int {
	port, _ := strconv.Atoi(os.Getenv(dialFrom)) // none: any
	// Less than a second, after which the kernel sends its SYN again, and may say that it
	// did not get out.
	c, err := (&net.Dialer{Timeout: 900 * time.Millisecond, LocalAddr: &net.TCPAddr{Port: port}}).Dial("tcp", addr)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	line, err := readLine(c)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Print(line)
	return 0
}

// proxy is the test's hold on the proxy process.
type proxy struct {
	events chan accepted
	cmd    *exec.Cmd
}

// startProxy starts the proxy in ns and in the cgroup, as uid proxyUID, and waits
// for its listeners.
func startProxy(t testing.TB, ns *nstest.NS, cg *nstest.Cgroup, limit int) *proxy {
	t.Helper()
	dir, err := os.Open(cg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", asProxy, limit))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		UseCgroupFD: true, CgroupFD: int(dir.Fd()),
		Credential: &syscall.Credential{Uid: proxyUID, Gid: proxyUID},
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{events: make(chan accepted, 1<<16), cmd: cmd}
	ns.Do(func() { err = cmd.Start() })
	if err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go p.read(stdout, read)
	t.Cleanup(func() {
		stdin.Close()
		<-read
		_ = cmd.Wait()
	})
	select {
	case <-p.events:
	case <-read:
		t.Fatal("the proxy did not start")
	case <-time.After(5 * time.Second):
		t.Fatal("the proxy does not start")
	}
	return p
}

func (p *proxy) read(from io.Reader, done chan<- struct{}) {
	defer close(done)
	dec := json.NewDecoder(from)
	for {
		var a accepted
		if dec.Decode(&a) != nil {
			return
		}
		select {
		case p.events <- a:
		default: // nobody looks any more
		}
	}
}

// took waits for the proxy's word on the connection from peer and returns it.
func (p *proxy) took(peer netip.AddrPort) (accepted, error) {
	timeout := time.After(2 * time.Second)
	for {
		select {
		case a := <-p.events:
			if a.Peer == peer {
				return a, nil
			}
		case <-timeout:
			return accepted{}, fmt.Errorf("the proxy did not see the connection from %s", peer)
		}
	}
}

// idle says whether the proxy took nothing since it was last asked.
func (p *proxy) idle() error {
	select {
	case a := <-p.events:
		return fmt.Errorf("the proxy took a connection: %+v", a)
	case <-time.After(20 * time.Millisecond):
		return nil
	}
}

func (p *proxy) forget() {
	for p.idle() != nil {
	}
}
