package cluster

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Module is a nested module whose programs tests run, and what is built from it.
type Module struct {
	// Name is that of the module's folder; the version names the cache's.
	Name, Version string
	Packages      string // what go build is given: "." or "tool"
	LDFlags       string
	Links         []string // further names of the one binary
}

// Build makes the programs of the module in the folder source, unless they are in
// cacheDir (empty: the default), and returns the folder they are in. progress gets
// a line when there is something to build. Several builders may run at once: the
// second waits for the first.
func (m Module) Build(ctx context.Context, source, cacheDir string, progress func(string)) (string, error) {
	target, err := m.target(source, cacheDir)
	if err != nil {
		return "", err
	}
	return filepath.Join(target, "bin"), m.build(ctx, source, target, progress)
}

// target is the folder in the cache: another one for each content of the module.
func (m Module) target(source, cacheDir string) (string, error) {
	if cacheDir == "" {
		dir, err := DefaultCacheDir()
		if err != nil {
			return "", err
		}
		cacheDir = dir
	}
	key, err := m.key(source)
	if err != nil {
		return "", fmt.Errorf("hash the %s module: %w", m.Name, err)
	}
	return filepath.Join(cacheDir, m.Name+"-"+m.Version+"-"+key), nil
}

// key identifies what would be built: the module's files and the flags.
func (m Module) key(source string) (string, error) {
	files, err := filepath.Glob(filepath.Join(source, "*"))
	if err != nil {
		return "", err
	}
	sort.Strings(files)
	hash := sha256.New()
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(hash, "%s %d\n", filepath.Base(file), len(content))
		hash.Write(content)
	}
	fmt.Fprintf(hash, "%s\n%s\n%s\n", m.Packages, m.LDFlags, strings.Join(m.Links, " "))
	return hex.EncodeToString(hash.Sum(nil))[:12], nil
}

// build makes target/bin, unless it is there: the folder appears complete, by
// rename, so its existence is the stamp.
func (m Module) build(ctx context.Context, source, target string, progress func(string)) error {
	if _, err := os.Stat(target); err == nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	lock, err := lockFile(ctx, filepath.Join(filepath.Dir(target), m.Name+".lock"))
	if err != nil {
		return err
	}
	defer lock.Close()
	if _, err := os.Stat(target); err == nil {
		return nil
	}

	began := time.Now()
	progress(fmt.Sprintf("building %s %s", m.Name, m.Version))
	tmp, err := os.MkdirTemp(filepath.Dir(target), ".building-"+m.Name+"-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	bin := filepath.Join(tmp, "bin") + string(filepath.Separator)
	if err := os.Mkdir(bin, 0o755); err != nil {
		return err
	}
	args := []string{"build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w" + m.LDFlags, "-o", bin, m.Packages}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = source
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
	// go build ends its compilers itself when it is interrupted.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", m.Name, err, lastLines(output.String(), 20))
	}
	for _, link := range m.Links {
		if err := os.Symlink(m.Name, filepath.Join(bin, link)); err != nil {
			return err
		}
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	if err := os.Rename(tmp, target); err != nil {
		return err
	}
	progress(fmt.Sprintf("built %s %s in %s", m.Name, m.Version, time.Since(began).Round(time.Second)))
	return nil
}

// lockFile waits for an exclusive lock on path, which it creates; closing the
// file releases it.
func lockFile(ctx context.Context, path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return file, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			file.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if err := sleep(ctx, 200*time.Millisecond); err != nil {
			file.Close()
			return nil, fmt.Errorf("wait for another build to release %s: %w", path, err)
		}
	}
}
