package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"runtime"
	"strings"

	"github.com/weirmesh/weir/agent/attachpb"
	"golang.org/x/sys/unix"
)

// openNamespace opens the pod's network namespace and makes sure that it is one,
// and not the node's own.
func openNamespace(path string) (*os.File, error) {
	f, err := os.Open(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, attachpb.WrongNamespace.Fail("network namespace %s is gone", path)
	case err != nil:
		return nil, attachpb.WrongNamespace.Fail("network namespace: %v", err)
	}
	if err := checkNamespace(f); err != nil {
		f.Close()
		return nil, attachpb.WrongNamespace.Fail("%s is %v", path, err)
	}
	return f, nil
}

func checkNamespace(f *os.File) error {
	// NS_GET_NSTYPE, since Linux 4.11. A mount point that lost its namespace is a
	// plain file, for which this fails.
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		return errors.New("not a network namespace")
	}
	mine, err := os.Stat("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if os.SameFile(mine, info) {
		return errors.New("the node's own network namespace, not a pod's")
	}
	return nil
}

// inNamespace runs f on a thread in the namespace: sockets it opens and processes
// it starts are there. The thread is not unlocked, so it ends with its goroutine
// and is never used for anything else.
func inNamespace(ns *os.File, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}

// prepare makes the calling thread's namespace fit for captured traffic. None of
// it is undone after a failure: it changes nothing for a pod without rules, and
// the runtime throws the namespace away.
func prepare() error {
	if err := loopbackUp(); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return checkIPv6Loopback()
}

// loopbackUp sets lo up. Outbound connections are redirected to lo, and hang
// while it is down, as it is when libcni runs a chain alone; containerd 2.4 runs
// its loopback plugin beside the chain, not before it.
func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(s, unix.SIOCGIFFLAGS, req); err != nil {
		return err
	}
	if req.Uint16()&unix.IFF_UP != 0 {
		return nil
	}
	req.SetUint16(req.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, req)
}

// checkIPv6Loopback refuses a pod that has IPv6 but not on lo: IPv6 connections
// are redirected to ::1, and without it they time out.
func checkIPv6Loopback() error {
	off, err := os.ReadFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
	if err != nil || strings.TrimSpace(string(off)) != "1" {
		return nil // no IPv6 in this kernel, or all is well
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		// A link-local address is there wherever IPv6 is switched on; a pod with no
		// other has nobody to talk to.
		if ip, ok := a.(*net.IPNet); ok && ip.IP.To4() == nil && ip.IP.IsGlobalUnicast() {
			return attachpb.Unsupported.Fail("the pod has the IPv6 address %s, and net.ipv6.conf.lo.disable_ipv6 is 1 in it, so that its IPv6 connections could not be turned aside", ip.IP)
		}
	}
	return nil
}

// keepHalfClosed gives conntrack an hour for connections that one side has
// closed, in seconds: by default it forgets their translation after one or two
// minutes, and what the other side still sends is answered by a reset. Keepalives
// of the proxy renew it long before.
//
// This must come after the rules: their ct expressions load conntrack where it is
// a module, and only then are these files there. They are the calling thread's
// namespace's. That one is missing or cannot be written (a read-only /proc/sys)
// fails ADD: it would break exactly the connections that are long and rare, and
// nobody would know why.
func keepHalfClosed() error {
	for _, file := range halfClosedTimeouts {
		if err := os.WriteFile(file, []byte(halfClosedTimeout), 0); err != nil {
			return err
		}
	}
	return nil
}

var halfClosedTimeouts = []string{
	"/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait",
	"/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_fin_wait",
}

const halfClosedTimeout = "3600"

// unprepared names the first thing in the calling thread's namespace, rules apart,
// that is not as apply leaves it.
func unprepared() (string, error) {
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		return "", err
	}
	if lo.Flags&net.FlagUp == 0 {
		return "lo is down", nil
	}
	for _, file := range halfClosedTimeouts {
		have, err := os.ReadFile(file)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return "conntrack is not in use: there are no rules", nil
		case err != nil:
			return "", err
		case strings.TrimSpace(string(have)) != halfClosedTimeout:
			return fmt.Sprintf("sysctl %s is %s, not %s", strings.ReplaceAll(strings.TrimPrefix(file, "/proc/sys/"), "/", "."),
				strings.TrimSpace(string(have)), halfClosedTimeout), nil
		}
	}
	return "", nil
}
