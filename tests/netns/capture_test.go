package netns

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/plugin/capture"
)

const (
	out = capture.DefaultOutboundPort
	in  = capture.DefaultInboundPort
)

// check is something that holds in a world with the default rules.
type check func(w *world, f family) error

var checks = map[string]check{
	"outbound is captured": func(w *world, f family) error {
		return serving(w.peer, ":8080", func() error {
			return errors.Join(w.through(out, w.pod, at(f.peer, 8080)), w.through(out, w.pod, at(f.other, 8080)))
		})
	},
	"a Service leads to another pod, and to the pod itself": func(w *world, f family) error {
		return errors.Join(
			serving(w.peer, ":8080", func() error { return w.through(out, w.pod, at(f.vip, 8080)) }),
			serving(w.pod, ":8080", func() error { return w.through(out, w.pod, at(f.ownVIP, 8080)) }))
	},
	// through wants the proxy to take one connection and not its own again.
	"the proxy's own pass, and nobody else of its uid": func(w *world, f family) error {
		return serving(w.peer, ":8080", func() error {
			if err := w.through(out, w.pod, at(f.peer, 8080)); err != nil {
				return err
			}
			return w.dialAsProxyUID(at(f.peer, 8080))
		})
	},
	"an address where nobody is fails": func(w *world, f family) error {
		if c, err := dial(w.pod, at(f.peer, 8079)); err == nil {
			c.Close()
			return errors.New("a closed port answered")
		}
		return nil
	},
	"inbound is captured": func(w *world, f family) error {
		return serving(w.pod, ":8081", func() error { return w.through(in, w.peer, at(f.pod, 8081)) })
	},
	"inbound is captured where the application has one address": func(w *world, f family) error {
		return serving(w.pod, at(f.pod, 8081), func() error { return w.through(in, w.peer, at(f.pod, 8081)) })
	},
	"the pod to itself is direct": func(w *world, f family) error {
		return serving(w.pod, ":8082", func() error {
			return errors.Join(w.direct(w.pod, at(f.pod, 8082)), w.direct(w.pod, at(f.own, 8082)))
		})
	},
	"the proxy's ports are refused from outside": func(w *world, f family) error {
		return errors.Join(w.refused(w.peer, at(f.pod, out)), w.refused(w.peer, at(f.pod, in)))
	},
	"the proxy's ports are refused from inside": func(w *world, f family) error {
		return errors.Join(w.refused(w.pod, at(f.pod, out)), w.refused(w.pod, at(f.pod, in)),
			w.refused(w.pod, at(f.own, out)), w.refused(w.pod, at(f.own, in)))
	},
	"a remote host has such ports too": func(w *world, f family) error {
		return serving(w.peer, fmt.Sprintf(":%d", out), func() error {
			return serving(w.peer, fmt.Sprintf(":%d", in), func() error {
				return errors.Join(w.through(out, w.pod, at(f.peer, out)), w.through(out, w.pod, at(f.peer, in)))
			})
		})
	},
	"a closed port is refused": func(w *world, f family) error { return w.refused(w.peer, at(f.pod, 8083)) },
	"an application on localhost is not reached": func(w *world, f family) error {
		return serving(w.pod, at(f.own, 8084), func() error {
			return errors.Join(w.refused(w.peer, at(f.pod, 8084)), w.direct(w.pod, at(f.own, 8084)))
		})
	},
	"UDP passes": func(w *world, f family) error {
		w.proxy.forget()
		return errors.Join(w.udp(f.peer, f, true), w.udp(f.pod, f, false), w.proxy.idle())
	},
	"what conntrack takes for a call of the proxy's is refused": func(w *world, f family) error {
		// Nobody answers, so that conntrack waits on.
		to := at(f.nobody, 8080)
		if err := w.dialInVain(to); err != nil {
			return err
		}
		var err error
		w.pod.Do(func() {
			var c net.Conn
			if c, err = (&net.Dialer{Timeout: time.Second, LocalAddr: &net.TCPAddr{Port: inVain}}).Dial("tcp", to); err == nil {
				c.Close()
			}
		})
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("from the proxy's port: %w", err)
		}
		return nil
	},
	"both directions half-close": func(w *world, f family) error {
		return serving(w.peer, ":8085", func() error {
			c, err := dial(w.pod, at(f.peer, 8085))
			if err != nil {
				return err
			}
			defer c.Close()
			if err := c.Conn.(*net.TCPConn).CloseWrite(); err != nil {
				return err
			}
			_, err = io.ReadAll(c.lines)
			return err
		})
	},
}

