// Package agent tells the node's agent that Weir is being taken off the node.
//
// It is one call, Attach.Leave, with nothing in it and a number in its answer; all
// else that goes over that socket is between the plugin and the agent.
package agent

import (
	"context"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/weirmesh/weir/install/unary"
)

// method is of agent/attachpb/attach.proto.
const method = "/weir.attach.v1.Attach/Leave"

// Leave has the agent behind a unix socket capture no pod any more and let go
// those that it has captured. It returns when they are, with the number of proxies
// that go on until the connections that they have end.
func Leave(ctx context.Context, socket string) (int, error) {
	answer, err := unary.Call(ctx, socket, method, nil)
	if err != nil {
		return 0, fmt.Errorf("the agent at %s: %w", socket, err)
	}
	for rest := answer; len(rest) > 0; {
		number, kind, size := protowire.ConsumeTag(rest)
		if size < 0 {
			return 0, fmt.Errorf("the agent at %s: %w", socket, protowire.ParseError(size))
		}
		rest = rest[size:]
		if number == 1 && kind == protowire.VarintType {
			draining, size := protowire.ConsumeVarint(rest)
			return int(draining), protowire.ParseError(min(size, 0))
		}
		if size = protowire.ConsumeFieldValue(number, kind, rest); size < 0 {
			return 0, fmt.Errorf("the agent at %s: %w", socket, protowire.ParseError(size))
		}
		rest = rest[size:]
	}
	return 0, nil
}
