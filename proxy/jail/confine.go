package jail

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Confine is the beginning of the second stage; afterwards the process can do
// what allowed says and nothing else.
func Confine(launched Launched) error {
	// Executing by descriptor leaves its number as the name. Cosmetic.
	name := [16]byte{'w', 'e', 'i', 'r', '-', 'p', 'r', 'o', 'x', 'y'}
	_ = unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&name)), 0, 0, 0)
	// Set again at every exec, hence not in the first stage: no core, no ptrace,
	// no /proc/PID/mem for another process of this uid.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("dumpable: %w", err)
	}
	unix.Umask(0o077)
	// Set already by the first stage; again costs nothing.
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	filter, err := program(auditArch, allowed(launched.KeepNetRaw))
	if err != nil {
		return err
	}
	return install(filter)
}

// allowed is what a Go program needs that serves and dials sockets and keeps its
// identity in memory files: no file can be opened, nothing executed, no process made.
// The rest fails with EPERM; the Go runtime takes that for "not available" where it
// merely asks. With bind, a proxy that keeps callers' addresses may choose the one
// that it dials from.
func allowed(bind bool) []rule {
	equal := func(argument, value uint32) condition { return condition{argument: argument, value: value} }
	when := func(nr uint32, conditions ...condition) rule { return rule{nr: nr, when: conditions} }
	stream := equal(1, unix.SOCK_STREAM|unix.SOCK_CLOEXEC)
	rules := []rule{
		// TCP sockets, made the way package upstream makes them.
		when(unix.SYS_SOCKET, equal(0, unix.AF_INET), stream),
		when(unix.SYS_SOCKET, equal(0, unix.AF_INET6), stream),
		// Threads, not processes.
		when(unix.SYS_CLONE, condition{argument: 0, value: unix.CLONE_THREAD, bits: true}),
		// The pod's identity, which is not executed; before Linux 6.3 that cannot be said.
		when(unix.SYS_MEMFD_CREATE, equal(1, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)),
		when(unix.SYS_MEMFD_CREATE, equal(1, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)),
		// Is the next byte urgent? (package relay)
		when(unix.SYS_IOCTL, equal(1, unix.SIOCATMARK)),
	}
	for _, nr := range []uint32{
		// Data, most frequent first.
		unix.SYS_SPLICE, unix.SYS_EPOLL_PWAIT, unix.SYS_FUTEX, unix.SYS_READ, unix.SYS_WRITE, unix.SYS_CLOSE,
		unix.SYS_RECVFROM, unix.SYS_SENDTO, unix.SYS_ACCEPT4, unix.SYS_CONNECT, unix.SYS_SHUTDOWN,
		unix.SYS_GETSOCKNAME, unix.SYS_GETPEERNAME, unix.SYS_GETSOCKOPT, unix.SYS_SETSOCKOPT,
		unix.SYS_RECVMSG, unix.SYS_SENDMSG, unix.SYS_READV, unix.SYS_WRITEV, unix.SYS_PREAD64,
		unix.SYS_PIPE2, unix.SYS_FCNTL, unix.SYS_EPOLL_CREATE1, unix.SYS_EPOLL_CTL, unix.SYS_EVENTFD2,
		// Memory.
		unix.SYS_MMAP, unix.SYS_MUNMAP, unix.SYS_MADVISE, unix.SYS_MPROTECT,
		// Time, threads, signals.
		unix.SYS_CLOCK_GETTIME, unix.SYS_NANOSLEEP, unix.SYS_SCHED_YIELD, unix.SYS_SCHED_GETAFFINITY, unix.SYS_GETRANDOM,
		unix.SYS_GETTID, unix.SYS_GETPID, unix.SYS_TGKILL, unix.SYS_SIGALTSTACK, unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK,
		unix.SYS_RT_SIGRETURN, unix.SYS_RESTART_SYSCALL, unix.SYS_EXIT, unix.SYS_EXIT_GROUP,
	} {
		rules = append(rules, rule{nr: nr})
	}
	if bind {
		rules = append(rules, rule{nr: unix.SYS_BIND})
	}
	return rules
}
