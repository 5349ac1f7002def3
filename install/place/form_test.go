package place

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/install/conflist"
)

const (
	bare     = `{"cniVersion":"1.1.0","name":"n"}`
	inlined  = `{"cniVersion":"1.0.0","name":"n","loadOnlyInlinedPlugins":true,"plugins":[{"type":"p"}]}`
	unusable = `{"cniVersion":"1.0.0","name":"../n","plugins":[{"type":"p"}]}`
	ancient  = `{"cniVersion":"0.2.0","name":"n","plugins":[{"type":"p"}]}`
	dropIn   = "n/zz-weir-cni.conf"
)

func TestHealDropIn(t *testing.T) {
	for _, tt := range []struct {
		name         string
		files, after map[string]string
		err          error
	}{
		{"beside the list", map[string]string{"10-a.conflist": list}, map[string]string{"10-a.conflist": list, dropIn: "chained"}, nil},
		{
			"behind the list's own, which has no others",
			map[string]string{"10-a.conflist": bare, "n/10-p.conf": `{"type":"p"}`},
			map[string]string{"10-a.conflist": bare, "n/10-p.conf": `{"type":"p"}`, dropIn: "chained"}, nil,
		},
		{"not alone", map[string]string{"10-a.conflist": bare}, map[string]string{"10-a.conflist": bare}, conflist.ErrAlone},
		{"no version that we speak", map[string]string{"10-a.conflist": ancient}, map[string]string{"10-a.conflist": ancient}, conflist.ErrVersion},
		{"an entry goes", map[string]string{"10-a.conflist": chainedList}, map[string]string{"10-a.conflist": list, dropIn: "chained"}, nil},
		{
			"other options",
			map[string]string{"10-a.conflist": list, dropIn: ours}, map[string]string{"10-a.conflist": list, dropIn: "chained"}, nil,
		},
		{
			"another network's goes, and its folder only if it is empty",
			map[string]string{"10-a.conflist": list, "o/zz-weir-cni.conf": ours, "p/zz-weir-cni.conf": ours, "p/x.conf": single},
			map[string]string{"10-a.conflist": list, dropIn: "chained", "p/x.conf": single}, nil,
		},
		{"a single plugin reads none", map[string]string{"10-a.conf": single}, map[string]string{"10-a-weir.conflist": "chained", "10-a.conf": single}, nil},
		{"a list that says so reads none", map[string]string{"10-a.conflist": inlined}, map[string]string{"10-a.conflist": "chained"}, nil},
		{"a name that is no folder's", map[string]string{"10-a.conflist": unusable}, map[string]string{"10-a.conflist": "chained"}, nil},
		{"goes with the primary", map[string]string{dropIn: ours}, map[string]string{}, ErrNoPrimary},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := testChain(t, tt.files)
			c.DropIn = true
			if _, err := c.Heal(); !errors.Is(err, tt.err) {
				t.Fatalf("got error %v, want %v", err, tt.err)
			}
			if diff := cmp.Diff(tt.after, look(t, c.Dir)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if tt.err != nil {
				return
			}
			if _, err := c.Chained(); err != nil {
				t.Error(err)
			}
			if again, err := c.Heal(); err != nil || again.Changed {
				t.Errorf("a second Heal: changed %v, %v", again.Changed, err)
			}
			c.expectLast(t)
			if _, err := c.Remove(); err != nil {
				t.Fatal(err)
			}
			for name, content := range look(t, c.Dir) {
				if content == "chained" || strings.Contains(content, conflist.PluginType) {
					t.Errorf("after Remove weir-cni is in %s", name)
				}
			}
		})
	}
}

// expectLast checks that libcni runs weir-cni last, and once.
func (c Chain) expectLast(t *testing.T) {
	t.Helper()
	files, err := libcni.ConfFiles(c.Dir, []string{".conflist"})
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	list, err := libcni.NetworkConfFromFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	var types []string
	for _, p := range list.Plugins {
		types = append(types, p.Network.Type)
	}
	if slices.Index(types, conflist.PluginType) != len(types)-1 || len(types) < 2 {
		t.Errorf("libcni runs %q", types)
	}
}

// runtime is one that reads drop-ins, or not, as libcni does; or does not answer.
type runtime struct {
	dir    string
	reads  bool
	silent bool
}

func (r *runtime) loaded(context.Context) ([]string, error) {
	if r.silent {
		return nil, errors.New("no answer")
	}
	types := []string{"loopback"}
	files, err := libcni.ConfFiles(r.dir, []string{".conflist"})
	if err != nil || len(files) == 0 {
		return types, err
	}
	content, err := os.ReadFile(files[0])
	if err != nil {
		return nil, err
	}
	list, err := libcni.NetworkConfFromBytes(content)
	if r.reads {
		list, err = libcni.NetworkConfFromFile(files[0])
	}
	if err != nil {
		return nil, err
	}
	for _, p := range list.Plugins {
		types = append(types, p.Network.Type)
	}
	return types, nil
}

