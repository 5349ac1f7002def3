package place

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/weirmesh/weir/install/conflist"
)

// pluginMode is that of the other plugins: any user's runtime may run it.
const pluginMode fs.FileMode = 0o755

// Plugin is the CNI plugin's program, on its way from our image to the node.
type Plugin struct {
	Source string // file to copy
	Dir    string // folder that the container runtime looks for plugins in
}

// Path is where the runtime finds the plugin.
func (p Plugin) Path() string { return filepath.Join(p.Dir, conflist.PluginType) }

// Place copies the plugin to the node, unless the same is there already. The one
// that is there is replaced at once; a runtime that is just running it goes on
// with the old. It says whether it copied.
func (p Plugin) Place() (bool, error) {
	copied := false
	err := locked(p.Dir, func() error {
		did, err := p.placeLocked()
		copied = did
		return err
	})
	return copied, err
}

func (p Plugin) placeLocked() (bool, error) {
	if err := sweep(p.Dir); err != nil {
		return false, err
	}
	src, err := os.Open(p.Source)
	if err != nil {
		return false, fmt.Errorf("place the plugin: %w", err)
	}
	defer src.Close()
	is, err := p.placed(src)
	if is || err != nil {
		return false, err
	}
	if _, err := src.Seek(0, io.SeekStart); err != nil {
		return false, fmt.Errorf("place the plugin: %w", err)
	}
	if err := replace(p.Path(), pluginMode, src, func() error { return nil }); err != nil {
		return false, fmt.Errorf("place the plugin: %w", err)
	}
	return true, nil
}

// placed says whether what src holds is what the node has.
func (p Plugin) placed(src io.Reader) (bool, error) {
	dst, err := os.Open(p.Path())
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("place the plugin: %w", err)
	}
	defer dst.Close()
	info, err := dst.Stat()
	if err != nil {
		return false, fmt.Errorf("place the plugin: %w", err)
	}
	if info.Mode().Perm() != pluginMode {
		return false, nil
	}
	want, err := digest(src)
	if err != nil {
		return false, fmt.Errorf("place the plugin: %w", err)
	}
	got, err := digest(dst)
	if err != nil {
		return false, fmt.Errorf("place the plugin: %w", err)
	}
	return want == got, nil
}

// There says whether the node has a plugin, of whatever version.
func (p Plugin) There() bool {
	info, err := os.Stat(p.Path())
	return err == nil && info.Mode().IsRegular()
}

// Remove takes the plugin off the node. It must be in no chain any more. It says
// whether there was one.
func (p Plugin) Remove() (bool, error) {
	removed := false
	err := locked(p.Dir, func() error {
		did, err := p.removeLocked()
		removed = did
		return err
	})
	return removed, err
}

func (p Plugin) removeLocked() (bool, error) {
	if err := sweep(p.Dir); err != nil {
		return false, err
	}
	err := os.Remove(p.Path())
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err == nil {
		err = syncDir(p.Dir)
	}
	if err != nil {
		return false, fmt.Errorf("remove the plugin: %w", err)
	}
	return true, nil
}

func digest(r io.Reader) ([sha256.Size]byte, error) {
	var out [sha256.Size]byte
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return out, err
	}
	h.Sum(out[:0])
	return out, nil
}
