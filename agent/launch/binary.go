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
)

// placedPrefix begins the names of the copies that PlaceProxy makes.
const placedPrefix = "weir-proxy-"

// Placed lists the proxy binaries that were placed in dir. One that runs can be
// removed: the kernel keeps it for as long.
func Placed(dir string) ([]string, error) {
	return filepath.Glob(filepath.Join(dir, placedPrefix+"*"))
}

// PlaceProxy copies a proxy binary to dir under a name that carries its digest
// and returns that path. Proxies outlive the agent's container, so what they run
// must lie on the host. A copy that is there already is kept.
func PlaceProxy(binary, dir string) (string, error) {
	src, err := os.Open(binary)
	if err != nil {
		return "", fmt.Errorf("place the proxy: %w", err)
	}
	defer src.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, src); err != nil {
		return "", fmt.Errorf("place the proxy: %w", err)
	}
	path := filepath.Join(dir, placedPrefix+hex.EncodeToString(sum.Sum(nil))[:12])
	if _, err := os.Stat(path); err == nil {
		return path, nil // put there whole, by rename
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("place the proxy: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("place the proxy: %w", err)
	}
	if _, err := src.Seek(0, io.SeekStart); err != nil {
		return "", fmt.Errorf("place the proxy: %w", err)
	}
	dst, err := renameio.NewPendingFile(path, renameio.WithTempDir(dir), renameio.WithPermissions(0o755))
	if err != nil {
		return "", fmt.Errorf("place the proxy: %w", err)
	}
	defer dst.Cleanup()
	if _, err := io.Copy(dst, src); err != nil {
		return "", fmt.Errorf("place the proxy: %w", err)
	}
	if err := dst.CloseAtomicallyReplace(); err != nil {
		return "", fmt.Errorf("place the proxy: %w", err)
	}
	return path, nil
}
