// Package cluster runs a real Kubernetes of several nodes on one machine, for
// tests: kubelet, containerd, kube-proxy, CoreDNS and the control plane are the
// real programs, built from their Go modules; only the machines are pretended.
//
// A machine is a set of namespaces (network, mount, PID, hostname, IPC) held
// open by a process that does nothing, and a cgroup. One machine, the fabric,
// carries the control plane and the bridge; each node is a machine with a veth
// to that bridge and a /run, /etc, /opt, /var/lib and /var/log of its own.
// Nothing here has a route to the host's uplink: the host sees one veth, over
// which it reaches the API server.
//
// Data flow: Build makes the binaries, once per version, in a cache outside the
// repository. Up writes certificates and configuration to a state folder,
// makes the machines and starts their processes; every process is noted there,
// so that Attach and Down work from another process, and after a crash. Images
// come from BuildImage or any other tool's archive, and reach the nodes by
// LoadImage: there is no registry.
//
// It is not for production, not for machines other than Linux, and not a
// replacement for kind where containers and registries can be used. It needs
// root and a machine whose cgroup v2 tree is mounted.
package cluster
