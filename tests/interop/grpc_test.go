package interop

import (
	"fmt"
	"path/filepath"
	"testing"
)

// grpcCases are the interoperability tests that need neither TLS nor a cloud, by
// the names of gRPC's doc/interop-test-descriptions.md.
var grpcCases = []string{
	"empty_unary", "large_unary", "client_streaming", "server_streaming", "ping_pong", "empty_stream",
	"timeout_on_sleeping_server", "cancel_after_begin", "cancel_after_first_response",
	"status_code_and_message", "special_status_message", "unimplemented_method", "unimplemented_service",
	"custom_metadata", "rpc_soak", "channel_soak",
}

const grpcPort = 10000

var toGRPC = declare("grpc", grpcPort, "kubernetes.io/h2c")

func TestGRPCPassesItsOwnInteroperabilityTests(t *testing.T) {
	throughBoth(t)
	tools := filepath.Join(filepath.Dir(programs.Proxy), grpcTools)
	serve(t, called, filepath.Join(tools, "server"), "-port", fmt.Sprint(grpcPort))
	listens(t, called, on(grpcPort))
	for name, to := range map[string]address{
		"declared":   addressOf(toGRPC),
		"undeclared": addressOf(on(grpcPort)),
	} {
		t.Run(name, func(t *testing.T) {
			for _, c := range grpcCases {
				t.Run(c, func(t *testing.T) {
					mustCall(t, nil, filepath.Join(tools, "client"), "-server_host", to.host, "-server_port", to.port, "-test_case", c,
						"-soak_iterations", "20", "-soak_overall_timeout_seconds", "20")
				})
			}
		})
	}
}