// dialAsProxyUID dials with the proxy's uid from outside its cgroup, and wants to
// be captured like anybody.
func (w *world) dialAsProxyUID(addr string) error {
	captured, err := w.dialAs(&syscall.Credential{Uid: proxyUID, Gid: proxyUID}, addr)
	if err != nil {
		return fmt.Errorf("dial with the proxy's uid: %w", err)
	}
	if !captured {
		return errors.New("a process with the proxy's uid was not captured")
	}
	return nil
}

// inVain is the port that dialInVain dials from.
const inVain = 20_001

// dialInVain dials from the proxy's cgroup, and wants no answer.
func (w *world) dialInVain(addr string) error {
	dir, err := os.Open(w.cgroup.Dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), asDialer+"="+addr, fmt.Sprintf("%s=%d", dialFrom, inVain))
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	var said []byte
	w.pod.Do(func() { said, err = cmd.CombinedOutput() })
	if err == nil || !strings.Contains(string(said), "i/o timeout") {
		return fmt.Errorf("as the proxy: %w: %s", err, said)
	}
	return nil
}

// dialAs dials from a process of the pod that runs as somebody, and says whether
// the proxy took the connection.
func (w *world) dialAs(who *syscall.Credential, addr string) (bool, error) {
	w.proxy.forget()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), asDialer+"="+addr)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: who}
	var said []byte
	var err error
	w.pod.Do(func() { said, err = cmd.CombinedOutput() })
	if err != nil {
		return false, fmt.Errorf("%w: %s", err, said)
	}
	return w.proxy.idle() != nil, nil
}

// udp sends a datagram to addr, from the pod or from its peer, and waits for the
// answer.
func (w *world) udp(addr netip.Addr, f family, fromPod bool) error {
	from, to := w.peer, w.pod
	if fromPod {
		from, to = w.pod, w.peer
	}
	var l net.PacketConn
	var c net.Conn
	var err error
	to.Do(func() { l, err = net.ListenPacket("udp", at(addr, 8086)) })
	if err != nil {
		return err
	}
	defer l.Close()
	from.Do(func() { c, err = net.Dial("udp", at(addr, 8086)) })
	if err != nil {
		return err
	}
	defer c.Close()
	deadline := time.Now().Add(time.Second)
	_, _ = l.SetDeadline(deadline), c.SetDeadline(deadline)
	if _, err := c.Write([]byte("ping")); err != nil {
		return err
	}
	buf := make([]byte, 16)
	n, peer, err := l.ReadFrom(buf)
	if err != nil {
		return fmt.Errorf("UDP to %s: %w", addr, err)
	}
	if string(buf[:n]) != "ping" {
		return fmt.Errorf("UDP to %s: %q", addr, buf[:n])
	}
	if _, err := l.WriteTo([]byte("pong"), peer); err != nil {
		return err
	}
	if n, err = c.Read(buf); err != nil {
		return fmt.Errorf("UDP from %s: %w", addr, err)
	}
	if string(buf[:n]) != "pong" {
		return fmt.Errorf("UDP from %s: %q", addr, buf[:n])
	}
	return nil
}

