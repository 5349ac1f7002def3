package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/plugin/capture"
	"golang.org/x/sys/unix"
)

// What a namespace needs beside the rules for the proxy to connect to the
// application from the caller's own address: the application's socket must answer
// with the mark of what it was sent, and what has the mark must stay in here.
//
// None of it changes anything for packets without the mark, so it is put in
// before the rules and taken out after them.
const (
	clientTable      = 711 // of routes
	clientPreference = 100 // of the routing rule: after that of local addresses (0)

	// clientRemedy ends the error of an ADD that fails for want of any of it.
	clientRemedy = "the mesh option keepClientAddress: false does without the caller's address"
)

// clientSysctls are of the calling thread's namespace, below /proc/sys/net.
var clientSysctls = []string{
	"ipv4/tcp_fwmark_accept", // of both families; without it every connection times out
	"ipv4/fwmark_reflect",    // resets and ICMP errors in answer to marked packets
	"ipv6/fwmark_reflect",
}

// clientChanges are what prepareClient changed, to be undone in reverse.
type clientChanges struct{ undo []func() error }

// prepareClient sets the sysctls, then adds the routes. What is there already is
// left alone and is not undone. The thread is in the pod's namespace.
func prepareClient() (clientChanges, error) {
	var done clientChanges
	families := clientFamilies()
	for _, name := range clientSysctls {
		if strings.HasPrefix(name, "ipv6/") && !slices.Contains(families, unix.AF_INET6) {
			continue
		}
		if err := done.sysctl(name); err != nil {
			return done, fmt.Errorf("%w; %s", err, clientRemedy)
		}
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return done, fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	for _, family := range families {
		if err := done.route(h, family); err != nil {
			return done, fmt.Errorf("%w; %s", err, clientRemedy)
		}
	}
	return done, nil
}

// revert undoes the changes, the last one first.
func (c *clientChanges) revert() error {
	var failed []error
	for _, f := range slices.Backward(c.undo) {
		failed = append(failed, f())
	}
	c.undo = nil
	return errors.Join(failed...)
}

func (c *clientChanges) sysctl(name string) error {
	file := filepath.Join("/proc/sys/net", name)
	old, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if on(old) {
		return nil
	}
	if err := os.WriteFile(file, []byte("1"), 0); err != nil {
		return err
	}
	c.undo = append(c.undo, func() error { return os.WriteFile(file, old, 0) })
	return nil
}

func on(sysctl []byte) bool { return string(bytes.TrimSpace(sysctl)) == "1" }

// route adds the route, then the rule that leads to it.
func (c *clientChanges) route(h *netlink.Handle, family int) error {
	route, rule := clientRoute(family), clientRule(family)
	switch err := h.RouteAdd(route); {
	case err == nil:
		c.undo = append(c.undo, onHandle(func(h *netlink.Handle) error { return h.RouteDel(route) }))
	case !errors.Is(err, unix.EEXIST):
		return fmt.Errorf("add route %s: %w", route, err)
	}
	switch err := h.RuleAdd(rule); {
	case err == nil:
		c.undo = append(c.undo, onHandle(func(h *netlink.Handle) error { return h.RuleDel(rule) }))
	case !errors.Is(err, unix.EEXIST):
		return fmt.Errorf("add %s: %w", rule, err)
	}
	return nil
}

// onHandle runs f with a handle on the namespace of the thread that it is then on.
func onHandle(f func(*netlink.Handle) error) func() error {
	return func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		return f(h)
	}
}

// clientFamilies leaves IPv6 out where lo has none: checkIPv6Loopback has made
// sure that then the pod has no address of it either.
func clientFamilies() []int {
	off, err := os.ReadFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
	if errors.Is(err, fs.ErrNotExist) || on(off) {
		return []int{unix.AF_INET}
	}
	return []int{unix.AF_INET, unix.AF_INET6}
}

// clientRoute is "local default dev lo table 711".
func clientRoute(family int) *netlink.Route {
	all := net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
	if family == unix.AF_INET6 {
		all = net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return &netlink.Route{
		Family: family, LinkIndex: 1, // lo is the first interface of every namespace
		Dst: &all, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Table: clientTable,
	}
}

// clientRule is "pref 100 fwmark 0x711 lookup 711".
func clientRule(family int) *netlink.Rule {
	rule := netlink.NewRule()
	rule.Family, rule.Priority, rule.Mark, rule.Table = family, clientPreference, capture.ClientMark, clientTable
	return rule
}

// removeClientRoutes takes out what route put in, whoever's it was.
func removeClientRoutes() error {
	return onHandle(func(h *netlink.Handle) error {
		var failed []error
		for _, family := range clientFamilies() {
			for _, err := range []error{h.RuleDel(clientRule(family)), h.RouteDel(clientRoute(family))} {
				if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ESRCH) {
					failed = append(failed, fmt.Errorf("routes for callers' addresses: %w", err))
				}
			}
		}
		return errors.Join(failed...)
	})()
}

// unpreparedClient names the first thing that the thread's namespace lacks.
func unpreparedClient() (string, error) {
	missing, err := missingForClient()
	if err != nil || len(missing) == 0 {
		return "", err
	}
	return "keeping the caller's address needs " + missing[0] + ", which is not there", nil
}

// missingForClient names what the thread's namespace lacks of what prepareClient
// puts into it.
func missingForClient() ([]string, error) {
	missing := []string{}
	families := clientFamilies()
	for _, name := range clientSysctls {
		value, err := os.ReadFile(filepath.Join("/proc/sys/net", name))
		if strings.HasPrefix(name, "ipv6/") && !slices.Contains(families, unix.AF_INET6) {
			continue
		}
		if err != nil || !on(value) {
			missing = append(missing, "net."+strings.ReplaceAll(name, "/", ".")+"=1")
		}
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	for _, family := range families {
		name := map[int]string{unix.AF_INET: "IPv4", unix.AF_INET6: "IPv6"}[family]
		routes, err := h.RouteListFiltered(family, clientRoute(family),
			netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE|netlink.RT_FILTER_OIF)
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		if !slices.ContainsFunc(routes, everywhere) {
			missing = append(missing, fmt.Sprintf("%s route local default dev lo table %d", name, clientTable))
		}
		rules, err := h.RuleListFiltered(family, clientRule(family),
			netlink.RT_FILTER_TABLE|netlink.RT_FILTER_MARK|netlink.RT_FILTER_PRIORITY)
		if err != nil {
			return nil, fmt.Errorf("list routing rules: %w", err)
		}
		if len(rules) == 0 {
			missing = append(missing, fmt.Sprintf("%s rule pref %d fwmark %#x lookup %d", name, clientPreference, capture.ClientMark, clientTable))
		}
	}
	return missing, nil
}

// everywhere says whether a route is for every address.
func everywhere(r netlink.Route) bool {
	if r.Dst == nil {
		return true
	}
	bits, _ := r.Dst.Mask.Size()
	return bits == 0
}
