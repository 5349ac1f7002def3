// Package sock moves bytes in and out of sockets that do not block, without telling
// the scheduler.
//
// A system call that package syscall makes gives its processor away if it takes
// longer than some 20 µs, and wakes the runtime's monitor (sysmon), which then looks
// again every 20 µs for a while. Sending to a pod of the same node takes longer than
// that often enough, as the kernel walks the packet all the way to its receiver: the
// threads that take over, and the monitor, cost more than half of what a proxy does.
// The calls here end by themselves, so there is nothing to give away.
//
// Errors are unix.Errno; unix.EAGAIN where the socket has nothing, or no room.
package sock

import (
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Read reads into p, which is not empty. 0 is the end.
func Read(fd uintptr, p []byte) (int, error) {
	return result(unix.RawSyscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)),
		unix.MSG_DONTWAIT, 0, 0))
}

// Write writes p, which is not empty, as far as there is room. A peer that is gone
// is EPIPE and no signal.
func Write(fd uintptr, p []byte) (int, error) {
	return result(unix.RawSyscall6(unix.SYS_SENDTO, fd, uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)),
		unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0))
}

// Peek is Read that leaves the bytes where they are.
func Peek(fd uintptr, p []byte) (int, error) {
	return result(unix.RawSyscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)),
		unix.MSG_DONTWAIT|unix.MSG_PEEK, 0, 0))
}

// Splice moves up to n bytes from one descriptor to another, one of which is a pipe
// (splice(2)).
func Splice(from, to uintptr, n int) (int, error) {
	return result(unix.RawSyscall6(unix.SYS_SPLICE, from, 0, to, 0, uintptr(n), unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE))
}

// Nap lets time pass, and keeps the processor for it: other goroutines do not come up
// meanwhile. The kernel adds up to 50 µs (PR_SET_TIMERSLACK).
func Nap(d time.Duration) {
	ts := unix.NsecToTimespec(d.Nanoseconds())
	_, _, _ = unix.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&ts)), 0, 0) // a signal may end it early
}

// StaysHere says of a TCP socket that is not connected yet, or of all that a listener
// accepts, that its peer is in the same network namespace: there is no path whose capacity
// is to be found out. Reno, which every kernel has, sends as it is told to; BBR paces it by
// timers, which take up to a fifth of the CPU that bytes take, and go on if a connection
// is taken from it later. Where an administrator allows others only
// (net.ipv4.tcp_allowed_congestion_control), it stays as it is.
func StaysHere(fd uintptr) {
	_ = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno")
}

func result(n, _ uintptr, errno unix.Errno) (int, error) {
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
