package interop

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/tests/pod"
)

// Ports of called.
const (
	scarcePort = 10200 + iota
	crampedPort
	untrackedPort
	plentyPort
	sharedPort
)

// plain are those of them whose every request under way has a connection of its own: by
// mTLS one is all that two proxies need, as toShared shows.
var plain = []int{scarcePort, crampedPort, untrackedPort, plentyPort}

var (
	toScarce    = declare("scarce", scarcePort, "http")
	toCramped   = declare("cramped", crampedPort, "http")
	toPlenty    = declare("plenty", plentyPort, "http")
	toUntracked = declare("untracked", untrackedPort, "http")
	toShared    = declare("shared", sharedPort, "http")
)

// waiting is how many connections there is no descriptor for.
const waiting = 20

// fromStarved are the labels of both ends.
func fromStarved(workload, namespace, service string) string {
	return fmt.Sprintf(`destination_namespace=%q,destination_service=%q,destination_workload=%q,direction="outbound",source_namespace="shop",source_workload="starved"`,
		namespace, service, workload)
}

// TestWhatRunsOutIsShedAndCounted: descriptors, local ports, conntrack's entries. What
// needs none goes on, the proxy lives, and all is well once there are some again.
func TestWhatRunsOutIsShedAndCounted(t *testing.T) {
	onNode(t)
	t.Parallel()
	proxy, before := proxyOf(t, starved), metrics(t)
	shared := newSharing(t, proxy)
	// One after the other: the proxy is the same.
	t.Run("descriptors", func(t *testing.T) { withoutDescriptors(t, proxy, shared) })
	t.Run("local ports", func(t *testing.T) { withoutLocalPorts(t, shared) })
	t.Run("places in the table of connections", func(t *testing.T) { withoutConntrack(t, shared) })
	if now := proxyOf(t, starved); now != proxy {
		t.Errorf("the proxy was process %d, and is %d", proxy, now)
	}
	requests := func(service, code, reason string) string {
		tls := "none"
		if service == "shared" {
			tls = "mutual"
		}
		return fmt.Sprintf(`weir_http_requests_total{%s,code=%q,grpc_status="",protocol="http1",reason=%q,route="",tls=%q}`,
			fromStarved("called", "shop", service), code, reason, tls)
	}
	grown(t, before, map[string]float64{
		requests("scarce", "503", "overload"):           2,
		requests("cramped", "503", "overload"):          1,
		requests("plenty", "200", ""):                   1,
		requests("shared", "200", ""):                   1 + 2 + 4 + 6,
		requests("untracked", "503", "connect_timeout"): 1,
		"weir_tcp_connections_closed_total{" + fromStarved("unknown", "unknown", "unknown") + `,reason="overload"}`: waiting,
	})
}

// sharing are clients whose requests go by one connection of mTLS.
type sharing struct {
	app     *holding
	clients []*asking
	asked   int
}

const sharers = 6

func newSharing(t *testing.T, proxy int) *sharing {
	s := &sharing{app: holdRequests(t, sharedPort)}
	before := len(descriptors(t, proxy))
	for range sharers {
		s.clients = append(s.clients, ask(t, starved, toShared))
	}
	eventually(t, patience, "the clients are accepted", func() error {
		if n := len(descriptors(t, proxy)); n < before+sharers {
			return fmt.Errorf("%d descriptors, of %d", n, before+sharers)
		}
		return nil
	})
	s.clients[0].expect(t, "/", 200, "")
	return s
}

// ask has some of them ask at once, more than ever before: there is no connection yet that
// could be theirs alone, and they need nothing that there is not.
func (s *sharing) ask(t *testing.T) {
	t.Helper()
	s.asked += 2
	for _, c := range s.clients[:s.asked] {
		c.send(t, "/hold")
	}
	s.app.await(t, s.asked)
	s.app.release(s.asked)
	for _, c := range s.clients[:s.asked] {
		c.answered(t, 200, "")
	}
}

