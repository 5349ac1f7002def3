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
	// DropIn: weir-cni is to be a file of its own where the primary's list reads
	// those, and an entry in the list elsewhere.
	DropIn bool
}

// Healed is what Heal found and did.
type Healed struct {
	Primary string  // the primary's file
	File    string  // the file that has weir-cni in it: the same, or one of ours
	DropIn  bool    // it is a drop-in
	Changed bool    // it was written
	Skipped []error // files before the primary's that no runtime can use, and why
}

// Heal puts weir-cni into the primary's chain, if it is not there as wanted, and
// takes it out of where else a runtime would find it. Without a primary the error
// is ErrNoPrimary.
func (c Chain) Heal() (Healed, error) {
	var healed Healed
	err := locked(c.Dir, func() error {
		if err := sweep(c.Dir); err != nil {
			return err
		}
		var err error
		healed, err = c.heal()
		return err
	})
	return healed, err
}

func (c Chain) heal() (Healed, error) {
	primary, skipped, err := findPrimary(c.Dir, time.Now())
	healed := Healed{Skipped: skipped}
	if errors.Is(err, ErrNoPrimary) {
		// What was derived from it must not keep it alive.
		return healed, errors.Join(err, c.removeDerived(""), c.removeDropIns(""))
	}
	if err != nil {
		return healed, err
	}
	healed.Primary = primary.path
	healed.DropIn = c.DropIn && primary.info.DropIns
	// In the new place first, then out of the old: a pod that starts between has
	// weir-cni run twice, which is once, and none is missed.
	if healed.DropIn {
		healed.File = c.dropIn(primary.info.Name)
		if healed.Changed, err = c.writeDropIn(primary, healed.File); err != nil {
			return healed, err
		}
		if _, err := removeOnce(primary.path); err != nil {
			return healed, err
		}
		return healed, errors.Join(c.removeDerived(""), c.removeDropIns(healed.File))
	}
	healed.File = primary.chained()
	wanted, err := conflist.Add(primary.content, c.Entry)
	if err != nil {
		return healed, fmt.Errorf("chain weir-cni into %s: %w", primary.path, err)
	}
	if healed.Changed, err = write(primary, wanted); err != nil {
		return healed, err
	}
	// Only now: of two lists the derived one sorts first, and is in use.
	errs := []error{c.removeDerived(healed.File), c.removeDropIns("")}
	if primary.info.Delegates {
		errs = append(errs, c.removeDelegated(healed.File))
	}
	return healed, errors.Join(errs...)
}

// removeDelegated takes weir-cni out of the files that a primary like Multus runs
// beside its own, or copies: it is behind that primary.
func (c Chain) removeDelegated(but string) error {
	paths, err := configurations(c.Dir)
	errs := []error{err}
	for _, path := range paths {
		if path == but || derived(path) {
			continue
		}
		_, err := removeFrom(path)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// write puts the wanted bytes into the file that is to have them, unless they are
// there.
func write(primary file, wanted []byte) (bool, error) {
	path, old := primary.path, primary.content
	if primary.info.Form == conflist.Single {
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
	err := rewrite(path, primary.path, wanted, old)
	return err == nil, err
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

// Chained is where weir-cni is.
type Chained struct {
	DropIn bool
	Since  time.Time // when the drop-in was written
}

// Chained says where in the chain of new pods weir-cni is; the error says what is
// missing. That a drop-in is there does not say that the runtime reads it.
func (c Chain) Chained() (Chained, error) {
	primary, _, err := findPrimary(c.Dir, time.Now())
	if err != nil {
		return Chained{}, err
	}
	if primary.info.DropIns {
		path := c.dropIn(primary.info.Name)
		if content, err := os.ReadFile(path); err == nil && conflist.IsDropIn(content) {
			info, err := os.Stat(path)
			if err != nil {
				return Chained{}, err
			}
			return Chained{DropIn: true, Since: info.ModTime()}, nil
		}
	}
	return Chained{}, primary.entered()
}

// entered says whether the primary's list, or the one derived from it, has
// weir-cni as an entry: nil, or what is missing.
func (f file) entered() error {
	content, err := os.ReadFile(f.chained())
	if err != nil {
		return fmt.Errorf("weir-cni is not chained: %w", err)
	}
	has, err := conflist.Has(content)
	if err != nil {
		return fmt.Errorf("%s: %w", f.chained(), err)
	}
	if !has {
		return fmt.Errorf("weir-cni is not in the chain of %s", f.path)
	}
	return nil
}

// Remove takes weir-cni out of every chain of the node, not only the primary's:
// a file that is not used now may be later. It returns the files it changed, also
// with an error, and goes on after one.
func (c Chain) Remove() ([]string, error) {
	var changed []string
	err := locked(c.Dir, func() error {
		var err error
		changed, err = c.remove()
		return err
	})
	return changed, err
}

func (c Chain) remove() ([]string, error) {
	errs := []error{sweep(c.Dir)}
	changed, err := c.takeOutDropIns("")
	errs = append(errs, err)
	paths, err := configurations(c.Dir)
	errs = append(errs, err)
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
