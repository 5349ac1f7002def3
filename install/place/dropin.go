package place

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/weirmesh/weir/install/conflist"
)

// Since libcni 1.3 a list "<file>.conflist" goes on with the plugins in
// "<network name>/*.conf" beside it, by name, unless it says loadOnlyInlinedPlugins.
// A drop-in survives that the primary writes its list anew: no pod slips through
// meanwhile. A runtime with an older libcni reads it not at all, and says nothing.
//
// containerd watches the folder itself, not the folders in it, and of what happens
// there it hears writes, renames and removals, not creations. So a drop-in is
// written in the watched folder and moved out of it; and when it goes, it is moved
// in and removed there.

// dropInName sorts behind what a primary calls its own drop-ins, by letters too.
const dropInName = "zz-weir-cni.conf"

func (c Chain) dropIn(network string) string { return filepath.Join(c.Dir, network, dropInName) }

// writeDropIn writes the drop-in of the primary's network, unless it is there as
// wanted.
func (c Chain) writeDropIn(primary file, path string) (bool, error) {
	if err := conflist.CheckVersion(primary.content); err != nil {
		return false, fmt.Errorf("chain weir-cni behind %s: %w", primary.path, err)
	}
	if primary.info.Plugins == 0 {
		others, err := dropInsBeside(path)
		if err != nil {
			return false, err
		}
		if others == 0 {
			return false, fmt.Errorf("%w: %s and the drop-ins beside it", conflist.ErrAlone, primary.path)
		}
	}
	wanted, err := conflist.DropIn(c.Entry)
	if err != nil {
		return false, err
	}
	old, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if bytes.Equal(old, wanted) {
		return false, nil
	}
	info, err := os.Stat(primary.path)
	if err != nil {
		return false, err
	}
	if err := os.Mkdir(filepath.Dir(path), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return false, err
	}
	err = replaceFrom(c.Dir, path, info.Mode().Perm(), bytes.NewReader(wanted), func() error { return nil })
	return err == nil, err
}

// dropInsBeside counts the drop-ins that libcni reads beside ours.
func dropInsBeside(path string) (int, error) {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	n := 0
	for _, e := range entries {
		if !e.IsDir() && filepath.Ext(e.Name()) == ".conf" && e.Name() != dropInName {
			n++
		}
	}
	return n, nil
}

func (c Chain) removeDropIns(but string) error {
	_, err := c.takeOutDropIns(but)
	return err
}

// takeOutDropIns removes our drop-ins of every network but one. It returns those
// it removed, also with an error.
func (c Chain) takeOutDropIns(but string) ([]string, error) {
	entries, err := os.ReadDir(c.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var removed []string
	for _, e := range entries {
		path := c.dropIn(e.Name())
		if !e.IsDir() || path == but {
			continue
		}
		err := c.takeOutDropIn(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return removed, fmt.Errorf("remove a drop-in of ours: %w", err)
		}
		removed = append(removed, path)
	}
	return removed, nil
}

func (c Chain) takeOutDropIn(path string) error {
	if _, err := os.Lstat(path); err != nil {
		return err
	}
	temp := filepath.Join(c.Dir, tempPrefix+"removed"+tempSuffix)
	if err := os.Rename(path, temp); err != nil {
		return err
	}
	if err := os.Remove(temp); err != nil {
		return err
	}
	os.Remove(filepath.Dir(path)) // unless there is something else in it
	return syncDir(c.Dir)
}
