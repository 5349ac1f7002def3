package place

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/install/conflist"
)

// settle is how long a file may stay invalid before it is taken for broken:
// primaries that do not write by rename are seen half way.
const settle = 2 * time.Second

// derivedSuffix ends the name of the list that we write beside a single plugin's
// configuration, "10-net-weir.conflist" for "10-net.conf". Runtimes take the
// first file by name, and "-" sorts before ".".
const derivedSuffix = "-weir.conflist"

var (
	// ErrNoPrimary says that there is nothing to chain into.
	ErrNoPrimary = errors.New("no primary CNI configuration")
	// errUnsettled says that a file was written just now and is not valid.
	errUnsettled = errors.New("being written")
)

// file is a network configuration.
type file struct {
	path    string
	content []byte
	info    conflist.Info
}

// chained is the file that has our entry, or shall have it: the list itself, or
// the one derived from a single plugin's configuration.
func (f file) chained() string {
	if f.info.Form == conflist.Single {
		return strings.TrimSuffix(f.path, filepath.Ext(f.path)) + derivedSuffix
	}
	return f.path
}

// findPrimary returns the configuration that a runtime uses: the first by name
// that is valid, those we derived left out. Ones that it had to pass over are in
// skipped, with the reason.
func findPrimary(dir string, now time.Time) (file, []error, error) {
	paths, err := configurations(dir)
	if err != nil {
		return file{}, nil, err
	}
	var skipped []error
	for _, path := range paths {
		if derived(path) {
			continue
		}
		f, err := read(path)
		switch {
		case err == nil:
			return f, skipped, nil
		case errors.Is(err, fs.ErrNotExist): // just now
			continue
		}
		if unsettled(path, now) {
			return file{}, skipped, fmt.Errorf("%s: %w: %w", path, errUnsettled, err)
		}
		skipped = append(skipped, fmt.Errorf("%s: %w", path, err))
	}
	return file{}, skipped, fmt.Errorf("%w in %s", ErrNoPrimary, dir)
}

// configurations lists the files of a folder that a runtime reads, in the order
// in which it does (go-cni and libcni: by name, no sub-folders).
func configurations(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the CNI configurations: %w", err)
	}
	var out []string
	for _, e := range entries {
		if !e.IsDir() && slices.Contains([]string{".conflist", ".conf", ".json"}, filepath.Ext(e.Name())) {
			out = append(out, filepath.Join(dir, e.Name()))
		}
	}
	return out, nil
}

func derived(path string) bool { return strings.HasSuffix(path, derivedSuffix) }

// read reads a configuration that a runtime would accept. Runtimes tell a list
// from a single plugin by the name.
func read(path string) (file, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return file{}, err
	}
	info, err := conflist.Inspect(content)
	if err != nil {
		return file{}, err
	}
	want := conflist.Single
	if filepath.Ext(path) == ".conflist" {
		want = conflist.Chain
	}
	if info.Form != want {
		return file{}, fmt.Errorf("a list of plugins must be in a .conflist, a single plugin in a .conf or .json: %w", conflist.ErrForm)
	}
	return file{path, content, info}, nil
}

func unsettled(path string, now time.Time) bool {
	info, err := os.Stat(path)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	age := now.Sub(info.ModTime())
	return age >= 0 && age < settle
}
