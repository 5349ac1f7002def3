package place

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/weirmesh/weir/install/conflist"
)

// Chain is a node's CNI configuration.
type Chain struct {
	Dir   string // folder that the container runtime reads
	Entry conflist.Entry
}

// Healed is what Heal found and did.
type Healed struct {
	Primary string  // the primary's file
	File    string  // the file that has weir-cni in it: the same, or one of ours
	Changed bool    // it was written
	Skipped []error // files before the primary's that no runtime can use, and why
}

// Heal puts weir-cni into the primary's chain, if it is not there as wanted.
// Without a primary the error is ErrNoPrimary.
func (c Chain) Heal() (Healed, error) {
	primary, skipped, err := findPrimary(c.Dir, time.Now())
	healed := Healed{Skipped: skipped}
	if errors.Is(err, ErrNoPrimary) {
		// What was derived from it must not keep it alive.
		return healed, errors.Join(err, c.removeDerived(""))
	}
	if err != nil {
		return healed, err
	}
	healed.Primary, healed.File = primary.path, primary.chained()
	wanted, err := conflist.Add(primary.content, c.Entry)
	if err != nil {
		return healed, fmt.Errorf("chain weir-cni into %s: %w", primary.path, err)
	}
	healed.Changed, err = write(primary, wanted)
	if err != nil {
		return healed, err
	}
	// Only now: of two lists the derived one sorts first, and is in use.
	return healed, c.removeDerived(healed.File)
}

// write puts the wanted bytes into the file that is to have them, unless they are
// there.
func write(primary file, wanted []byte) (bool, error) {
	path, old := primary.path, primary.content
	if primary.form == conflist.Single {
		path = primary.chained()
		content, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, err
		}
		old = content
	}
	if bytes.Equal(old, wanted) {
		return false, nil
	}
	return true, rewrite(path, primary.path, wanted, old)
}

// rewrite replaces the file at path, with the permissions that like has. A link
// stays one: what it points to is replaced.
func rewrite(path, like string, content, old []byte) error {
	info, err := os.Stat(like)
	if err != nil {
		return err
	}
	if target, err := filepath.EvalSymlinks(path); err == nil {
		path = target
	}
	return writeFile(path, content, info.Mode().Perm(), old)
}

// removeDerived removes the lists we made, but for one.
func (c Chain) removeDerived(but string) error {
	paths, err := configurations(c.Dir)
	if err != nil {
		return err
	}
	removed := false
	for _, path := range paths {
		if path == but || !derived(path) {
			continue
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove a list of ours: %w", err)
		}
		removed = true
	}
	if !removed {
		return nil
	}
	return syncDir(c.Dir)
}

// Chained says whether new pods go through weir-cni: nil, or what is missing.
func (c Chain) Chained() error {
	primary, _, err := findPrimary(c.Dir, time.Now())
	if err != nil {
		return err
	}
	content, err := os.ReadFile(primary.chained())
	if err != nil {
		return fmt.Errorf("weir-cni is not chained: %w", err)
	}
	has, err := conflist.Has(content)
	if err != nil {
		return fmt.Errorf("%s: %w", primary.chained(), err)
	}
	if !has {
		return fmt.Errorf("weir-cni is not in the chain of %s", primary.path)
	}
	return nil
}

// Remove takes weir-cni out of every chain of the node, not only the primary's:
// a file that is not used now may be later. It returns the files it changed, also
// with an error, and goes on after one.
func (c Chain) Remove() ([]string, error) {
	errs := []error{sweep(c.Dir)}
	paths, err := configurations(c.Dir)
	errs = append(errs, err)
	var changed []string
	for _, path := range paths {
		did, err := removeFrom(path)
		if did {
			changed = append(changed, path)
		}
		errs = append(errs, err)
	}
	if len(changed) > 0 {
		errs = append(errs, syncDir(c.Dir))
	}
	return changed, errors.Join(errs...)
}

// removeTries is how often another program may get between reading and writing.
const removeTries = 10

func removeFrom(path string) (bool, error) {
	if derived(path) {
		err := os.Remove(path)
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		return err == nil, err
	}
	for try := 1; ; try++ {
		did, err := removeOnce(path)
		if !errors.Is(err, errChanged) || try == removeTries {
			return did, err
		}
	}
}

func removeOnce(path string) (bool, error) {
	content, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	without, err := conflist.Remove(content)
	if err != nil {
		if !bytes.Contains(content, []byte(conflist.PluginType)) {
			return false, nil // broken, and not by us
		}
		return false, fmt.Errorf("%s: %w: take weir-cni out by hand, then run this again", path, err)
	}
	if bytes.Equal(without, content) {
		return false, nil
	}
	if err := rewrite(path, path, without, content); err != nil {
		return false, err
	}
	return true, nil
}
