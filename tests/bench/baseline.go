package main

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

// baseline are the rules, of one address family, that a typical mesh puts into a
// pod with the iptables command: four chains, excluded ports, redirects to the
// proxy, and what its user sends let by. Each is one execution. %LOCAL% is the
// family's loopback address.
var baseline = []string{
	"-t nat -N MESH_INBOUND",
	"-t nat -N MESH_REDIRECT",
	"-t nat -N MESH_IN_REDIRECT",
	"-t nat -N MESH_OUTPUT",
	"-t nat -A MESH_REDIRECT -p tcp -j REDIRECT --to-ports 15001",
	"-t nat -A MESH_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006",
	"-t nat -A PREROUTING -p tcp -j MESH_INBOUND",
	"-t nat -A MESH_INBOUND -p tcp --dport 15020 -j RETURN",
	"-t nat -A MESH_INBOUND -p tcp --dport 15021 -j RETURN",
	"-t nat -A MESH_INBOUND -p tcp -j MESH_IN_REDIRECT",
	"-t nat -A OUTPUT -p tcp -j MESH_OUTPUT",
	"-t nat -A MESH_OUTPUT -o lo ! -d %LOCAL% -m owner --uid-owner 1337 -j MESH_IN_REDIRECT",
	"-t nat -A MESH_OUTPUT -m owner --uid-owner 1337 -j RETURN",
	"-t nat -A MESH_OUTPUT -d %LOCAL% -j RETURN",
	"-t nat -A MESH_OUTPUT -j MESH_REDIRECT",
}

// family is one address family's commands.
type family struct{ command, local string }

var families = []family{{"iptables", "127.0.0.1/32"}, {"ip6tables", "::1/128"}}

// flavours are iptables' two implementations.
var flavours = []string{"nft", "legacy"}

// checkIPTables makes sure that both flavours are there for both families.
func checkIPTables() error {
	for _, flavour := range flavours {
		for _, f := range families {
			if _, err := exec.LookPath(f.command + "-" + flavour); err != nil {
				return fmt.Errorf("the comparison needs iptables: apt-get install --no-install-recommends iptables: %w", err)
			}
		}
	}
	return nil
}

// cost is what something took.
type cost struct{ took, cpu time.Duration }

// execEach puts the baseline into the calling thread's namespace by one execution
// for each rule.
func execEach(ctx context.Context, flavour string) (cost, error) {
	var total cost
	for _, f := range families {
		for _, rule := range baseline {
			args := strings.Fields(strings.ReplaceAll(rule, "%LOCAL%", f.local))
			c, err := timed(exec.CommandContext(ctx, f.command+"-"+flavour, args...))
			if err != nil {
				return cost{}, err
			}
			total.took += c.took
			total.cpu += c.cpu
		}
	}
	return total, nil
}

// restore puts the baseline into the calling thread's namespace by one execution
// for each family.
func restore(ctx context.Context, flavour string) (cost, error) {
	var total cost
	for _, f := range families {
		cmd := exec.CommandContext(ctx, f.command+"-"+flavour+"-restore", "--noflush")
		cmd.Stdin = strings.NewReader(restoreInput(f))
		c, err := timed(cmd)
		if err != nil {
			return cost{}, err
		}
		total.took += c.took
		total.cpu += c.cpu
	}
	return total, nil
}

// restoreInput is the baseline as iptables-restore reads it.
func restoreInput(f family) string {
	var chains, rules strings.Builder
	for _, rule := range baseline {
		rule = strings.TrimPrefix(strings.ReplaceAll(rule, "%LOCAL%", f.local), "-t nat ")
		if chain, isNew := strings.CutPrefix(rule, "-N "); isNew {
			fmt.Fprintf(&chains, ":%s - [0:0]\n", chain)
		} else {
			fmt.Fprintln(&rules, rule)
		}
	}
	return "*nat\n" + chains.String() + rules.String() + "COMMIT\n"
}

// timed runs a command to its end.
func timed(cmd *exec.Cmd) (cost, error) {
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	began := time.Now()
	err := cmd.Run()
	took := time.Since(began)
	if err != nil {
		return cost{}, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, said.String())
	}
	return cost{took, cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()}, nil
}
