// Package nft puts a capture.Ruleset into a network namespace by nf_tables over
// netlink, and reads it back.
//
// A Ruleset is encoded (encode.go) and sent in one transaction (apply.go); what
// the kernel holds is decoded to a Ruleset again (read.go, decode.go), so that
// whether there is anything to do is a comparison of two values. It needs no nft
// binary. It manages the table "inet weir" and nothing else; it is not a general
// nftables library.
//
// It needs inet nat (Linux 5.2) and socket cgroupv2 (5.13); without them errors
// answer to IsUnsupported. Rules must be loaded from the host's cgroup
// namespace: since 6.11, and in stable trees from 6.1, the kernel counts the
// cgroup's level from the loader's own, and would match nothing.
package nft

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/google/nftables"
	"github.com/weirmesh/weir/plugin/capture"
	"golang.org/x/sys/unix"
)

// Backend works on one network namespace.
type Backend struct {
	// NS is a file descriptor of the namespace; 0 is the namespace of the calling
	// thread, which the caller has locked.
	NS int
}

// Name is what the backend is called in configuration and records.
func (Backend) Name() string { return "nftables" }

func (b Backend) open() (*nftables.Conn, error) {
	opts := []nftables.ConnOption{nftables.AsLasting()}
	if b.NS != 0 {
		opts = append(opts, nftables.WithNetNSFd(b.NS))
	}
	conn, err := nftables.New(opts...)
	if err != nil {
		return nil, fmt.Errorf("nft: open netlink: %w", err)
	}
	return conn, nil
}

func table() *nftables.Table {
	return &nftables.Table{Name: capture.TableName, Family: nftables.TableFamilyINet}
}

// find looks for the table; nil means that there is none.
func find(conn *nftables.Conn) (*nftables.Table, error) {
	t, err := conn.ListTableOfFamily(capture.TableName, nftables.TableFamilyINet)
	switch {
	case err == nil:
		return t, nil
	// Without the inet family the kernel does not know the table either: that the
	// rules cannot be had shows when they are added.
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EAFNOSUPPORT):
		return nil, nil
	}
	return nil, fmt.Errorf("nft: list tables: %w", err)
}

// IsUnsupported says whether err means that the kernel cannot hold the rules at
// all, so that another backend may be tried: no nf_tables, no inet family, no
// inet nat, no socket cgroupv2. As a change is one transaction, nothing of it
// stayed behind.
func IsUnsupported(err error) bool {
	// No netlink family or no nf_tables subsystem; no inet family; no such
	// expression or option (socket, its cgroupv2 key); no such chain type or
	// expression, after the kernel tried to load its module (ENOENT: nothing that
	// Apply sends refers to an object that Apply did not make).
	for _, e := range []syscall.Errno{unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT, unix.EOPNOTSUPP, unix.ENOENT} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
