package decide

import (
	"testing"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

func TestWhatAPortIsDeclaredToCarry(t *testing.T) {
	for _, tt := range []struct {
		app, name string
		want      route.Protocol
	}{
		{"", "", route.Undeclared},
		{"", "web", route.Undeclared},
		{"", "http", route.HTTP},
		{"", "http-web", route.HTTP},
		{"", "httpweb", route.Undeclared},
		{"", "HTTP-web", route.HTTP},
		{"", "http2-x", route.HTTP2},
		{"", "grpc", route.HTTP2},
		{"", "grpc-x", route.HTTP2},
		{"", "grpc-web", route.HTTP},
		{"", "grpc-web-x", route.HTTP},
		{"", "grpc-webs", route.HTTP2},
		{"", "tcp-x", route.Opaque},
		{"", "tls", route.Opaque},
		{"", "https-x", route.Opaque},
		{"", "mysql", route.Opaque},
		{"", "redis-x", route.Opaque},
		{"", "mongo", route.Opaque},
		{"http", "tcp-x", route.HTTP},
		{"HTTP", "", route.HTTP},
		{"http2", "", route.HTTP2},
		{"grpc", "", route.HTTP2},
		{"kubernetes.io/h2c", "", route.HTTP2},
		{"kubernetes.io/ws", "", route.HTTP},
		{"kubernetes.io/wss", "", route.Opaque},
		{"tcp", "http", route.Opaque},
		{"https", "", route.Opaque},
		{"tls", "", route.Opaque},
		{"postgresql", "http", route.Opaque},
		{"example.com/own", "http", route.Undeclared},
	} {
		if got := ProtocolOf(model.ServicePort{Name: tt.name, AppProtocol: tt.app}); got != tt.want {
			t.Errorf("appProtocol %q, name %q: %d, want %d", tt.app, tt.name, got, tt.want)
		}
	}
}
