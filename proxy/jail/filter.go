package jail

import (
	"fmt"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// A seccomp filter, by hand: it is some sixty numbers, and the package that was
// used for it spent 1.3 ms of every start, of both stages, on tables of the system
// calls of all architectures.

// rule lets one system call by, if all of its conditions hold.
type rule struct {
	nr   uint32
	when []condition
}

// condition is about one argument: it is value, or has any of value's bits. Both
// compare all 64 bits; value has 32.
type condition struct {
	argument uint32
	value    uint32
	bits     bool
}

// Offsets in struct seccomp_data (seccomp(2)): int nr; __u32 arch; __u64
// instruction_pointer; __u64 args[6].
const (
	offsetNr   = 0
	offsetArch = 4
	offsetArgs = 16
)

// program renders rules for an architecture of little-endian byte order. What no
// rule lets by fails with EPERM.
func program(arch uint32, rules []rule) ([]bpf.Instruction, error) {
	load := func(offset uint32) bpf.Instruction { return bpf.LoadAbsolute{Off: offset, Size: 4} }
	const denied = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	out := []bpf.Instruction{
		load(offsetArch),
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: arch, SkipTrue: 1},
		bpf.RetConstant{Val: denied},
		load(offsetNr),
	}
	var plain []uint32
	for _, r := range rules {
		if len(r.when) == 0 {
			plain = append(plain, r.nr)
		}
	}
	if len(plain) > 255 { // a jump's reach
		return nil, fmt.Errorf("seccomp: %d system calls are too many", len(plain))
	}
	for i, nr := range plain {
		out = append(out, bpf.JumpIf{Cond: bpf.JumpEqual, Val: nr, SkipTrue: uint8(len(plain) - i)})
	}
	out = append(out, bpf.Jump{Skip: 1}, bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW})
	for _, r := range rules {
		if len(r.when) == 0 {
			continue
		}
		block := []bpf.Instruction{load(offsetNr), bpf.JumpIf{Cond: bpf.JumpEqual, Val: r.nr}}
		for _, c := range r.when {
			low := offsetArgs + 8*c.argument
			if c.bits {
				block = append(block, load(low), bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: c.value})
				continue
			}
			block = append(block,
				load(low+4), bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0},
				load(low), bpf.JumpIf{Cond: bpf.JumpEqual, Val: c.value})
		}
		block = append(block, bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW})
		for i, instruction := range block { // a condition that fails leads past the block
			if jump, ok := instruction.(bpf.JumpIf); ok {
				jump.SkipFalse = uint8(len(block) - i - 1)
				block[i] = jump
			}
		}
		out = append(out, block...)
	}
	return append(out, bpf.RetConstant{Val: denied}), nil
}

// install makes a program the filter of all threads of this process, for good.
// no_new_privs must be set.
func install(instructions []bpf.Instruction) error {
	raw, err := bpf.Assemble(instructions)
	if err != nil {
		return fmt.Errorf("seccomp: %w", err)
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	return nil
}
