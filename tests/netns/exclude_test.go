package netns

import (
	"errors"
	"fmt"
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

// What the optional rules promise, over every backend and family. Each part has
// checks of its own, and TestEachOptionalRuleMatters breaks what they look at.

const (
	excludedUID   = 34567
	excludedGID   = 45678
	excludedIface = "net1"
)

// second are the ends of the excluded interface's wire.
var second = map[string]family{
	"IPv4": {name: "IPv4", pod: netip.MustParseAddr("10.78.0.2"), peer: netip.MustParseAddr("10.78.0.1")},
	"IPv6": {name: "IPv6", pod: netip.MustParseAddr("fd78::2"), peer: netip.MustParseAddr("fd78::1")},
}

// options switches on every optional rule.
func options(s *capture.Spec) {
	s.ExcludeOutboundUIDs = []capture.IDRange{{First: excludedUID - 1, Last: excludedUID}, {First: 34000, Last: 34000}}
	s.ExcludeOutboundGIDs = []capture.IDRange{{First: excludedGID, Last: excludedGID}, {First: 46000, Last: 46999}}
	s.ExcludeInterfaces = []string{excludedIface, "absent0"}
	s.RefuseQUIC = true
}

// newSecondWire adds the excluded interface to a world.
func (w *world) newSecondWire(t testing.TB) {
	t.Helper()
	w.pod.Run(t, "ip", "link", "add", excludedIface, "type", "veth", "peer", "name", excludedIface, "netns", w.peer.Path())
	for _, f := range second {
		bits := 24
		if f.pod.Is6() {
			bits = 64
		}
		w.pod.Run(t, "ip", "addr", "add", fmt.Sprintf("%s/%d", f.pod, bits), "dev", excludedIface, "nodad")
		w.peer.Run(t, "ip", "addr", "add", fmt.Sprintf("%s/%d", f.peer, bits), "dev", excludedIface, "nodad")
	}
	w.pod.Run(t, "ip", "link", "set", excludedIface, "up")
	w.peer.Run(t, "ip", "link", "set", excludedIface, "up")
	for _, f := range second {
		await(t, w.pod, at(f.peer, 1))
		await(t, w.peer, at(f.pod, 1))
	}
}

// optional are checks that hold in a world with the optional rules.
var optional = map[string]check{
	"excluded users are not captured, others are": func(w *world, f family) error {
		return w.owners(f, map[uint32]bool{excludedUID: false, excludedUID - 1: false, 34000: false, excludedUID + 1: true, 34001: true, 0: true},
			func(id uint32) *syscall.Credential { return &syscall.Credential{Uid: id, Gid: 1} })
	},
	"excluded groups are not captured, others are": func(w *world, f family) error {
		return w.owners(f, map[uint32]bool{excludedGID: false, 46000: false, 46999: false, excludedGID + 1: true, 47000: true},
			func(id uint32) *syscall.Credential { return &syscall.Credential{Uid: 1, Gid: id} })
	},
	"a supplementary group does not count": func(w *world, f family) error {
		return w.owners(f, map[uint32]bool{excludedGID: true},
			func(id uint32) *syscall.Credential {
				return &syscall.Credential{Uid: 1, Gid: 1, Groups: []uint32{id}}
			})
	},
	"what leaves by an excluded interface is not captured": func(w *world, f family) error {
		return serving(w.peer, ":8080", func() error {
			return errors.Join(w.direct(w.pod, at(second[f.name].peer, 8080)), w.through(out, w.pod, at(f.peer, 8080)))
		})
	},
	"what enters by an excluded interface is not captured": func(w *world, f family) error {
		return serving(w.pod, ":8081", func() error {
			return errors.Join(w.direct(w.peer, at(second[f.name].pod, 8081)), w.through(in, w.peer, at(f.pod, 8081)))
		})
	},
	"a closed port is refused by every interface": func(w *world, f family) error {
		return errors.Join(w.refused(w.peer, at(second[f.name].pod, 8083)), w.refused(w.peer, at(f.pod, 8083)))
	},
	"the proxy's ports are refused by every interface": func(w *world, f family) error {
		s := second[f.name]
		return errors.Join(w.refused(w.peer, at(s.pod, in)), w.refused(w.peer, at(s.pod, out)), w.refused(w.peer, at(f.pod, in)))
	},
	"QUIC is refused": func(w *world, f family) error {
		return w.answering(f.peer, 443, func() error {
			for range 3 {
				if err := w.sendAs(nil, false, at(f.peer, 443)); !errors.Is(err, syscall.ECONNREFUSED) {
					return fmt.Errorf("UDP to port 443: %w", orAnswered(err))
				}
			}
			return nil
		})
	},
	"QUIC of the proxy passes": func(w *world, f family) error {
		return w.answering(f.peer, 443, func() error { return w.sendAs(nil, true, at(f.peer, 443)) })
	},
	"QUIC of an excluded user passes": func(w *world, f family) error {
		return w.answering(f.peer, 443, func() error {
			return w.sendAs(&syscall.Credential{Uid: excludedUID, Gid: 1}, false, at(f.peer, 443))
		})
	},
	"QUIC of an excluded group passes": func(w *world, f family) error {
		return w.answering(f.peer, 443, func() error {
			return w.sendAs(&syscall.Credential{Uid: 1, Gid: excludedGID}, false, at(f.peer, 443))
		})
	},
	"QUIC by an excluded interface passes": func(w *world, f family) error {
		return w.answering(second[f.name].peer, 443, func() error { return w.sendAs(nil, false, at(second[f.name].peer, 443)) })
	},
	"other UDP passes": func(w *world, f family) error {
		return w.answering(f.peer, 444, func() error { return w.sendAs(nil, false, at(f.peer, 444)) })
	},
	"TCP to port 443 is captured": func(w *world, f family) error {
		return serving(w.peer, ":443", func() error { return w.through(out, w.pod, at(f.peer, 443)) })
	},
	"QUIC to the pod, and of the pod to itself, passes": func(w *world, f family) error {
		l, err := answer(w.pod.Do, at(netip.IPv6Unspecified(), 443))
		if err != nil {
			return err
		}
		defer l.Close()
		var outside error
		w.peer.Do(func() { outside = sendUDP(at(f.pod, 443)) })
		return errors.Join(outside, w.sendAs(nil, false, at(f.pod, 443)), w.sendAs(nil, false, at(f.own, 443)))
	},
}

// owners dials as each of ids and wants it to be captured or not.
func (w *world) owners(f family, ids map[uint32]bool, who func(uint32) *syscall.Credential) error {
	return serving(w.peer, ":8080", func() error {
		var wrong []error
		for id, want := range ids {
			got, err := w.dialAs(who(id), at(f.peer, 8080))
			if err == nil && got != want {
				err = fmt.Errorf("captured is %v", got)
			}
			if err != nil {
				wrong = append(wrong, fmt.Errorf("%d: %w", id, err))
			}
		}
		return errors.Join(wrong...)
	})
}

// answering runs f while the peer answers datagrams.
func (w *world) answering(addr netip.Addr, port uint16, f func() error) error {
	l, err := answer(w.peer.Do, at(addr, port))
	if err != nil {
		return err
	}
	defer l.Close()
	return f()
}

// answer sends each datagram that comes to addr back, until it is closed.
func answer(within func(func()), addr string) (net.PacketConn, error) {
	var l net.PacketConn
	var err error
	within(func() { l, err = net.ListenPacket("udp", addr) })
	if err != nil {
		return nil, err
	}
	go echoUDP(l)
	return l, nil
}

func echoUDP(l net.PacketConn) {
	buf := make([]byte, 1500)
	for {
		n, from, err := l.ReadFrom(buf)
		if err != nil {
			return
		}
		_, _ = l.WriteTo(buf[:n], from)
	}
}

// sendUDP sends a datagram and waits for its echo. A filter that drops what it
// answers with an ICMP error has the first call fail with EPERM; the next ones
// say what the ICMP error said.
func sendUDP(addr string) error {
	c, err := net.Dial("udp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Second))
	if _, err := c.Write([]byte("ping")); err != nil && !errors.Is(err, syscall.EPERM) {
		return err
	}
	buf := make([]byte, 16)
	n, err := c.Read(buf)
	if err == nil && string(buf[:n]) != "ping" {
		return fmt.Errorf("%q came back", buf[:n])
	}
	return err
}

func orAnswered(err error) error {
	if err == nil {
		return errors.New("it was answered")
	}
	return err
}

// sendMain is sendUDP as a process; that the datagram was refused is exit code 7.
func sendMain(addr string) int {
	err := sendUDP(addr)
	switch {
	case err == nil:
		return 0
	case errors.Is(err, syscall.ECONNREFUSED):
		return refusedCode
	}
	fmt.Println(err)
	return 1
}

const refusedCode = 7

// sendAs sends a datagram from a process of the pod that runs as somebody or, as
// proxy, in the proxy's cgroup. syscall.ECONNREFUSED is what the process got.
func (w *world) sendAs(who *syscall.Credential, proxy bool, addr string) error {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), asSender+"="+addr)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: who}
	if proxy {
		dir, err := os.Open(w.cgroup.Dir)
		if err != nil {
			return err
		}
		defer dir.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	}
	var said []byte
	var err error
	w.pod.Do(func() { said, err = cmd.CombinedOutput() })
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() == refusedCode {
		return syscall.ECONNREFUSED
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %s", addr, err, said)
	}
	return nil
}

