package launch

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Sandbox is a network namespace of the node that has no attachment.
type Sandbox struct {
	Name      string // in the host's /run/netns
	Addresses []netip.Addr
}

// inPlace begins the container IDs of sandboxes that were captured in place: they
// are known by their namespace's name, not by the runtime's for the container.
const inPlace = "netns-"

// firstIfName is a pod's interface; further ones are Multus'.
const firstIfName = "eth0"

// Request asks for a proxy in a sandbox that was found.
func (s Sandbox) Request() Request {
	return Request{ContainerID: inPlace + s.Name, IfName: firstIfName, Netns: "/run/netns/" + s.Name, Addresses: s.Addresses}
}

// InPlace reports whether the pod ran already when it was captured.
func (a Attachment) InPlace() bool { return strings.HasPrefix(a.ContainerID, inPlace) }

// Sandboxes looks through the host's network namespaces for those without an
// attachment. What cannot be opened is on its way in or out and left out.
func (m *Manager) Sandboxes() ([]Sandbox, error) {
	entries, err := os.ReadDir(m.opts.NetnsDir)
	if err != nil {
		return nil, err
	}
	attached := map[uint64]bool{m.host: true}
	for _, st := range m.List() {
		attached[st.NetnsInode] = true
	}
	var out []Sandbox
	for _, e := range entries {
		ns, err := openNamespace(filepath.Join(m.opts.NetnsDir, e.Name()))
		if err != nil {
			continue
		}
		if !attached[ns.inode] && ValidID(inPlace+e.Name()) == nil {
			if addrs, err := ns.addresses(); err == nil {
				out = append(out, Sandbox{Name: e.Name(), Addresses: addrs})
			}
		}
		ns.Close()
	}
	return out, nil
}

// addresses lists the namespace's addresses of global scope.
func (ns namespace) addresses() ([]netip.Addr, error) {
	h, err := netlink.NewHandleAt(netns.NsHandle(ns.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	list, err := h.AddrList(nil, unix.AF_UNSPEC)
	if err != nil {
		return nil, err
	}
	var out []netip.Addr
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.Unmap().IsGlobalUnicast() {
			out = append(out, ip.Unmap())
		}
	}
	return out, nil
}
