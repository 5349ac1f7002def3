package place

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
)

const replacements = 150

// replaceOften upgrades a node's plugin back and forth. It is a program of its own,
// as the installer is: a process that starts others shares with them what it has
// open for writing, for a moment.
func replaceOften(root node) error {
	plugin := root.keeper(Entry).Plugin
	for i := range replacements {
		plugin.Source = filepath.Join(string(root), fmt.Sprintf("image-%d", i%2))
		if replaced, err := plugin.Place(); err != nil || !replaced {
			return fmt.Errorf("replacement %d: replaced is %v, %w", i, replaced, err)
		}
	}
	return nil
}

// TestUpgradeWhilePodsStart runs the plugin all the time while it is replaced.
func TestUpgradeWhilePodsStart(t *testing.T) {
	program, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Skip("needs a small program: ", err)
	}
	root := makeNode(t, nil, "")
	for i := range 2 { // what follows an ELF file is not read
		version := append(bytes.Clone(program), byte(i))
		if err := os.WriteFile(filepath.Join(string(root), fmt.Sprintf("image-%d", i)), version, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	plugin := root.keeper(Entry).Plugin
	plugin.Source = filepath.Join(string(root), "image-1")
	if _, err := plugin.Place(); err != nil {
		t.Fatal(err)
	}

	var stop atomic.Bool
	var runs atomic.Int32
	var runners sync.WaitGroup
	for range 4 {
		runners.Go(func() {
			for !stop.Load() {
				if err := exec.Command(plugin.Path()).Run(); err != nil {
					t.Errorf("run %d: %v", runs.Load(), err)
					return
				}
				runs.Add(1)
			}
		})
	}
	replacer := exec.Command(os.Args[0])
	replacer.Env = append(os.Environ(), onceEnv+"=replace "+string(root))
	if out, err := replacer.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	stop.Store(true)
	runners.Wait()
	if runs.Load() < replacements/10 {
		t.Errorf("only %d runs during %d replacements", runs.Load(), replacements)
	}
	t.Logf("%d runs during %d replacements", runs.Load(), replacements)
}
