// Package interop proves on clients and servers that others wrote that the proxies
// are not noticed: curl, nginx, HAProxy, wrk, h2load, gRPC's own interoperability
// tests, WebSocket, Redis, MariaDB, PostgreSQL, Postfix, OpenSSH. It also sends what no
// server may see.
//
// All run in two captured pods of a node of package pod, with a real agent and
// weir-cni: each connection from one pod to the other goes through both pods'
// proxies, and each test sees that some did. Debian's packages are those of
// .ci/packages; gRPC's programs are pinned by a module of their own, in grpc.
package interop
