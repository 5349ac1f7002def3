// Package environments tests Weir on nodes that are not like others: where the
// kernel balances before Weir sees a connection, where the agent's cgroup
// namespace is its own, where no program of the host may be executed, where state
// is lost, where pods have user namespaces. What Weir does on each is listed in
// manifests/ENVIRONMENTS.md.
//
// The tests run on a node of package pod, which TestMain isolates; each starts
// agents of its own. It has no kubelet and no containerd; tests/e2e has.
package environments
