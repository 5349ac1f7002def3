// Package pod plays a node with pods, without a cluster: a program that calls
// Isolate runs again in namespaces of its own, where pods are network
// namespaces that libcni takes through a real CNI chain, and where weir-agent
// runs in standalone mode.
//
// The node is the program's own PID, mount and network namespace. Nothing of it
// shows on the machine, two of them do not meet, and however the program ends
// the kernel ends what ran in them; only cgroups are left to remove, and Isolate
// does that.
//
// The way through it: Isolate (outside) → Enter (inside) → StartAgent →
// NewChain → Add. It is not a test bed for what kubelet or a container runtime
// do: tests/cluster is.
package pod
