package place

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/weirmesh/weir/install/conflist"
)

func TestMain(m *testing.M) {
	if command := os.Getenv(onceEnv); command != "" {
		os.Exit(once(command))
	}
	goleak.VerifyTestMain(m)
}

const (
	list   = `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"p"}]}`
	single = `{"cniVersion":"1.0.0","name":"n","type":"p"}`
	half   = `{"cniVersion":"1.0.0","na`
	ours   = `{"type":"weir-cni"}`
	// What Multus writes, and what it had it from.
	multus      = `{"cniVersion":"1.0.0","name":"m","type":"multus","clusterNetwork":"/host/etc/cni/net.d/10-a.conflist"}`
	chainedList = `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"p"},{"type":"weir-cni"}]}`
)

func testChain(t *testing.T, files map[string]string) Chain {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		put(t, dir, name, content)
	}
	return Chain{Dir: dir, Entry: conflist.Entry{Socket: "/run/weir/attach.sock", Timeout: 5 * time.Second, Backend: "auto"}}
}

// put writes a file as one that has been there for a while.
func put(t *testing.T, dir, name, content string) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	past := time.Now().Add(-time.Hour)
	if err := os.Chtimes(path, past, past); err != nil {
		t.Fatal(err)
	}
}

// look describes a folder: name → whether it is chained, or its content.
func look(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, e := range entries {
		if e.IsDir() {
			for name, content := range look(t, filepath.Join(dir, e.Name())) {
				out[e.Name()+"/"+name] = content
			}
			continue
		}
		content, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		out[e.Name()] = string(content)
		if has, err := conflist.Has(content); err == nil && has || conflist.IsDropIn(content) {
			out[e.Name()] = "chained"
		}
	}
	return out
}

func TestHeal(t *testing.T) {
	for _, tt := range []struct {
		name         string
		files, after map[string]string
		err          error
	}{
		{
			"the first list by name",
			map[string]string{"10-a.conflist": list, "20-b.conflist": list, "README": half},
			map[string]string{"10-a.conflist": "chained", "20-b.conflist": list, "README": half}, nil,
		},
		{
			"a single plugin gets a list before it",
			map[string]string{"10-a.conf": single, "20-b.conflist": list},
			map[string]string{"10-a-weir.conflist": "chained", "10-a.conf": single, "20-b.conflist": list}, nil,
		},
		{
			"and so does .json",
			map[string]string{"a.json": single},
			map[string]string{"a-weir.conflist": "chained", "a.json": single}, nil,
		},
		{
			"a derived list goes with its file",
			map[string]string{"10-a-weir.conflist": list, "20-b.conflist": list},
			map[string]string{"20-b.conflist": "chained"}, nil,
		},
		{
			"also if nothing else is left",
			map[string]string{"10-a-weir.conflist": list},
			map[string]string{}, ErrNoPrimary,
		},
		{
			"a broken file is passed over",
			map[string]string{"10-a.conflist": half, "20-b.conflist": list},
			map[string]string{"10-a.conflist": half, "20-b.conflist": "chained"}, nil,
		},
		{
			"a list in a .conf is broken",
			map[string]string{"10-a.conf": list, "20-b.conflist": list},
			map[string]string{"10-a.conf": list, "20-b.conflist": "chained"}, nil,
		},
		{
			"other names are not read",
			map[string]string{"10-a.conflist.bak": list, ".10-a.conflist123": list},
			map[string]string{"10-a.conflist.bak": list, ".10-a.conflist123": list}, ErrNoPrimary,
		},
		{
			"Multus' delegate has nothing of ours, wherever Multus has it from",
			map[string]string{"00-multus.conf": multus, "10-a.conflist": chainedList},
			map[string]string{"00-multus-weir.conflist": "chained", "00-multus.conf": multus, "10-a.conflist": list}, nil,
		},
		{
			"a drop-in goes when there is to be an entry",
			map[string]string{"10-a.conflist": list, "n/zz-weir-cni.conf": ours, "old/zz-weir-cni.conf": ours},
			map[string]string{"10-a.conflist": "chained"}, nil,
		},
		{
			"a primary of drop-ins is in use, and no other",
			map[string]string{"10-a.conflist": `{"cniVersion":"1.1.0","name":"n"}`, "20-b.conflist": list},
			map[string]string{"10-a.conflist": `{"cniVersion":"1.1.0","name":"n"}`, "20-b.conflist": list}, conflist.ErrDropIns,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := testChain(t, tt.files)
			healed, err := c.Heal()
			if !errors.Is(err, tt.err) {
				t.Fatalf("got error %v, want %v", err, tt.err)
			}
			if diff := cmp.Diff(tt.after, look(t, c.Dir)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if tt.err != nil {
				return
			}
			if !healed.Changed {
				t.Error("not said to have changed")
			}
			if _, err := c.Chained(); err != nil {
				t.Error(err)
			}
			if again, err := c.Heal(); err != nil || again.Changed {
				t.Errorf("a second Heal: changed %v, %v", again.Changed, err)
			}
			if _, err := c.Remove(); err != nil {
				t.Fatal(err)
			}
			want := maps.Clone(tt.files)
			maps.DeleteFunc(want, func(name, content string) bool { return derived(name) || content == ours })
			for name, content := range want {
				if content == chainedList {
					want[name] = list
				}
			}
			if diff := cmp.Diff(want, look(t, c.Dir)); diff != "" {
				t.Errorf("after Remove (-want +got):\n%s", diff)
			}
		})
	}
}

