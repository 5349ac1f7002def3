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
