// Package memfd makes memory files (memfd_create(2)).
package memfd

import (
	"errors"

	"golang.org/x/sys/unix"
)

// What becomes of a file: MFD_NOEXEC_SEAL or MFD_EXEC. One of them is demanded with
// vm.memfd_noexec=2.
const (
	Data    = unix.MFD_NOEXEC_SEAL // it is never executed
	Program = unix.MFD_EXEC
)

// Create makes an empty memory file that can be sealed and is not inherited, and returns its
// descriptor. Before Linux 6.3 nothing can be said of what becomes of it, and there is no need.
func Create(name string, what int) (int, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|what)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	return fd, err
}
