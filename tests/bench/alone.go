package main

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
)

// exemptConf is weir-cni's configuration, behind a bridge that gave an address.
// kube-system is exempt by default: no agent is asked.
const exemptConf = `{"cniVersion":"1.1.0","name":"weir-pods","type":"weir-cni","prevResult":{"cniVersion":"1.1.0",` +
	`"interfaces":[{"name":"eth0","mac":"02:00:00:00:00:01","sandbox":"/run/netns/pod"}],` +
	`"ips":[{"address":"10.244.0.9/16","gateway":"10.244.0.1","interface":0}],"routes":[{"dst":"0.0.0.0/0"}],"dns":{}}}`

// alone runs the plugin with nothing to do but to start, read and answer.
func (b *addBench) alone(ctx context.Context) error {
	return b.fresh(func(path string) error {
		for _, c := range []struct {
			name, stdin string
			env         []string
		}{
			{nameVersion, `{"cniVersion":"1.1.0"}`, []string{"CNI_COMMAND=VERSION"}},
			{nameExempt, exemptConf, []string{
				"CNI_COMMAND=ADD", "CNI_CONTAINERID=exempt", "CNI_NETNS=" + path, "CNI_IFNAME=eth0", "CNI_PATH=/nowhere",
				"CNI_ARGS=K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=exempt",
			}},
		} {
			cmd := exec.CommandContext(ctx, b.binaries.Plugin)
			cmd.Env, cmd.Stdin = c.env, strings.NewReader(c.stdin)
			took, err := timed(cmd)
			if err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			b.note(c.name, took)
		}
		return nil
	})
}
