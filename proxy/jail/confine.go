package jail

import (
	"fmt"
	"unsafe"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"golang.org/x/sys/unix"
)

// Confine is the beginning of the second stage; afterwards the process can do
// what allowed says and nothing else.
func Confine() error {
	// Executing by descriptor leaves its number as the name. Cosmetic.
	name := [16]byte{'w', 'e', 'i', 'r', '-', 'p', 'r', 'o', 'x', 'y'}
	_ = unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&name)), 0, 0, 0)
	// Set again at every exec, hence not in the first stage: no core, no ptrace,
	// no /proc/PID/mem for another process of this uid.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("dumpable: %w", err)
	}
	unix.Umask(0o077)
	filter := seccomp.Filter{
		NoNewPrivs: true, // set already by the first stage; again costs nothing
		Flag:       seccomp.FilterFlagTSync,
		Policy:     allowed(),
	}
	if err := seccomp.LoadFilter(filter); err != nil {
		return fmt.Errorf("seccomp: %w", err)
	}
	return nil
}

// allowed is what a Go program needs that serves and dials sockets: no file can
// be opened, nothing executed, no process made. The rest fails with EPERM; the Go
// runtime takes that for "not available" where it merely asks.
func allowed() seccomp.Policy {
	equal := func(argument uint32, value uint64) seccomp.Condition {
		return seccomp.Condition{Argument: argument, Operation: seccomp.Equal, Value: value}
	}
	when := func(name string, conditions ...seccomp.Condition) seccomp.NameWithConditions {
		return seccomp.NameWithConditions{Name: name, Conditions: conditions}
	}
	stream := equal(1, unix.SOCK_STREAM|unix.SOCK_CLOEXEC)
	return seccomp.Policy{
		DefaultAction: seccomp.ActionErrno,
		Syscalls: []seccomp.SyscallGroup{{
			Action: seccomp.ActionAllow,
			Names: []string{
				// Data, most frequent first.
				"splice", "epoll_pwait", "futex", "read", "write", "close",
				"recvfrom", "sendto", "accept4", "connect", "shutdown",
				"getsockname", "getpeername", "getsockopt", "setsockopt",
				"recvmsg", "sendmsg", "readv", "writev",
				"pipe2", "fcntl", "epoll_create1", "epoll_ctl", "eventfd2",
				// Memory.
				"mmap", "munmap", "madvise", "mprotect",
				// Time, threads, signals.
				"clock_gettime", "nanosleep", "sched_yield", "sched_getaffinity", "getrandom",
				"gettid", "getpid", "tgkill", "sigaltstack", "rt_sigaction", "rt_sigprocmask",
				"rt_sigreturn", "restart_syscall", "exit", "exit_group",
			},
			NamesWithCondtions: []seccomp.NameWithConditions{
				// TCP sockets, made the way package upstream makes them.
				when("socket", equal(0, unix.AF_INET), stream),
				when("socket", equal(0, unix.AF_INET6), stream),
				// Threads, not processes.
				when("clone", seccomp.Condition{Argument: 0, Operation: seccomp.BitsSet, Value: unix.CLONE_THREAD}),
				// Is the next byte urgent? (package relay)
				when("ioctl", equal(1, unix.SIOCATMARK)),
			},
		}},
	}
}
