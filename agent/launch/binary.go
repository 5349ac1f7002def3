package launch

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/agent/memfd"
)

// placedPrefix begins the names of the copies that PlaceProxy makes.
const placedPrefix = "weir-proxy-"

// Placed lists the proxy binaries that were placed in dir. One that runs can be
// removed: the kernel keeps it for as long.
func Placed(dir string) ([]string, error) {
	return filepath.Glob(filepath.Join(dir, placedPrefix+"*"))
}

// Program is weir-proxy where proxies may run it: they outlive the agent's
// container, so that is not the container's file system.
type Program struct {
	Path   string // to execute
	Memory bool   // it is not in a file of the host
	file   *os.File
}

// Close lets go of a program in memory. Those that run it do so on.
func (p *Program) Close() error {
	if p.file == nil {
		return nil
	}
	return p.file.Close()
}

// PlaceProxy copies a proxy binary to dir, a folder of the host, under a name that
// carries its digest; a copy that is there already is kept. Where dir is read-only,
// or mounted noexec, the copy is one in memory, for as long as somebody runs it.
func PlaceProxy(binary, dir string) (*Program, error) {
	p, err := placeProxy(binary, dir)
	if err != nil {
		return nil, fmt.Errorf("place the proxy: %w", err)
	}
	return p, nil
}

func placeProxy(binary, dir string) (*Program, error) {
	src, err := os.Open(binary)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, src); err != nil {
		return nil, err
	}
	name := placedPrefix + hex.EncodeToString(sum.Sum(nil))[:12]
	may, err := mayExecute(dir)
	if err != nil {
		return nil, err
	}
	if may {
		path, err := placeFile(src, dir, name)
		if err == nil {
			return &Program{Path: path}, nil
		}
		if !errors.Is(err, unix.EROFS) {
			return nil, err
		}
	}
	file, err := placeMemory(src, name)
	if err != nil {
		return nil, fmt.Errorf("%w; %s is read-only or mounted noexec, so give --proxy-dir a folder of the host that may be written to and executed from", err, dir)
	}
	// By this process's number: in the one that executes it descriptors are others.
	return &Program{Path: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), file.Fd()), Memory: true, file: file}, nil
}

// mayExecute makes dir and says whether programs in it may be executed.
func mayExecute(dir string) (bool, error) {
	if err := os.MkdirAll(dir, 0o755); errors.Is(err, unix.EROFS) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return false, fmt.Errorf("%s: %w", dir, err)
	}
	return st.Flags&unix.ST_NOEXEC == 0, nil
}

// placeFile copies src to a file of that name, if there is none.
func placeFile(src io.ReadSeeker, dir, name string) (string, error) {
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err == nil {
		return path, nil // put there whole, by rename
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	dst, err := renameio.NewPendingFile(path, renameio.WithTempDir(dir), renameio.WithPermissions(0o755))
	if err != nil {
		return "", err
	}
	defer dst.Cleanup()
	if err := copyAll(dst, src); err != nil {
		return "", err
	}
	return path, dst.CloseAtomicallyReplace()
}

// placeMemory copies src to a sealed memory file.
func placeMemory(src io.ReadSeeker, name string) (*os.File, error) {
	fd, err := memfd.Create(name, memfd.Program)
	if err != nil {
		return nil, fmt.Errorf("memory file (sysctl vm.memfd_noexec must be less than 2): %w", err)
	}
	dst := os.NewFile(uintptr(fd), name)
	defer dst.Close()
	if err := copyAll(dst, src); err != nil {
		return nil, err
	}
	seals := unix.F_SEAL_SEAL | unix.F_SEAL_WRITE | unix.F_SEAL_GROW | unix.F_SEAL_SHRINK
	if _, err := unix.FcntlInt(dst.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return nil, fmt.Errorf("seal the memory file: %w", err)
	}
	// What is open for writing is not executed (ETXTBSY).
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", dst.Fd()))
}

func copyAll(dst io.Writer, src io.ReadSeeker) error {
	if _, err := src.Seek(0, io.SeekStart); err != nil {
		return err
	}
	_, err := io.Copy(dst, src)
	return err
}
