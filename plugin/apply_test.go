package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/weirmesh/weir/plugin/capture"
	"golang.org/x/sys/unix"
)

// fakeBackend is a backend that fails as it is told to.
type fakeBackend struct {
	name  string
	fails error
	calls *[]string
}

func (f fakeBackend) Name() string { return f.name }
func (f fakeBackend) Apply(capture.Ruleset) (bool, error) {
	*f.calls = append(*f.calls, f.name)
	return f.fails == nil, f.fails
}
func (f fakeBackend) Delete() error                              { return nil }
func (f fakeBackend) Difference(capture.Ruleset) (string, error) { return "", nil }
func (f fakeBackend) Read() (capture.State, error)               { return capture.State{}, nil }

// TestProbe: another backend is tried only where the kernel cannot hold the
// rules at all, not where something went wrong.
func TestProbe(t *testing.T) {
	broken := errors.New("broken")
	for name, c := range map[string]struct {
		first, second error
		calls         string
		used          string
	}{
		"the first works": {nil, nil, "a", "a"},
		"no nf_tables":    {unix.EPROTONOSUPPORT, nil, "a b", "b"},
		"no cgroup match": {unix.EOPNOTSUPP, nil, "a b", "b"},
		"neither":         {unix.EOPNOTSUPP, broken, "a b", ""},
		"the first fails": {broken, nil, "a", ""},
		"not allowed":     {unix.EPERM, nil, "a", ""},
	} {
		t.Run(name, func(t *testing.T) {
			var calls []string
			target := &target{backends: []backend{
				fakeBackend{"a", c.first, &calls}, fakeBackend{"b", c.second, &calls},
			}}
			_, err := target.probe(capture.Ruleset{})
			if got := strings.Join(calls, " "); got != c.calls {
				t.Errorf("tried %q, want %q", got, c.calls)
			}
			used := ""
			if target.used != nil {
				used = target.used.Name()
			}
			if used != c.used || (err == nil) != (c.used != "") {
				t.Errorf("used %q, error %v", used, err)
			}
			for _, want := range []error{c.first, c.second} {
				if c.used == "" && want != nil && strings.Contains(c.calls, "b") && !errors.Is(err, want) {
					t.Errorf("%v does not say %v", err, want)
				}
			}
		})
	}
}

// TestABackendStays: rules of a backend that would not be chosen any more are put
// right, released and taken out by that backend, and there are never two sets.
func TestABackendStays(t *testing.T) {
	ns := newPod(t)
	spec, err := newSpec(t).ToSpec()
	if err != nil {
		t.Fatal(err)
	}
	does := func(backend, what string) done {
		t.Helper()
		got, err := task{Netns: ns.Path(), Do: what, Spec: spec}.run(conf{Backend: backend, LockDir: t.TempDir()}, "c")
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if rules := ruleset(t, ns); strings.Contains(rules, "table inet weir") {
			t.Errorf("%s puts nftables' rules beside those of iptables:\n%s", what, rules)
		}
		return got
	}
	if got := does(backendIPTables, doApply); got.Backend != "iptables" {
		t.Skipf("no iptables: %+v", got)
	}
	if got := does(backendAuto, doCompare); got.Difference != "" || got.Backend != "iptables" {
		t.Errorf("compared: %+v", got)
	}
	for what, breaks := range map[string]string{
		"a rule":   "iptables -t nat -D PREROUTING 1",
		"the rest": "ip link set lo down",
	} {
		ns.Run(t, "sh", "-ec", breaks)
		if got := does(backendAuto, doApply); got.Difference == "" || got.Backend != "iptables" {
			t.Errorf("%s broken: %+v", what, got)
		}
	}
	if got := does(backendAuto, doRelease); got.Backend != "iptables" {
		t.Errorf("released: %+v", got)
	}
	does(backendAuto, doDelete)
	if left := ns.Run(t, "sh", "-c", "iptables-save; ip6tables-save"); strings.Contains(strings.ToLower(left), "weir") {
		t.Errorf("left:\n%s", left)
	}
}
