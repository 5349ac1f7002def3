package place

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Temporary files carry our name, so that those of a killed run can be told from
// other programs' and removed; a runtime reads .conf, .conflist and .json only.
const (
	tempPrefix = ".weir-install-"
	tempSuffix = ".tmp"
)

// errChanged says that another program wrote the file in the meantime.
var errChanged = errors.New("the file was changed by another program meanwhile")

// writeFile puts content at path, whole and on disk, or leaves what was there.
// With old, it does so only while old is what lies there.
func writeFile(path string, content []byte, mode fs.FileMode, old []byte) error {
	unchanged := func() error {
		if old == nil {
			return nil
		}
		now, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("%w: %w", errChanged, err)
		}
		if !bytes.Equal(now, old) {
			return errChanged
		}
		return nil
	}
	return replace(path, mode, bytes.NewReader(content), unchanged)
}

// replace puts content at path by rename, if the last check before it agrees.
func replace(path string, mode fs.FileMode, content io.Reader, check func() error) error {
	return replaceFrom(filepath.Dir(path), path, mode, content, check)
}

// replaceFrom does it with the temporary file in another folder of the same disk.
func replaceFrom(stage, path string, mode fs.FileMode, content io.Reader, check func() error) error {
	dir := filepath.Dir(path)
	temp, err := os.CreateTemp(stage, tempPrefix+"*"+tempSuffix)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	err = fill(temp, mode, content)
	if err == nil {
		err = check()
	}
	if err == nil {
		err = os.Rename(temp.Name(), path)
	}
	if err == nil {
		err = syncDir(dir)
	}
	if err == nil && stage != dir {
		err = syncDir(stage)
	}
	if err != nil {
		os.Remove(temp.Name()) // of no use any more; swept later if this fails
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// fill writes a temporary file to disk and closes it.
func fill(temp *os.File, mode fs.FileMode, content io.Reader) error {
	_, err := io.Copy(temp, content)
	if err == nil {
		err = temp.Chmod(mode)
	}
	if err == nil {
		// Otherwise a crash after the rename can leave an empty file.
		err = temp.Sync()
	}
	return errors.Join(err, temp.Close())
}

// syncDir makes a rename or removal in dir outlast a crash.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// locked runs do while no other installer writes in dir, so that of two (one that
// ends and one that begins, a command by hand) neither takes the other's temporary
// file for a dead one's, or writes on what the other has just changed. The lock is
// the folder's own: it leaves no file, and goes with the process.
func locked(dir string, do func() error) error {
	d, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return do()
	}
	if err != nil {
		return err
	}
	defer d.Close()
	for {
		err := unix.Flock(int(d.Fd()), unix.LOCK_EX)
		if err == nil {
			return do()
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("lock %s: %w", dir, err)
		}
	}
}

// sweep removes what killed runs left in dir. The caller has it locked.
func sweep(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for temporary files: %w", err)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), tempPrefix) || !strings.HasSuffix(e.Name(), tempSuffix) {
			continue
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove a temporary file: %w", err)
		}
	}
	return nil
}
