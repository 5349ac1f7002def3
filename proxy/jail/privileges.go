package jail

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// leaveFilesystem makes the root an empty read-only tmpfs and lets go of every
// mount that came along with the agent's, which a process in it would pin.
func leaveFilesystem() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// Any directory does; this one exists wherever /proc/self/exe was opened.
	const at = "/proc"
	err := unix.Mount("weir-proxy", at, "tmpfs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=4k,nr_inodes=2,mode=0555")
	if err != nil {
		return fmt.Errorf("mount an empty root: %w", err)
	}
	if err := unix.Chdir(at); err != nil {
		return fmt.Errorf("enter the empty root: %w", err)
	}
	// With both the same directory the old root ends up over the new one
	// (pivot_root(2), NOTES), where it can be detached.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach the old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("enter the empty root: %w", err)
	}
	return nil
}

// secureBits: uid 0 is no privilege (NOROOT), nothing can be made ambient
// (NO_CAP_AMBIENT_RAISE), and every bit is locked. setuid's own clearing of
// capabilities stays on. Numbers of linux/securebits.h, which x/sys lacks.
const secureBits = 1<<0 | 1<<1 | // NOROOT, locked
	1<<3 | // NO_SETUID_FIXUP, locked off
	1<<5 | // KEEP_CAPS, locked off
	1<<6 | 1<<7 // NO_CAP_AMBIENT_RAISE, locked

// capNetRaw is the one capability that a proxy may keep: with it, it may connect
// from addresses that are not the pod's.
const capNetRaw = uint32(1) << unix.CAP_NET_RAW

// dropPrivileges makes this thread an unprivileged one for good. Of capabilities
// it keeps those in keep, of the first 32, through the next execution too: they
// are ambient, and all there is in the bounding set.
func dropPrivileges(uid, gid int, keep uint32) error {
	if err := limitCapabilities(keep); err != nil {
		return err
	}
	// Raw calls: those of package unix change all threads, one by one.
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); errno != 0 {
		return fmt.Errorf("drop groups: %w", errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(gid), uintptr(gid), uintptr(gid)); errno != 0 {
		return fmt.Errorf("become gid %d: %w", gid, errno)
	}
	// Else setresuid empties the permitted set, of which the rest is dropped below.
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("keep capabilities: %w", err)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
		return fmt.Errorf("become uid %d: %w", uid, errno)
	}
	if err := setCapabilities(keep); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	return nil
}

// limitCapabilities leaves nothing but keep in the bounding set.
func limitCapabilities(keep uint32) error {
	for c := 0; c < 64; c++ {
		if c < 32 && keep&(1<<c) != 0 {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0)
		if err == unix.EINVAL {
			break // past the kernel's last one
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	return nil
}

// setCapabilities makes keep all that the thread has. The secure bits are locked
// after the ambient set is made, which they forbid, and before CAP_SETPCAP goes,
// which they need.
func setCapabilities(keep uint32) error {
	const setPCap = uint32(1) << unix.CAP_SETPCAP
	if err := capset(keep|setPCap, keep); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("ambient capabilities: %w", err)
	}
	for c := 0; c < 32; c++ {
		if keep&(1<<c) == 0 {
			continue
		}
		if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(c), 0, 0); err != nil {
			return fmt.Errorf("keep capability %d: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_SECUREBITS, secureBits, 0, 0, 0); err != nil {
		return fmt.Errorf("securebits: %w", err)
	}
	return capset(keep, keep)
}

// capset sets the first 32 capabilities of this thread; it has no other.
func capset(has, inheritable uint32) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	sets := [2]unix.CapUserData{{Effective: has, Permitted: has, Inheritable: inheritable}}
	if err := unix.Capset(&header, &sets[0]); err != nil {
		return fmt.Errorf("set capabilities %#x: %w", has, err)
	}
	return nil
}
