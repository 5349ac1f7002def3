package conflist

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/diff"
)

var update = flag.Bool("update", false, "write the golden files anew")

func testEntry() Entry {
	return Entry{
		Socket:           "/run/weir/attach.sock",
		ExemptNamespaces: []string{"kube-system", "weir-system"},
		Timeout:          5 * time.Second,
		Backend:          "auto",
	}
}

// TestGolden chains weir-cni behind primaries as their documentation shows them.
// Beside each file lies what the installer changes in it; of a single plugin's
// configuration, how the list made of it differs.
func TestGolden(t *testing.T) {
	for _, pattern := range []string{"*.conflist", "*.conf"} {
		files, err := filepath.Glob(filepath.Join("testdata", pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			t.Run(filepath.Base(file), func(t *testing.T) { golden(t, file) })
		}
	}
}

func golden(t *testing.T, file string) {
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	after, err := Add(before, testEntry())
	if err != nil {
		t.Fatal(err)
	}
	got := diff.Diff("primary", before, "chained", after)
	if *update {
		if err := os.WriteFile(file+".diff", got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file + ".diff")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("Add (-want +got):\n%s", diff)
	}

	again, err := Add(after, testEntry())
	if err != nil || !bytes.Equal(again, after) {
		t.Errorf("a second Add changed something: %v\n%s", err, again)
	}
	if has, err := Has(after); err != nil || !has {
		t.Errorf("Has = %v, %v", has, err)
	}
	removed, err := Remove(after)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(removed, []byte(PluginType)); n > 0 {
		t.Errorf("weir-cni is %d times in what Remove left:\n%s", n, removed)
	}
	bare, err := Remove(before)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := Inspect(before); err != nil {
		t.Fatal(err)
	} else if info.Form == Chain && !bytes.Equal(removed, bare) {
		t.Errorf("Remove did not give back the file (-want +got):\n%s", cmp.Diff(string(bare), string(removed)))
	}
	checkRuns(t, after, kinds(t, before))
}

// checkRuns checks that libcni runs the primary's plugins and then ours.
func checkRuns(t *testing.T, conf []byte, primary []string) {
	t.Helper()
	list, err := libcni.NetworkConfFromBytes(conf)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, p := range list.Plugins {
		got = append(got, p.Network.Type)
	}
	if diff := cmp.Diff(append(primary, PluginType), got); diff != "" {
		t.Errorf("plugins as libcni reads them (-want +got):\n%s", diff)
	}
}

func kinds(t *testing.T, conf []byte) []string {
	t.Helper()
	var c struct {
		Type    string
		Plugins []struct{ Type string }
	}
	if err := json.Unmarshal(conf, &c); err != nil {
		t.Fatal(err)
	}
	if c.Type != "" {
		return []string{c.Type}
	}
	var out []string
	for _, p := range c.Plugins {
		out = append(out, p.Type)
	}
	return out
}

func TestAdd(t *testing.T) {
	const (
		head  = `{"name":"n","cniVersion":"1.0.0","plugins":[`
		p     = `{"type":"p"}`
		q     = `{"type":"q"}`
		ours  = `{"type":"weir-cni","socket":"/run/weir/attach.sock","exemptNamespaces":["kube-system","weir-system"],"timeout":"5s","backend":"auto"}`
		other = `{"backend":"auto", "timeout":"5s", "type":"weir-cni","exemptNamespaces":["kube-system","weir-system"],"socket":"/run/weir/attach.sock"}`
		old   = `{"type":"weir-cni","socket":"/old"}`
	)
	for _, tt := range []struct{ name, plugins, want string }{
		{"none yet", p, p + "," + ours},
		{"spaces before an element are repeated", p + ",  " + q, p + ",  " + q + ",  " + ours},
		{"other options", p + "," + old, p + "," + ours},
		{"other options, in the middle", p + "," + old + "," + q, p + "," + ours + "," + q},
		{"another one is behind us", p + "," + ours + "," + q, p + "," + ours + "," + q},
		{"the same in another order", p + "," + other, p + "," + other},
		{"twice", p + "," + ours + "," + q + "," + ours, p + "," + q + "," + ours},
		{"first", ours + "," + p, p + "," + ours},
		{"first, several times", old + "," + ours + "," + p + "," + old + "," + q, p + "," + q + "," + ours},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Add([]byte(head+tt.plugins+"]}"), testEntry())
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(head+tt.want+"]}", string(got)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestAddWritesEveryOption(t *testing.T) {
	got, err := Add([]byte(`{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"p"}]}`),
		Entry{Socket: "/s", Timeout: 1500 * time.Millisecond, Backend: "iptables"})
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"type":"weir-cni","socket":"/s","exemptNamespaces":[],"timeout":"1.5s","backend":"iptables"}`
	if !strings.Contains(string(got), want) {
		t.Errorf("want %s in %s", want, got)
	}
}

func TestRefused(t *testing.T) {
	for _, tt := range []struct {
		name, conf, says string
		is               error
	}{
		{"empty", ``, "unexpected end", nil},
		{"half written", `{"name":"n","plugins":[{"type":`, "unexpected end", nil},
		{"two values", `{"name":"n","type":"p"} {}`, "after top-level value", nil},
		{"an array", `[]`, "not a JSON object", nil},
		{"null", `null`, "null", ErrForm},
		{"something else", `{"cniVersion":"1.1.0"}`, "neither plugins nor a type", ErrForm},
		{"drop-ins alone", `{"cniVersion":"1.1.0","name":"n"}`, "drop-in", ErrDropIns},
		{"no name", `{"cniVersion":"1.0.0","type":"p"}`, "no name", ErrForm},
		{"name is a number", `{"name":1,"cniVersion":"1.0.0","type":"p"}`, "name", ErrForm},
		{"plugins is an object", `{"name":"n","cniVersion":"1.0.0","plugins":{}}`, "plugins", ErrForm},
		{"plugins is empty", `{"name":"n","cniVersion":"1.0.0","plugins":[]}`, "empty", ErrForm},
		{"plugins twice", `{"name":"n","plugins":[{"type":"p"}],"plugins":[{"type":"q"}]}`, "twice", ErrForm},
		{"a plugin without type", `{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"p"},{}]}`, "plugin 1 has no type", ErrForm},
		{"a plugin is null", `{"name":"n","cniVersion":"1.0.0","plugins":[null]}`, "plugin 0", ErrForm},
		{"no version", `{"name":"n","plugins":[{"type":"p"}]}`, "0.1.0", ErrVersion},
		{"old version", `{"cniVersion":"0.2.0","name":"n","type":"p"}`, "0.2.0", ErrVersion},
		{"none of several", `{"cniVersion":"0.2.0","cniVersions":["9.0.0"],"name":"n","plugins":[{"type":"p"}]}`, "9.0.0", ErrVersion},
		{"nobody else", `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"weir-cni"}]}`, "no other plugin", ErrAlone},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Add([]byte(tt.conf), testEntry())
			if err == nil {
				t.Fatalf("no error; got %s", got)
			}
			if !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error %q does not say %q", err, tt.says)
			}
			if tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("error %q is not %q", err, tt.is)
			}
		})
	}
}

func TestRemoveLeavesOthersAlone(t *testing.T) {
	for _, conf := range []string{
		`{"name":"n","plugins":[ {"type":"p"} ]}`, // also of versions that Add refuses
		`{"name":"n","type":"p"}`,
	} {
		got, err := Remove([]byte(conf))
		if err != nil || string(got) != conf {
			t.Errorf("Remove(%s) = %s, %v", conf, got, err)
		}
	}
	if _, err := Remove([]byte(`{"name":"n","plugins":[{"type":"weir-cni"}]}`)); !errors.Is(err, ErrAlone) {
		t.Errorf("got %v, want ErrAlone", err)
	}
}