func TestHealWaitsForHalfAFile(t *testing.T) {
	c := testChain(t, map[string]string{"20-b.conflist": list})
	if err := os.WriteFile(filepath.Join(c.Dir, "10-a.conflist"), []byte(half), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Heal(); !errors.Is(err, errUnsettled) {
		t.Fatalf("got %v, want errUnsettled", err)
	}
	if got := look(t, c.Dir)["20-b.conflist"]; got != list {
		t.Errorf("another file was chained meanwhile: %s", got)
	}
	if _, _, err := findPrimary(c.Dir, time.Now().Add(settle)); err != nil {
		t.Errorf("later: %v", err)
	}
}

func TestHealKeepsPermissionsAndLinks(t *testing.T) {
	c := testChain(t, map[string]string{"real": list})
	link := filepath.Join(c.Dir, "10-a.conflist")
	if err := os.Symlink("real", link); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Heal(); err != nil {
		t.Fatal(err)
	}
	if target, err := os.Readlink(link); err != nil || target != "real" {
		t.Errorf("the link is %q, %v", target, err)
	}
	info, err := os.Stat(link)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if got := look(t, c.Dir)["real"]; got != "chained" {
		t.Errorf("the file behind the link: %s", got)
	}
}

func TestWriteFileLeavesWhatAnotherWrote(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "f", "theirs")
	path := filepath.Join(dir, "f")
	if err := writeFile(path, []byte("ours"), 0o600, []byte("what we read")); !errors.Is(err, errChanged) {
		t.Errorf("got %v, want errChanged", err)
	}
	if err := os.Mkdir(filepath.Join(dir, "d"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := writeFile(filepath.Join(dir, "d"), nil, 0o600, nil); err == nil {
		t.Error("a folder was replaced")
	}
	os.Remove(filepath.Join(dir, "d"))
	if diff := cmp.Diff(map[string]string{"f": "theirs"}, look(t, dir)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// brokenReader ends in an error, as a full disk does to the writer.
type brokenReader struct{ io.Reader }

func (b brokenReader) Read(p []byte) (int, error) {
	if n, err := b.Reader.Read(p); err == nil {
		return n, nil
	}
	return 0, errors.New("disk full")
}

func TestReplaceFailsWhole(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "f", "old")
	content := brokenReader{strings.NewReader("half of the new")}
	err := replace(filepath.Join(dir, "f"), 0o600, content, func() error { return nil })
	if err == nil || !strings.Contains(err.Error(), "disk full") {
		t.Errorf("got %v", err)
	}
	if diff := cmp.Diff(map[string]string{"f": "old"}, look(t, dir)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestPlugin(t *testing.T) {
	dir := t.TempDir()
	p := Plugin{Source: filepath.Join(t.TempDir(), "image"), Dir: dir}
	place := func(content string, want bool) {
		t.Helper()
		if err := os.WriteFile(p.Source, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
		got, err := p.Place()
		if err != nil || got != want {
			t.Errorf("copied is %v, %v; want %v", got, err, want)
		}
		if diff := cmp.Diff(map[string]string{"weir-cni": content}, look(t, dir)); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	if p.There() {
		t.Error("there before it was placed")
	}
	place("one", true)
	place("one", false)
	place("two", true)
	if err := os.Chmod(p.Path(), 0o600); err != nil {
		t.Fatal(err)
	}
	place("two", true)
	info, err := os.Stat(p.Path())
	if err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	for _, want := range []bool{true, false} {
		if got, err := p.Remove(); err != nil || got != want {
			t.Errorf("removed is %v, %v; want %v", got, err, want)
		}
	}
	if _, err := os.Stat(p.Path()); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// TestKeeperHealsAtOnce is the promise of a second, with room: a primary that
// writes by rename, in place, and under another name.
func TestKeeperHealsAtOnce(t *testing.T) {
	c := testChain(t, map[string]string{"10-a.conflist": list})
	k, log := testKeeper(t, c)
	stop := run(t, k)

	waitChained(t, c, "10-a.conflist")
	if err := os.WriteFile(filepath.Join(c.Dir, "10-a.conflist"), []byte(list), 0o600); err != nil {
		t.Fatal(err)
	}
	waitChained(t, c, "10-a.conflist")
	primaryWrites(t, filepath.Join(c.Dir, "10-a.conflist"), []byte(list+"\n"))
	waitChained(t, c, "10-a.conflist")
	primaryWrites(t, filepath.Join(c.Dir, "05-a.conflist"), []byte(list))
	waitChained(t, c, "05-a.conflist")

	stop()
	if n := strings.Count(log.String(), "msg=chained"); n != 4 {
		t.Errorf("chained %d times, want 4\n%s", n, log)
	}
}

// testKeeper has all it waits for but a primary. Its log is to be read when it
// has ended.
func testKeeper(t *testing.T, c Chain) (*Keeper, *bytes.Buffer) {
	t.Helper()
	image := filepath.Join(t.TempDir(), "weir-cni")
	marker := filepath.Join(t.TempDir(), "ready")
	for _, path := range []string{image, marker} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	log := new(bytes.Buffer)
	return &Keeper{Plugin: Plugin{Source: image, Dir: t.TempDir()}, Chain: c, Marker: marker, Log: slog.New(slog.NewTextHandler(log, nil))}, log
}

// run runs it until the function returned is called.
func run(t *testing.T, k *Keeper) func() {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- k.Run(ctx) }()
	return func() {
		t.Helper()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func waitChained(t *testing.T, c Chain, name string) {
	t.Helper()
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		content, err := os.ReadFile(filepath.Join(c.Dir, name))
		if err != nil {
			continue
		}
		if has, err := conflist.Has(content); err == nil && has {
			return
		}
	}
	t.Fatalf("%s was not chained within a second: %v", name, look(t, c.Dir))
}

// primaryWrites replaces a file as other programs do it.
func primaryWrites(t *testing.T, path string, content []byte) {
	t.Helper()
	temp := path + ".tmp"
	if err := os.WriteFile(temp, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(temp, path); err != nil {
		t.Fatal(err)
	}
}