func withoutDescriptors(t *testing.T, proxy int, shared *sharing) {
	app := holdRequests(t, scarcePort)
	// Two clients are there, and one connection to the application, which one of them
	// is using.
	busy, idle := ask(t, starved, toScarce), ask(t, starved, toScarce)
	busy.expect(t, "/", 200, "")
	idle.expect(t, "/", 200, "")
	busy.send(t, "/hold")
	app.await(t, 1)

	logged := len(accessLog.String())
	restore := limitDescriptors(t, starved, proxy, toScarce)
	began, used := time.Now(), cpuTime(t, proxy)
	idle.expect(t, "/", 503, "weir; error=connection_limit_reached; details=\"overload: ")
	idle.expect(t, "/", 503, "weir; error=connection_limit_reached; details=\"overload: ")

	shared.ask(t)
	// Nothing of these is known to the proxy before it has a descriptor for them.
	var shed []net.Conn
	for range waiting {
		conn, err := dialFrom(t.Context(), starved, toScarce.String())
		if errors.Is(err, unix.ECONNRESET) {
			continue // already
		}
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		shed = append(shed, conn)
	}
	for _, conn := range shed {
		_ = conn.SetDeadline(time.Now().Add(patience))
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Fatalf("a connection that there was no descriptor for ended with %v, want a reset", err)
		}
	}
	if took, used := time.Since(began), cpuTime(t, proxy)-used; used > took/2 {
		t.Errorf("the proxy has used %s of CPU in %s", used, took)
	}
	eventually(t, patience, "records of what was shed", func() error {
		all, err := parseRecords(accessLog.String()[logged:])
		if err != nil {
			return err
		}
		shed := 0
		for _, r := range all {
			if r.Pod == starved.ID() && r.Server == toScarce.String() && r.Reason == "overload" && r.HTTP == nil {
				shed++
			}
		}
		if shed != waiting {
			return fmt.Errorf("%d, want %d", shed, waiting)
		}
		return nil
	})
	app.release(1)
	busy.answered(t, 200, "")

	restore()
	busy.expect(t, "/", 200, "")
	idle.expect(t, "/", 200, "")
	ask(t, starved, toScarce).expect(t, "/", 200, "")
}

func withoutLocalPorts(t *testing.T, shared *sharing) {
	app := holdRequests(t, crampedPort)
	holdRequests(t, plentyPort)
	const ports = 8
	restore := limitPorts(t, starved, 50000, 50000+ports-1)
	var busy []*asking
	for range ports {
		c := ask(t, starved, toCramped)
		c.send(t, "/hold")
		busy = append(busy, c)
	}
	app.await(t, ports)

	client, other := ask(t, starved, toCramped), ask(t, starved, toPlenty)
	client.expect(t, "/", 503, "weir; error=connection_limit_reached; details=\"overload: ")
	other.expect(t, "/", 200, "")
	shared.ask(t)
	app.release(ports)
	for _, c := range busy {
		c.answered(t, 200, "")
	}
	client.expect(t, "/", 200, "")
	restore()
}

// withoutConntrack has the kernel drop what begins a connection, which is what it does
// when its table is full. That table's size is one for all network namespaces, and only
// the first one can set it (net.netfilter.nf_conntrack_max, Linux 6.18).
func withoutConntrack(t *testing.T, shared *sharing) {
	app := holdRequests(t, untrackedPort)
	busy, client := ask(t, starved, toUntracked), ask(t, starved, toUntracked)
	busy.expect(t, "/", 200, "")
	client.expect(t, "/", 200, "")
	busy.send(t, "/hold")
	app.await(t, 1)

	nft(t, starved, fmt.Sprintf("table inet full { chain out { type filter hook output priority 0; tcp dport %d ct state new drop; }; }", untrackedPort))
	restore := once(t, func() { nft(t, starved, "delete table inet full") })
	client.expect(t, "/", 503, "weir; error=connection_timeout; details=\"connect_timeout: ")
	shared.ask(t)
	app.release(1)
	busy.answered(t, 200, "")
	client.expect(t, "/", 200, "") // by the connection that there is
	busy.send(t, "/hold")
	app.await(t, 1)
	restore()
	client.expect(t, "/last", 200, "") // and leaves the proxy one connection
	app.release(1)
	busy.answered(t, 200, "")
}

// nft changes the rules of a pod.
func nft(t *testing.T, p *pod.Pod, rules string) {
	t.Helper()
	cmd := program(context.Background(), t, "nft", rules)
	var said bytes.Buffer
	cmd.Stderr = &said
	err := startIn(p, cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		t.Fatalf("nft %q: %v: %s", rules, err, said.String())
	}
}

// proxyOf is the process of a pod's proxy.
func proxyOf(t *testing.T, p *pod.Pod) int {
	t.Helper()
	pids, err := node.CgroupPIDs(p.ContainerID)
	if err != nil || len(pids) != 1 {
		t.Fatalf("the proxies of %s are %v, %v", p.ID(), pids, err)
	}
	return pids[0]
}

// limitDescriptors leaves a pod's proxy none but those that it has, until the function it
// returns is called. Connections to a Service take what is free below the limit.
func limitDescriptors(t *testing.T, p *pod.Pod, proxy int, to netip.AddrPort) func() {
	t.Helper()
	was := strings.TrimSpace(prlimit(t, proxy, "--nofile", "--output=SOFT", "--noheadings"))
	open := descriptors(t, proxy)
	limit := slices.Max(open) + 1
	prlimit(t, proxy, fmt.Sprintf("--nofile=%d:", limit))
	restore := once(t, func() { prlimit(t, proxy, "--nofile="+was+":") })
	for range limit - len(open) {
		ask(t, p, to)
	}
	eventually(t, patience, "the proxy's descriptors", func() error {
		if n := len(descriptors(t, proxy)); n != limit {
			return fmt.Errorf("%d are in use, of %d", n, limit)
		}
		return nil
	})
	return restore
}

