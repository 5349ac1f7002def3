// Package chain tests, on a node of package pod with the real programs, what a
// container runtime asks of the CNI chain again and again: that attachments leave
// nothing behind (cycles), that no packet of a captured pod gets away before its
// rules (first packets), and that every verb does what it should in every version
// of the specification.
//
// The tests run inside the node: TestMain isolates this very program. It has no
// kubelet and no containerd; tests/e2e has.
package chain