func TestAuto(t *testing.T) {
	entry, file := map[string]string{"10-a.conflist": "chained"}, map[string]string{"10-a.conflist": list, dropIn: "chained"}
	for _, tt := range []struct {
		name    string
		files   map[string]string
		runtime *runtime
		after   map[string]string
	}{
		{"it reads drop-ins", map[string]string{"10-a.conflist": list}, &runtime{reads: true}, file},
		{"it has one already", map[string]string{"10-a.conflist": list, dropIn: ours}, &runtime{reads: true}, file},
		{"it reads none", map[string]string{"10-a.conflist": list}, &runtime{}, entry},
		{"it reads none any more", map[string]string{"10-a.conflist": list, dropIn: ours}, &runtime{}, entry},
		{"it does not answer", map[string]string{"10-a.conflist": list}, &runtime{silent: true}, entry},
		{"it does not answer any more", map[string]string{"10-a.conflist": list, dropIn: ours}, &runtime{silent: true}, entry},
		{"it cannot be asked", map[string]string{"10-a.conflist": list}, nil, entry},
		{"an entry stays one", map[string]string{"10-a.conflist": chainedList}, &runtime{reads: true}, entry},
		{"one that was killed between the two", map[string]string{"10-a.conflist": chainedList, dropIn: ours}, &runtime{reads: true}, entry},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := testChain(t, tt.files)
			k, _ := testKeeper(t, c)
			k.Form = Auto
			if tt.runtime != nil {
				tt.runtime.dir = c.Dir
				k.Loaded = tt.runtime.loaded
			}
			for range 2 {
				heal(t, k)
				if diff := cmp.Diff(tt.after, look(t, c.Dir)); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
			}
		})
	}
}

// heal does it without waiting as long as the keeper does.
func heal(t *testing.T, k *Keeper) Healed {
	t.Helper()
	var healed Healed
	synctest.Test(t, func(t *testing.T) {
		var err error
		if healed, err = k.chain(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	return healed
}

// TestAutoFollowsTheRuntime: it was loaded once, and is asked again.
func TestAutoFollowsTheRuntime(t *testing.T) {
	c := testChain(t, map[string]string{"10-a.conflist": list})
	k, _ := testKeeper(t, c)
	r := &runtime{dir: c.Dir, reads: true}
	k.Form, k.Loaded = Auto, r.loaded
	expect := func(want string) {
		t.Helper()
		k.form.asked = time.Time{}
		if healed := heal(t, k); healed.File != filepath.Join(c.Dir, want) {
			t.Errorf("in %s, want %s", healed.File, want)
		}
	}
	expect(dropIn)
	r.silent = true // it restarts
	expect(dropIn)
	r.silent, r.reads = false, false // as another version
	expect("10-a.conflist")
	r.reads = true
	expect("10-a.conflist")
}

// TestKeeperKeepsDropIn: in the folder that the runtime does not watch, too. That
// the primary writes its list is nothing to heal.
func TestKeeperKeepsDropIn(t *testing.T) {
	c := testChain(t, map[string]string{"10-a.conflist": list})
	k, log := testKeeper(t, c)
	r := &runtime{dir: c.Dir, reads: true}
	k.Form, k.Loaded = Auto, r.loaded
	stop := run(t, k)
	waitFile(t, c, dropIn)
	if err := os.Remove(filepath.Join(c.Dir, dropIn)); err != nil {
		t.Fatal(err)
	}
	waitFile(t, c, dropIn)
	for _, text := range []string{list + " ", list} {
		primaryWrites(t, filepath.Join(c.Dir, "10-a.conflist"), []byte(text))
		if _, err := c.Chained(); err != nil {
			t.Error(err)
		}
	}
	renamed := strings.Replace(list, `"n"`, `"other"`, 1)
	primaryWrites(t, filepath.Join(c.Dir, "10-a.conflist"), []byte(renamed))
	waitFile(t, c, "other/zz-weir-cni.conf")
	for end := time.Now().Add(time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(filepath.Join(c.Dir, "n")); err != nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the old network's drop-in is still there")
		}
	}
	stop()
	if n := strings.Count(log.String(), "msg=chained"); n != 3 {
		t.Errorf("chained %d times, want 3: what the primary wrote was nothing to heal\n%s", n, log)
	}
}

func waitFile(t *testing.T, c Chain, name string) {
	t.Helper()
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if _, err := os.Stat(filepath.Join(c.Dir, name)); err == nil {
			return
		}
	}
	t.Fatalf("%s was not there within a second: %v", name, look(t, c.Dir))
}
