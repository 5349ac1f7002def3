package jail

import (
	"encoding/binary"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

func TestTheFilterLetsByWhatIsAllowedAndNothingElse(t *testing.T) {
	filter, err := program(auditArch, allowed(true))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bpf.Assemble(filter); err != nil {
		t.Fatal(err)
	}
	vm, err := bpf.NewVM(filter)
	if err != nil {
		t.Fatal(err)
	}
	const (
		high   = 1 << 32 // of an argument of 64 bits
		stream = unix.SOCK_STREAM | unix.SOCK_CLOEXEC
		thread = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_THREAD
	)
	for _, c := range []struct {
		name string
		arch uint32
		nr   uint32
		args []uint64
		want bool
	}{
		{"the first", auditArch, unix.SYS_SPLICE, nil, true},
		{"the last", auditArch, unix.SYS_EXIT_GROUP, nil, true},
		{"another architecture", auditArch ^ 1, unix.SYS_SPLICE, nil, false},
		{"a 32-bit number of x86-64", auditArch, unix.SYS_SPLICE | 0x40000000, nil, false},
		{"execve", auditArch, unix.SYS_EXECVE, nil, false},
		{"execveat", auditArch, unix.SYS_EXECVEAT, nil, false},
		{"openat", auditArch, unix.SYS_OPENAT, nil, false},
		{"ptrace", auditArch, unix.SYS_PTRACE, nil, false},
		{"IPv4", auditArch, unix.SYS_SOCKET, []uint64{unix.AF_INET, stream}, true},
		{"IPv6", auditArch, unix.SYS_SOCKET, []uint64{unix.AF_INET6, stream}, true},
		{"netlink", auditArch, unix.SYS_SOCKET, []uint64{unix.AF_NETLINK, stream}, false},
		{"datagrams", auditArch, unix.SYS_SOCKET, []uint64{unix.AF_INET, unix.SOCK_DGRAM | unix.SOCK_CLOEXEC}, false},
		{"high bits of the family", auditArch, unix.SYS_SOCKET, []uint64{high | unix.AF_INET, stream}, false},
		{"high bits of the type", auditArch, unix.SYS_SOCKET, []uint64{unix.AF_INET6, high | stream}, false},
		{"a thread", auditArch, unix.SYS_CLONE, []uint64{thread}, true},
		{"a process", auditArch, unix.SYS_CLONE, []uint64{uint64(unix.SIGCHLD)}, false},
		{"a memory file", auditArch, unix.SYS_MEMFD_CREATE, []uint64{1, unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING | unix.MFD_NOEXEC_SEAL}, true},
		{"a memory file before Linux 6.3", auditArch, unix.SYS_MEMFD_CREATE, []uint64{1, unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING}, true},
		{"a memory file to execute", auditArch, unix.SYS_MEMFD_CREATE, []uint64{1, unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING | unix.MFD_EXEC}, false},
		{"to read what it has", auditArch, unix.SYS_PREAD64, nil, true},
		{"urgent", auditArch, unix.SYS_IOCTL, []uint64{3, unix.SIOCATMARK}, true},
		{"another ioctl", auditArch, unix.SYS_IOCTL, []uint64{3, unix.TIOCSTI}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			verdict, err := vm.Run(seccompData(c.arch, c.nr, c.args))
			if err != nil {
				t.Fatal(err)
			}
			want := unix.SECCOMP_RET_ERRNO | int(unix.EPERM)
			if c.want {
				want = unix.SECCOMP_RET_ALLOW
			}
			if verdict != want {
				t.Errorf("%#x, want %#x", verdict, want)
			}
		})
	}
}

// seccompData is a struct seccomp_data as the machine of package bpf reads it:
// each word of 32 bits big-endian, in its little-endian place.
func seccompData(arch, nr uint32, args []uint64) []byte {
	b := make([]byte, offsetArgs+6*8)
	binary.BigEndian.PutUint32(b[offsetNr:], nr)
	binary.BigEndian.PutUint32(b[offsetArch:], arch)
	for i, a := range args {
		binary.BigEndian.PutUint32(b[offsetArgs+8*i:], uint32(a))
		binary.BigEndian.PutUint32(b[offsetArgs+8*i+4:], uint32(a>>32))
	}
	return b
}
