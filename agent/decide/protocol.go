package decide

import (
	"strings"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// protocols are the names whose meaning is known: those of KEP-3726 and IANA for
// appProtocol, and the prefixes of port names that Istio has.
var protocols = map[string]route.Protocol{
	"http": route.HTTP, "grpc-web": route.HTTP, "kubernetes.io/ws": route.HTTP,
	"http2": route.HTTP2, "h2c": route.HTTP2, "grpc": route.HTTP2, "kubernetes.io/h2c": route.HTTP2,
	"tcp": route.Opaque, "tls": route.Opaque, "https": route.Opaque, "kubernetes.io/wss": route.Opaque,
	"mongo": route.Opaque, "mysql": route.Opaque, "redis": route.Opaque,
}

// ProtocolOf says what a Service's port is declared to carry: by its appProtocol,
// else by its name up to the first "-".
//
// An appProtocol that is not known is a service name of IANA's, none of them HTTP,
// and opaque; with a prefix it is somebody's own, and says nothing.
func ProtocolOf(p model.ServicePort) route.Protocol {
	if p.AppProtocol != "" {
		known, ok := protocols[strings.ToLower(p.AppProtocol)]
		if !ok && !strings.Contains(p.AppProtocol, "/") {
			return route.Opaque
		}
		return known
	}
	name := strings.ToLower(p.Name)
	if name == "grpc-web" || strings.HasPrefix(name, "grpc-web-") {
		return route.HTTP
	}
	prefix, _, _ := strings.Cut(name, "-")
	return protocols[prefix]
}

// carried is what a port carries as a backend of routes of a kind: they know more
// than a name does. It is false if the port is declared, by appProtocol, to carry
// what such a route cannot send.
func carried(k route.Kind, p model.ServicePort) (route.Protocol, bool) {
	declared := ProtocolOf(p)
	switch {
	case k == route.TCPRoute:
		return declared, true
	case declared == route.Opaque && p.AppProtocol != "":
		return declared, false
	case k == route.GRPCRoute:
		return route.HTTP2, !strings.EqualFold(p.AppProtocol, "kubernetes.io/ws")
	case declared == route.Opaque:
		return route.Undeclared, true
	}
	return declared, true
}