func TestOptionalRules(t *testing.T) {
	for name, b := range backends(t) {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, b, 1<<20)
			w.newSecondWire(t)
			w.apply(t, options)
			for what, holds := range optional {
				for _, f := range families {
					t.Run(what+"/"+f.name, func(t *testing.T) {
						if err := holds(w, f); err != nil {
							t.Error(err)
						}
					})
				}
			}
			before := w.counters(t)[capture.QUICRefused].Packets
			if err := optional["QUIC is refused"](w, families[0]); err != nil {
				t.Error(err)
			}
			if n := w.counters(t)[capture.QUICRefused].Packets - before; n != 3 {
				t.Errorf("%s counted %d datagrams, not 3", capture.QUICRefused, n)
			}

			// Released, nothing is refused any more.
			released := spec(w.cgroup.Bypass)
			options(&released)
			w.change(t, capture.Released(released))
			for _, f := range families {
				if err := w.answering(f.peer, 443, func() error { return w.sendAs(nil, false, at(f.peer, 443)) }); err != nil {
					t.Errorf("released: %v", err)
				}
			}

			// Without the options everything is as in any other world.
			w.apply(t, nil)
			for what := range optional {
				if !strings.HasSuffix(what, "passes") && !strings.HasPrefix(what, "TCP") {
					continue
				}
				for _, f := range families {
					if err := optional[what](w, f); err != nil {
						t.Errorf("taken back: %s, %s: %v", what, f.name, err)
					}
				}
			}
			for _, what := range []string{"excluded users are not captured, others are", "what enters by an excluded interface is not captured", "QUIC is refused"} {
				if optional[what](w, families[0]) == nil {
					t.Errorf("taken back: %q holds still", what)
				}
			}
		})
	}
}