func TestCapture(t *testing.T) {
	for name, b := range backends(t) {
		for stack, families := range stacks {
			t.Run(name+"/"+stack, func(t *testing.T) {
				w := newWorldOf(t, b, 1<<20, families)
				w.apply(t, nil)
				for what, holds := range checks {
					for _, f := range families {
						t.Run(what+"/"+f.name, func(t *testing.T) {
							if err := holds(w, f); err != nil {
								t.Error(err)
							}
						})
					}
				}
			})
		}
	}
}

// TestEachRuleMatters takes one rule away, or changes it, and wants the check
// that is there for it to see that: a check that cannot fail proves nothing.
func TestEachRuleMatters(t *testing.T) {
	b, ok := backends(t)["nftables"]
	if !ok {
		t.Skip("no nftables")
	}
	handle := func(chain, words string) string {
		return fmt.Sprintf(`$(nft -a list chain inet weir %s | sed -n 's/.*%s.*handle //p' | head -1)`, chain, words)
	}
	gone := func(chain, words string) string {
		return "nft delete rule inet weir " + chain + " handle " + handle(chain, words)
	}
	for name, c := range map[string]struct {
		script string // breaks the rules
		sees   string // the check that must fail
	}{
		"out: redirect gone":         {gone("out", "redirect"), "outbound is captured"},
		"out: bypass gone":           {gone("out", "cgroupv2"), "outbound is captured"},
		"out: another destination":   {gone("out", "redirect") + `; nft add rule inet weir out tcp flags '& (fin|syn|rst|ack) == syn' redirect to :15006`, "a remote host has such ports too"},
		"out: bypass by uid":         {gone("out", "cgroupv2") + fmt.Sprintf("; nft insert rule inet weir out meta skuid %d return", proxyUID), "the proxy's own pass, and nobody else of its uid"},
		"out: lo is captured":        {gone("out", "oif"), "the pod to itself is direct"},
		"in: redirect gone":          {gone("in", "redirect"), "inbound is captured"},
		"in: lo is captured":         {gone("in", "iif") + "; " + gone("out", "oif"), "the pod to itself is direct"},
		"in: no look for a socket":   {gone("in", "redirect") + "; nft add rule inet weir in meta l4proto tcp redirect to :15006", "a closed port is refused"},
		"in: wildcards do not count": {gone("in", "redirect") + "; nft add rule inet weir in meta l4proto tcp socket wildcard 0 redirect to :15006", "inbound is captured"},
		"in: own ports captured":     {gone("in", "dport"), "the proxy's ports are refused from outside"},
		"in: UDP is captured":        {gone("in", "redirect") + `; nft add rule inet weir in meta l4proto { tcp, udp } socket transparent "<=" 1 redirect to :15006`, "UDP passes"},
		"guard: ports open":          {gone("guard", "dport"), "the proxy's ports are refused from inside"},
		"guard_out: gone":            {"nft flush chain inet weir guard_out", "what conntrack takes for a call of the proxy's is refused"},
		"guard_out: lo is guarded":   {gone("guard_out", "oif"), "the pod to itself is direct"},
		"guard_out: bypass gone":     {gone("guard_out", "cgroupv2"), "outbound is captured"},
		"guard: refuses too much":    {"nft insert rule inet weir guard tcp dport '{ 15001, 15006 }' reject with tcp reset", "outbound is captured"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, b, calm)
			w.apply(t, nil)
			w.pod.Run(t, "sh", "-ec", c.script)
			for _, f := range families {
				err := checks[c.sees](w, f)
				if err == nil {
					t.Errorf("%s: %q holds still", f.name, c.sees)
				}
				t.Logf("%s: %v", f.name, err)
			}
		})
	}
}