// descriptors are those that a process has.
func descriptors(t *testing.T, pid int) []int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	var out []int
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, n)
	}
	return out
}

// prlimit runs the program on a process, as its user: another one needs
// CAP_SYS_RESOURCE, which not every root has.
func prlimit(t *testing.T, pid int, args ...string) string {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	var uid uint32
	_, of, _ := strings.Cut(string(status), "\nUid:")
	if _, err := fmt.Sscan(of, &uid); err != nil {
		t.Fatal(err)
	}
	cmd := program(context.Background(), t, "prlimit", append([]string{fmt.Sprint("--pid=", pid)}, args...)...)
	cmd.SysProcAttr = as(uid)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("prlimit %q: %v: %s", args, err, out)
	}
	return string(out)
}

// limitPorts leaves a pod so many ports to connect from.
func limitPorts(t *testing.T, p *pod.Pod, first, last int) func() {
	t.Helper()
	const file = "/proc/sys/net/ipv4/ip_local_port_range" // of the namespace of the thread that opens it
	var was []byte
	err := pod.In(p.Netns, func() error {
		var err error
		if was, err = os.ReadFile(file); err != nil {
			return err
		}
		return os.WriteFile(file, fmt.Appendf(nil, "%d %d", first, last), 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	return once(t, func() {
		if err := pod.In(p.Netns, func() error { return os.WriteFile(file, was, 0) }); err != nil {
			t.Error(err)
		}
	})
}

// once has something done when the function it returns is called, or else at the
// test's end.
func once(t *testing.T, do func()) func() {
	f := sync.OnceFunc(do)
	t.Cleanup(f)
	return f
}

// cpuTime is what a process has used.
func cpuTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	used, err := pod.CPUTime(pid)
	if err != nil {
		t.Fatal(err)
	}
	return used
}

// holding is a server that answers at once, but for what goes to /hold, and closes its
// connection after /last.
type holding struct {
	held     chan struct{} // one for each that is held
	released chan struct{} // one for each that goes on
}

// holdRequests starts one on a port of called.
func holdRequests(t *testing.T, port uint16) *holding {
	t.Helper()
	h := &holding{held: make(chan struct{}, 100), released: make(chan struct{})}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/hold":
		case "/last":
			w.Header().Set("Connection", "close")
			return
		default:
			return
		}
		h.held <- struct{}{}
		select {
		case <-h.released:
		case <-r.Context().Done():
		}
	})}
	l := listen(t, port)
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close() })
	return h
}

// release has so many go on.
func (h *holding) release(n int) {
	for range n {
		h.released <- struct{}{}
	}
}

// await waits until so many more are held.
func (h *holding) await(t *testing.T, n int) {
	t.Helper()
	late := time.After(patience)
	for i := range n {
		select {
		case <-h.held:
		case <-late:
			t.Fatalf("%d of %d requests have come to the application", i, n)
		}
	}
}

// asking is a client's connection that stays.
type asking struct {
	net.Conn
	r  *bufio.Reader
	to netip.AddrPort
}

// clients is how many clients there were. Each has a port of its own: those from which
// connect(2) chooses are left to the proxy.
var clients atomic.Int32

// ask connects from a pod.
func ask(t *testing.T, p *pod.Pod, to netip.AddrPort) *asking {
	t.Helper()
	var conn net.Conn
	err := pod.In(p.Netns, func() error {
		local := net.TCPAddr{IP: p.Address(false).AsSlice(), Port: 20000 + int(clients.Add(1))}
		var err error
		conn, err = (&net.Dialer{LocalAddr: &local}).DialContext(t.Context(), "tcp", to.String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &asking{conn, bufio.NewReader(conn), to}
}

func (a *asking) send(t *testing.T, path string) {
	t.Helper()
	_ = a.SetDeadline(time.Now().Add(patience))
	if _, err := fmt.Fprintf(a, "GET %s HTTP/1.1\r\nHost: a\r\n\r\n", path); err != nil {
		t.Fatal(err)
	}
}

// answered wants a status, and a Proxy-Status that begins so.
func (a *asking) answered(t *testing.T, status int, proxyStatus string) {
	t.Helper()
	_ = a.SetDeadline(time.Now().Add(patience))
	response, err := http.ReadResponse(a.r, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(io.Discard, response.Body)
	got := response.Header.Get("Proxy-Status")
	if err != nil || response.StatusCode != status || !strings.HasPrefix(got, proxyStatus) || (got == "") != (proxyStatus == "") {
		t.Errorf("answered %s, Proxy-Status %q, %v; want %d, %q", response.Status, got, err, status, proxyStatus)
	}
}

func (a *asking) expect(t *testing.T, path string, status int, proxyStatus string) {
	t.Helper()
	a.send(t, path)
	a.answered(t, status, proxyStatus)
}