// TestQUICWhereTCPIsCaptured: where only some addresses are captured, QUIC to the
// others passes.
func TestQUICWhereTCPIsCaptured(t *testing.T) {
	for name, b := range backends(t) {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, b, 1<<20)
			for _, change := range []func(*capture.Spec){
				func(s *capture.Spec) {
					s.IncludeOutboundCIDRs = []netip.Prefix{netip.MustParsePrefix("10.77.0.0/24"), netip.MustParsePrefix("fd77::/64")}
				},
				func(s *capture.Spec) {
					s.ExcludeOutboundCIDRs = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/32")}
				},
			} {
				w.apply(t, func(s *capture.Spec) { change(s); s.RefuseQUIC = true })
				for _, f := range families {
					if err := optional["QUIC is refused"](w, f); err != nil {
						t.Errorf("%s: %v", f.name, err)
					}
					if err := w.answering(f.other, 443, func() error { return w.sendAs(nil, false, at(f.other, 443)) }); err != nil {
						t.Errorf("%s: %v", f.name, err)
					}
				}
			}
		})
	}
}

// TestEachOptionalRuleMatters is TestEachRuleMatters for the optional rules.
func TestEachOptionalRuleMatters(t *testing.T) {
	b, ok := backends(t)["nftables"]
	if !ok {
		t.Skip("no nftables")
	}
	gone := func(chain, words string) string {
		return fmt.Sprintf(`nft delete rule inet weir %s handle $(nft -a list chain inet weir %[1]s | sed -n 's/.*%s.*handle //p' | head -1)`, chain, words)
	}
	refuse := "; nft add rule inet weir guard_out udp dport 443 reject with icmpx "
	w := newWorld(t, b, 1<<20)
	w.newSecondWire(t)
	for name, c := range map[string]struct{ script, sees string }{
		"out: users gone":               {gone("out", "skuid"), "excluded users are not captured, others are"},
		"out: all users":                {"nft insert rule inet weir out meta skuid '>= 0' return", "excluded users are not captured, others are"},
		"out: groups gone":              {gone("out", "skgid"), "excluded groups are not captured, others are"},
		"out: all groups":               {"nft insert rule inet weir out meta skgid '>= 0' return", "a supplementary group does not count"},
		"out: interface gone":           {gone("out", "oifname.*"+excludedIface), "what leaves by an excluded interface is not captured"},
		"out: every interface":          {"nft insert rule inet weir out oifname != lo return", "what leaves by an excluded interface is not captured"},
		"in: interface gone":            {gone("in", "iifname.*"+excludedIface), "what enters by an excluded interface is not captured"},
		"in: every interface":           {"nft insert rule inet weir in iifname != lo return", "what enters by an excluded interface is not captured"},
		"guard: interface gone":         {gone("guard", "iifname.*"+excludedIface), "what enters by an excluded interface is not captured"},
		"guard: interface let by whole": {"nft insert rule inet weir guard iifname " + excludedIface + " return", "the proxy's ports are refused by every interface"},
		"quic: reject gone":             {gone("guard_out", "reject"), "QUIC is refused"},
		"quic: silent":                  {gone("guard_out", "reject") + "; nft add rule inet weir guard_out udp dport 443 drop", "QUIC is refused"},
		"quic: another ICMP error":      {gone("guard_out", "reject") + refuse + "admin-prohibited", "QUIC is refused"},
		"quic: all ports":               {"nft add rule inet weir guard_out meta l4proto udp reject", "other UDP passes"},
		"out: not port 443":             {"nft insert rule inet weir out tcp dport 443 return", "TCP to port 443 is captured"},
		"guard: silent":                 {"nft insert rule inet weir guard iifname " + excludedIface + " drop", "a closed port is refused by every interface"},
		"quic: bypass gone":             {gone("guard_out", "cgroupv2"), "QUIC of the proxy passes"},
		"quic: lo gone":                 {gone("guard_out", "oif "), "QUIC to the pod, and of the pod to itself, passes"},
		"quic: users gone":              {gone("guard_out", "skuid"), "QUIC of an excluded user passes"},
		"quic: groups gone":             {gone("guard_out", "skgid"), "QUIC of an excluded group passes"},
		"quic: interface gone":          {gone("guard_out", "oifname.*"+excludedIface), "QUIC by an excluded interface passes"},
		"quic: sources too":             {"nft add rule inet weir guard_out udp sport 443 reject", "QUIC to the pod, and of the pod to itself, passes"},
	} {
		t.Run(name, func(t *testing.T) {
			w.apply(t, options) // whole again
			w.pod.Run(t, "sh", "-ec", c.script)
			for _, f := range families {
				err := optional[c.sees](w, f)
				if err == nil {
					t.Errorf("%s: %q holds still", f.name, c.sees)
				}
				t.Logf("%s: %v", f.name, err)
			}
		})
	}
}
