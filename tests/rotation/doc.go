// Package rotation proves, on a node of package pod with the real programs, that no
// request notices that certificates are renewed or that another CA takes over: captured
// pods call each other in a ring, on connections that stay and on new ones, while their
// proxies' certificates, which are good for a moment only, are renewed many times, and the
// operator changes the CA now and then.
//
// On a cluster, by way of the API server, tests/e2e does the same.
package rotation
