package capture

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

func base() Spec {
	return Spec{
		OutboundPort: DefaultOutboundPort,
		InboundPort:  DefaultInboundPort,
		Bypass:       Bypass{Path: "weir", ID: 4711, Level: 1},
	}
}

func ports(t *testing.T, s string) []PortRange {
	t.Helper()
	p, err := ParsePorts(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func ids(t *testing.T, s string) []IDRange {
	t.Helper()
	p, err := ParseIDs(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func prefixes(s ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func TestRulesGolden(t *testing.T) {
	for name, change := range map[string]func(*Spec){
		"default": func(*Spec) {},
		"client":  func(s *Spec) { s.KeepClient = true },
		"excludes": func(s *Spec) {
			s.ExcludeInboundPorts = ports(t, "9090,22,8000-8010,8005-8020")
			s.ExcludeOutboundPorts = ports(t, "5432,60000-65535")
		},
		"includes": func(s *Spec) {
			s.IncludeInboundPorts = ports(t, "80,443")
			s.IncludeOutboundPorts = ports(t, "80,8080-8090")
			s.ExcludeInboundPorts = ports(t, "443")
		},
		"cidrs": func(s *Spec) {
			s.ExcludeOutboundCIDRs = prefixes("169.254.169.254/32", "fd00:ec2::254/128", "10.9.8.7/24", "10.9.8.0/25")
			s.IncludeOutboundCIDRs = prefixes("2001:db8::/32", "10.0.0.0/8", "::ffff:192.0.2.0/120")
		},
		"owners": func(s *Spec) {
			s.ExcludeOutboundUIDs = ids(t, "1000-1999,0,1500-2500")
			s.ExcludeOutboundGIDs = ids(t, "4294967294,7")
		},
		"interfaces": func(s *Spec) {
			s.ExcludeInterfaces = []string{"net2", "eth1.100", "net2"}
			s.ExcludeInboundPorts = ports(t, "22")
		},
		"quic": func(s *Spec) { s.RefuseQUIC = true },
		"quic-partly": func(s *Spec) {
			s.RefuseQUIC = true
			s.ExcludeInterfaces = []string{"net1"}
			s.ExcludeOutboundUIDs = ids(t, "33")
			s.ExcludeOutboundPorts = ports(t, "443")
			s.ExcludeOutboundCIDRs = prefixes("10.9.0.0/16")
			s.IncludeOutboundCIDRs = prefixes("2001:db8::/32", "10.0.0.0/8")
		},
		"other-proxy": func(s *Spec) {
			s.OutboundPort, s.InboundPort = 25006, 25001
			s.Bypass = Bypass{Path: "kubelet/weir", ID: 42, Level: 2}
		},
	} {
		t.Run(name, func(t *testing.T) {
			spec := base()
			change(&spec)
			if err := spec.Validate(); err != nil {
				t.Fatal(err)
			}
			got := Rules(spec).String()
			golden := filepath.Join("testdata", name+".nft")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("rules differ from %s (-want +got), see -update:\n%s", golden, diff)
			}
		})
	}
}

// TestRulesDoNotDependOnOrder: equal meaning gives equal rules, or a second
// apply would replace what is right.
func TestRulesDoNotDependOnOrder(t *testing.T) {
	a, b := base(), base()
	a.ExcludeInboundPorts = ports(t, "22,8000-8010,8005")
	b.ExcludeInboundPorts = ports(t, "8000-8010,22,22")
	a.ExcludeOutboundCIDRs = prefixes("10.0.0.0/8", "fd00::/8", "10.1.2.3/32")
	b.ExcludeOutboundCIDRs = prefixes("fd00::/8", "10.200.0.1/8")
	a.ExcludeOutboundUIDs, b.ExcludeOutboundUIDs = ids(t, "7,3-5,4"), ids(t, "3-4,4-5,7,7")
	a.ExcludeInterfaces, b.ExcludeInterfaces = []string{"net1", "a", "net1"}, []string{"a", "net1"}
	if diff := cmp.Diff(Rules(a).String(), Rules(b).String()); diff != "" {
		t.Error(diff)
	}
}

// TestRulesLeaveTheSpecAlone: Rules is pure, its caller's slices too.
func TestRulesLeaveTheSpecAlone(t *testing.T) {
	s := base()
	s.ExcludeInboundPorts = ports(t, "99,22,22-23")
	Rules(s)
	if diff := cmp.Diff(ports(t, "99,22,22-23"), s.ExcludeInboundPorts); diff != "" {
		t.Error(diff)
	}
}

func TestValidate(t *testing.T) {
	for name, change := range map[string]func(*Spec){
		"no outbound port": func(s *Spec) { s.OutboundPort = 0 },
		"no inbound port":  func(s *Spec) { s.InboundPort = 0 },
		"one port twice":   func(s *Spec) { s.InboundPort = s.OutboundPort },
		"no cgroup":        func(s *Spec) { s.Bypass.ID = 0 },
		"no path":          func(s *Spec) { s.Bypass.Path = "" },
		"no level":         func(s *Spec) { s.Bypass.Level = 0 },
		"no interface":     func(s *Spec) { s.ExcludeInterfaces = []string{"eth0", ""} },
		"no user":          func(s *Spec) { s.ExcludeOutboundUIDs = []IDRange{{0, MaxID + 1}} },
		"no group":         func(s *Spec) { s.ExcludeOutboundGIDs = []IDRange{{2, 1}} },
	} {
		s := base()
		change(&s)
		if s.Validate() == nil {
			t.Errorf("%s: valid", name)
		}
	}
	if err := base().Validate(); err != nil {
		t.Error(err)
	}
}

func TestParsePorts(t *testing.T) {
	for in, want := range map[string][]PortRange{
		"80":               {{80, 80}},
		"80,8000-8010":     {{80, 80}, {8000, 8010}},
		" 80 , 443 ":       {{80, 80}, {443, 443}},
		"1-65535":          {{1, 65535}},
		"":                 nil,
		"80,":              nil,
		"0":                nil,
		"65536":            nil,
		"http":             nil,
		"90-80":            nil,
		"80-":              nil,
		"-80":              nil,
		"80-90-100":        nil,
		"+80":              nil,
		"80;443":           nil,
		"８０":               nil,
		"80 - 90":          nil,
		"0x50":             nil,
		"80-8_0":           nil,
		"0000000000000080": {{80, 80}},
	} {
		got, err := ParsePorts(in)
		if (err != nil) != (want == nil) {
			t.Errorf("%q: error %v", in, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%q: %s", in, diff)
		}
	}
}

func TestParseIDs(t *testing.T) {
	for in, want := range map[string][]IDRange{
		"0":                 {{0, 0}},
		"0, 1000-1999":      {{0, 0}, {1000, 1999}},
		"4294967294":        {{MaxID, MaxID}},
		"4294967295":        nil, // (uid_t)-1
		"4294967296":        nil,
		"0-4294967295":      nil,
		"":                  nil,
		"root":              nil,
		"-1":                nil,
		"2-1":               nil,
		"1,":                nil,
		"1000:1001":         nil,
		"18446744073709551": nil,
	} {
		got, err := ParseIDs(in)
		if (err != nil) != (want == nil) {
			t.Errorf("%q: error %v", in, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%q: %s", in, diff)
		}
	}
}

func TestParseInterfaces(t *testing.T) {
	for in, want := range map[string][]string{
		"net1":             {"net1"},
		"net1, eth0.100":   {"net1", "eth0.100"},
		"veth-a_b@c+":      {"veth-a_b@c+"},
		"123456789012345":  {"123456789012345"},
		"1234567890123456": nil,
		"":                 nil,
		"net1,":            nil,
		".":                nil,
		"..":               nil,
		"a b":              nil,
		"a/b":              nil,
		"eth0:1":           nil,
		"eth*":             nil,
		`e"th`:             nil,
		`e\th`:             nil,
		"ethé":             nil,
		"eth\x00":          nil,
	} {
		got, err := ParseInterfaces(in)
		if (err != nil) != (want == nil) {
			t.Errorf("%q: error %v", in, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%q: %s", in, diff)
		}
	}
}

// FuzzParsePorts: whatever is accepted prints as something that means the same.
func FuzzParsePorts(f *testing.F) {
	for _, s := range []string{"80", "80,8000-8010", " 1 ,2", "65535-65535", "-", ",", "9-1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		got, err := ParsePorts(in)
		if err != nil {
			return
		}
		if len(got) == 0 {
			t.Fatalf("%q: no ports and no error", in)
		}
		for _, r := range got {
			if r.First == 0 || r.First > r.Last {
				t.Fatalf("%q: %v", in, r)
			}
		}
		again, err := ParsePorts(join(got))
		if err != nil {
			t.Fatalf("%q printed as %q: %v", in, join(got), err)
		}
		if diff := cmp.Diff(got, again); diff != "" {
			t.Fatal(diff)
		}
	})
}
