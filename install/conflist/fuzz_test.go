package conflist

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/containernetworking/cni/libcni"
)

// FuzzAdd holds Add and Remove to their promises on any bytes: no panic, valid
// JSON that libcni reads, idempotent, and undone to the byte.
func FuzzAdd(f *testing.F) {
	files, err := filepath.Glob("testdata/*.conf*")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		conf, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(conf)
	}
	f.Add([]byte(`{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"weir-cni"},{"type":"p"},{"type":"weir-cni"}]}`))
	f.Add([]byte(`{"name":"n","cniVersion":"1.0.0","type":"p","Capabilities":[]}`)) // libcni cannot read it
	f.Fuzz(func(t *testing.T, conf []byte) {
		input := bytes.Clone(conf)
		chained, err := Add(conf, testEntry())
		if !bytes.Equal(conf, input) {
			t.Fatal("Add changed its input")
		}
		if err != nil {
			return
		}
		if !json.Valid(chained) {
			t.Fatalf("not JSON: %s", chained)
		}
		if has, err := Has(chained); err != nil || !has {
			t.Fatalf("Has = %v, %v: %s", has, err, chained)
		}
		if again, err := Add(chained, testEntry()); err != nil || !bytes.Equal(again, chained) {
			t.Fatalf("second Add: %v\n%s\n%s", err, chained, again)
		}
		checkLibcni(t, conf, chained)
		checkRemove(t, conf, chained)
	})
}

// checkLibcni: what a runtime could read before, it can read after.
func checkLibcni(t *testing.T, conf, chained []byte) {
	_, before := libcni.NetworkPluginConfFromBytes(conf)
	if info, _ := Inspect(conf); info.Form == Chain {
		_, before = libcni.NetworkConfFromBytes(conf)
	}
	if before != nil {
		return
	}
	list, err := libcni.NetworkConfFromBytes(chained)
	if err != nil {
		t.Fatalf("libcni: %v: %s", err, chained)
	}
	if first := list.Plugins[0].Network.Type; first == PluginType {
		t.Fatalf("no primary before us: %s", chained)
	}
}

// checkRemove: without us the chain is the one that was there.
func checkRemove(t *testing.T, conf, chained []byte) {
	removed, err := Remove(chained)
	if err != nil {
		t.Fatal(err)
	}
	bare, err := Remove(conf) // the same bytes, if we were not in there
	if err != nil {
		bare = conf
	}
	had, err := Has(conf)
	if err != nil {
		t.Fatal(err)
	}
	if info, _ := Inspect(conf); info.Form == Chain && !had && !bytes.Equal(removed, bare) {
		t.Fatalf("Remove(Add) differs:\n%s\n%s", conf, removed)
	}
	if has, err := Has(removed); err != nil || has {
		t.Fatalf("Has after Remove = %v, %v: %s", has, err, removed)
	}
}
