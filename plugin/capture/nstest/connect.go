package nstest

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// RewriteConnects has the kernel send connections that processes of a v2 cgroup,
// or of one below it, make to from to another address of the same family instead,
// while they connect: what a data plane does that replaces kube-proxy by a BPF
// program. It ends with the test, and with the test's process.
func RewriteConnects(t testing.TB, cgroup string, from, to netip.AddrPort) {
	t.Helper()
	dir, err := os.Open(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	attach := uint32(unix.BPF_CGROUP_INET6_CONNECT)
	if from.Addr().Is4() {
		attach = unix.BPF_CGROUP_INET4_CONNECT
	}
	program, err := loadConnect(attach, connectProgram(from, to))
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL):
		t.Skipf("no BPF programs of cgroups can be loaded here: %v", err)
	case err != nil:
		t.Fatalf("load a BPF program: %v", err) // EACCES: the kernel's verifier does not like it
	}
	defer unix.Close(program)
	// BPF_LINK_CREATE (Linux 5.7): what it attached goes with its descriptor.
	link, err := bpf(unix.BPF_LINK_CREATE, unsafe.Pointer(&struct{ program, target, attach, flags uint32 }{uint32(program), uint32(dir.Fd()), attach, 0}), 16)
	if err != nil {
		t.Fatalf("attach to cgroup %s: %v", cgroup, err)
	}
	t.Cleanup(func() { unix.Close(link) })
}

// instruction is one of eBPF's (RFC 9669, section 3).
type instruction struct {
	opcode   uint8
	dst, src uint8
	offset   int16
	value    uint32
}

// connectProgram is the program, in words of struct bpf_sock_addr (linux/bpf.h):
// the address is at 4 (IPv4) or 8 (IPv6), in network order, the port at 24.
func connectProgram(from, to netip.AddrPort) []instruction {
	const (
		load, store     = 0x61, 0x63 // 32 bits, memory
		skipUnlessEqual = 0x56       // 32 bits, by a value
		move32, move64  = 0xb4, 0xb7
		exit            = 0x95
		port            = 24
	)
	first := int16(8)
	if from.Addr().Is4() {
		first = 4
	}
	old, changed := from.Addr().AsSlice(), to.Addr().AsSlice()
	words := len(old) / 4
	word := func(b []byte, i int) uint32 { return binary.NativeEndian.Uint32(b[4*i:]) }
	var out []instruction
	for i := range words {
		toEnd := 2*(words-i-1) + 2*words + 2
		out = append(out,
			instruction{load, 2, 1, first + int16(4*i), 0},
			instruction{skipUnlessEqual, 2, 0, int16(toEnd), word(old, i)})
	}
	for i := range words {
		out = append(out,
			instruction{move32, 3, 0, 0, word(changed, i)},
			instruction{store, 1, 3, first + int16(4*i), 0})
	}
	network := binary.BigEndian.AppendUint16(nil, to.Port())
	return append(out,
		instruction{move32, 3, 0, 0, uint32(binary.NativeEndian.Uint16(network))},
		instruction{store, 1, 3, port, 0},
		instruction{move64, 0, 0, 0, 1}, // let it go on
		instruction{exit, 0, 0, 0, 0})
}

func loadConnect(attach uint32, program []instruction) (int, error) {
	var code []byte
	for _, i := range program {
		code = append(code, i.opcode, i.dst|i.src<<4)
		code = binary.NativeEndian.AppendUint16(code, uint16(i.offset))
		code = binary.NativeEndian.AppendUint32(code, i.value)
	}
	license := []byte("Apache-2.0\x00")
	attr := struct {
		kind, count             uint32
		code, license           uint64
		logLevel, logSize       uint32
		log                     uint64
		kernel, flags           uint32
		name                    [16]byte
		ifindex, expectedAttach uint32
	}{
		kind: unix.BPF_PROG_TYPE_CGROUP_SOCK_ADDR, count: uint32(len(program)),
		code: uint64(uintptr(unsafe.Pointer(&code[0]))), license: uint64(uintptr(unsafe.Pointer(&license[0]))),
		expectedAttach: attach,
	}
	fd, err := bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	runtime.KeepAlive(code)
	runtime.KeepAlive(license)
	return fd, err
}

// bpf is bpf(2); it returns a descriptor.
func bpf(command int, attr unsafe.Pointer, size uintptr) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(command), uintptr(attr), size)
	if errno != 0 {
		return -1, errno
	}
	unix.CloseOnExec(int(fd))
	return int(fd), nil
}