func TestDeleteRule(t *testing.T) {
	b, ok := backends(t)["nftables"]
	if !ok {
		t.Skip("no nftables")
	}
	w := newWorld(t, b, calm)
	if err := DeleteRule(w.pod.Path(), capture.OutTurned); err == nil {
		t.Error("no rules, and no error")
	}
	w.apply(t, nil)
	for _, f := range families {
		if err := checks["outbound is captured"](w, f); err != nil {
			t.Error(err)
		}
	}
	if err := DeleteRule(w.pod.Path(), capture.OutTurned); err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		err := serving(w.peer, ":8080", func() error { return w.refused(w.pod, at(f.peer, 8080)) })
		if err := errors.Join(err, checks["inbound is captured"](w, f)); err != nil {
			t.Error(err)
		}
	}
	if err := DeleteRule(w.pod.Path(), capture.OutTurned); err == nil || !strings.Contains(err.Error(), "out_turned") {
		t.Errorf("it was there twice: %v", err)
	}
}

// TestEstablishedConnectionsSurvive: rules that appear under live connections
// leave them alone, whoever speaks first, and rules that are replaced leave
// captured ones captured.
func TestEstablishedConnectionsSurvive(t *testing.T) {
	for name, b := range backends(t) {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, b, 1<<20)
			inPeer, err := serve(w.peer, ":8080")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(inPeer.close)
			inPod, err := serve(w.pod, ":8081")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(inPod.close)
			var before, after []*call
			open := func(into *[]*call, direct bool) {
				for _, f := range families {
					for _, end := range []func() (*call, error){
						func() (*call, error) { return dial(w.pod, at(f.peer, 8080)) },
						func() (*call, error) { return dial(w.peer, at(f.pod, 8081)) },
					} {
						c, err := end()
						if err != nil {
							t.Fatal(err)
						}
						t.Cleanup(func() { c.Close() }) // ahead of the servers, which wait for it
						if c.direct != direct {
							t.Errorf("%s: direct is %v", c.RemoteAddr(), c.direct)
						}
						*into = append(*into, c)
					}
				}
			}
			talk := func(when string, calls []*call) {
				for _, c := range calls {
					if err := c.talk(); err != nil {
						t.Errorf("%s: %s to %s: %v", when, c.local, c.RemoteAddr(), err)
					}
				}
			}
			open(&before, true)
			// A delayed ACK (40 ms) that meets half of what iptables does would
			// have the connection known, and the test would prove nothing.
			time.Sleep(100 * time.Millisecond)
			w.apply(t, nil)
			talk("rules arrived", before)
			open(&after, false)
			w.apply(t, func(s *capture.Spec) { s.ExcludeInboundPorts = []capture.PortRange{{First: 22, Last: 22}} })
			talk("rules replaced", append(before, after...))

			// Released: what was turned aside goes on, what comes is direct.
			w.change(t, capture.Released(spec(w.cgroup.Bypass)))
			talk("released", append(before, after...))
			open(&before, true)
			if err := w.refused(w.peer, at(families[0].pod, out)); err != nil {
				t.Errorf("released: a direct dial of the proxy's port: %v", err)
			}
			time.Sleep(300 * time.Millisecond)
			talk("a while after the release", append(before, after...))

			// And captured again.
			w.apply(t, nil)
			open(&after, false)
			talk("captured again", append(before, after...))
		})
	}
}

