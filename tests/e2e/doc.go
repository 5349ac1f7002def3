// Package e2e holds Weir to its promises on a real Kubernetes: the cluster of
// package cluster, with Weir installed from its own image and manifests.
//
// TestMain brings the cluster up once, installs Weir, and takes everything down
// again, also on failure and on Ctrl-C. The promises are the table in
// promises_test.go. A test looks at three places that know nothing of each
// other: what applications saw (tests/e2e/app), what the proxies recorded (the
// agents' output), and what the kernel has (processes, namespaces, cgroups,
// rules). Each negative finding has a positive one beside it.
//
// To iterate, keep a cluster running and name its state folder:
//
//	go run ./tests/cluster/cmd/weir-cluster up -name dev
//	WEIR_CLUSTER=/var/tmp/weir-cluster/dev go test ./tests/e2e -run 'TestWeir/…'
//
// Weir is then installed anew and left there. This package needs root, the
// programs that package cluster needs, buildah and nginx-light.
package e2e
