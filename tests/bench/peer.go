package main

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
)

// portmapConf is the configuration of portmap, the chained plugin of most
// clusters: one host port of a pod, both families, by one of its backends.
const portmapConf = `{"cniVersion":"1.1.0","name":"weir-pods","type":"portmap","backend":"%s",` +
	`"runtimeConfig":{"portMappings":[{"hostPort":18080,"containerPort":8080,"protocol":"tcp"}]},` +
	`"prevResult":{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","mac":"02:00:00:00:00:01","sandbox":"%s"}],` +
	`"ips":[{"address":"10.244.0.9/16","interface":0},{"address":"fd00:10:244::9/64","interface":0}],"dns":{}}}`

// portmapBackends are its own names for them.
var portmapBackends = []string{"iptables", "nftables"}

func namePeer(backend string) string {
	return "another chained plugin: portmap ADD of one host port, " + backend
}

// peer runs another chained plugin, which asks nobody and starts nothing.
func (b *addBench) peer(ctx context.Context) error {
	return b.fresh(func(path string) error {
		for _, backend := range portmapBackends {
			for _, command := range []string{"ADD", "DEL"} {
				cmd := exec.CommandContext(ctx, filepath.Join(b.binaries.CNI, "portmap"))
				cmd.Env = []string{
					"CNI_COMMAND=" + command, "CNI_CONTAINERID=peer", "CNI_NETNS=" + path, "CNI_IFNAME=eth0",
					"CNI_PATH=" + b.binaries.CNI, "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
				}
				cmd.Stdin = strings.NewReader(fmt.Sprintf(portmapConf, backend, path))
				took, err := timed(cmd)
				if err != nil {
					return fmt.Errorf("%s: %w", namePeer(backend), err)
				}
				if command == "ADD" {
					b.note(namePeer(backend), took)
				}
			}
		}
		return nil
	})
}