func TestExclusionsAndInclusions(t *testing.T) {
	ports := func(s string) []capture.PortRange {
		p, err := capture.ParsePorts(s)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	// What is served by the peer and by the pod, and whether it is captured.
	type expectation struct {
		port     uint16
		outbound bool
		other    bool // outbound, to the peer's other address
		inbound  bool
	}
	for name, c := range map[string]struct {
		change func(*capture.Spec)
		want   []expectation
	}{
		"ports excluded": {
			func(s *capture.Spec) {
				s.ExcludeInboundPorts, s.ExcludeOutboundPorts = ports("8090,8100-8110"), ports("8091,8100-8110")
			},
			[]expectation{{8090, true, true, false}, {8091, false, false, true}, {8105, false, false, false}, {8111, true, true, true}},
		},
		"ports included": {
			func(s *capture.Spec) {
				s.IncludeInboundPorts, s.IncludeOutboundPorts = ports("8090,8100-8110"), ports("8091,8100-8110")
				s.ExcludeInboundPorts, s.ExcludeOutboundPorts = ports("8105"), ports("8106")
			},
			[]expectation{{8090, false, false, true}, {8091, true, true, false}, {8105, true, true, false}, {8106, false, false, true}, {8111, false, false, false}},
		},
		"CIDRs excluded": {
			func(s *capture.Spec) {
				s.ExcludeOutboundCIDRs = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/32")}
			},
			[]expectation{{8090, true, false, true}},
		},
		"CIDRs included": {
			func(s *capture.Spec) {
				s.IncludeOutboundCIDRs = []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("2001:db8::/64")}
			},
			[]expectation{{8090, false, true, true}},
		},
	} {
		for backend, b := range backends(t) {
			t.Run(name+"/"+backend, func(t *testing.T) {
				w := newWorld(t, b, 1<<20)
				w.apply(t, c.change)
				for _, e := range c.want {
					for _, f := range families {
						if err := w.expect(f, e.port, e.outbound, e.other, e.inbound); err != nil {
							t.Errorf("%s, port %d: %v", f.name, e.port, err)
						}
					}
				}
				// What is not captured is as closed as it was, and no more.
				for _, f := range families {
					if err := errors.Join(checks["a closed port is refused"](w, f), w.refused(w.peer, at(f.pod, 8108)),
						checks["the proxy's ports are refused from outside"](w, f)); err != nil {
						t.Errorf("%s: %v", f.name, err)
					}
				}
			})
		}
	}
}

func (w *world) expect(f family, port uint16, outbound, other, inbound bool) error {
	try := func(captured bool, listener uint16, from, addr string) error {
		ns := w.pod
		if from == "peer" {
			ns = w.peer
		}
		if captured {
			return w.through(listener, ns, addr)
		}
		return w.direct(ns, addr)
	}
	listen := fmt.Sprintf(":%d", port)
	return serving(w.peer, listen, func() error {
		return serving(w.pod, listen, func() error {
			return errors.Join(
				try(outbound, out, "pod", at(f.peer, port)),
				try(other, out, "pod", at(f.other, port)),
				try(inbound, in, "peer", at(f.pod, port)),
			)
		})
	})
}

// TestCounters: the counters count connections, of both families together.
func TestCounters(t *testing.T) {
	for name, b := range backends(t) {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, b, 1<<20)
			w.apply(t, nil)
			want := make(map[string]uint64)
			for _, c := range []struct {
				check string
				steps map[string]uint64 // by family
			}{
				{"outbound is captured", map[string]uint64{capture.OutTurned: 2, capture.OutOwn: 2}},
				{"inbound is captured", map[string]uint64{capture.InTurned: 1}},
				{"the proxy's ports are refused from outside", map[string]uint64{capture.GuardPort: 2}},
				{"a closed port is refused", map[string]uint64{capture.GuardMissed: 1}},
				{"what conntrack takes for a call of the proxy's is refused", map[string]uint64{capture.OutOwn: 1, capture.GuardOut: 1}},
				{"the pod to itself is direct", nil},
				{"UDP passes", nil},
			} {
				for _, f := range families {
					if err := checks[c.check](w, f); err != nil {
						t.Error(err)
					}
				}
				for counter, n := range c.steps {
					want[counter] += 2 * n
				}
				got := w.counters(t)
				for _, counter := range capture.Rules(spec(w.cgroup.Bypass)).Counters {
					if n := got[counter]; n.Packets != want[counter] || (n.Packets > 0) != (n.Bytes > 0) {
						t.Errorf("after %q: %s is %+v, want %d packets", c.check, counter, n, want[counter])
					}
				}
			}
		})
	}
}
