package pod

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// CPUTime is what a process has used, all its threads and those that ended. The
// clock of a process is named by its PID (clock_getcpuclockid(3), and
// MAKE_PROCESS_CPUCLOCK in the kernel's posix-timers.h).
func CPUTime(pid int) (time.Duration, error) {
	const schedClock = 2 // CPUCLOCK_SCHED: nanoseconds, not ticks
	return Clock(int32(^pid<<3 | schedClock))
}

// Clock reads a clock of the kernel's (clock_gettime(2)).
func Clock(clock int32) (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(clock, &ts); err != nil {
		return 0, fmt.Errorf("CPU time: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}

// OriginalDestination is where a connection was going that was turned aside to the
// socket fd (SO_ORIGINAL_DST).
func OriginalDestination(fd int, v6 bool) (netip.AddrPort, error) {
	if v6 {
		// It begins with the sockaddr_in6 that is meant.
		info, err := unix.GetsockoptIPv6MTUInfo(fd, unix.SOL_IPV6, unix.SO_ORIGINAL_DST)
		if err != nil {
			return netip.AddrPort{}, err
		}
		port := binary.NativeEndian.AppendUint16(nil, info.Addr.Port)
		return netip.AddrPortFrom(netip.AddrFrom16(info.Addr.Addr), binary.BigEndian.Uint16(port)), nil
	}
	// It is as large as the sockaddr_in that is meant.
	req, err := unix.GetsockoptIPv6Mreq(fd, unix.SOL_IP, unix.SO_ORIGINAL_DST)
	if err != nil {
		return netip.AddrPort{}, err
	}
	m := req.Multiaddr
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(m[4:8])), binary.BigEndian.Uint16(m[2:4])), nil
}
