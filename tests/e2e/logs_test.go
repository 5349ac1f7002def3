package e2e

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// showLogs writes the ends of the logs that say why something failed.
func (b *testBed) showLogs(out io.Writer) {
	if b.Cluster == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, args := range [][]string{
		{"get", "nodes,pods", "-A", "-o", "wide"},
		{"-n", weirNamespace, "get", "events"},
	} {
		text, err := b.Kubectl(ctx, args...)
		if err != nil {
			text = []byte(err.Error())
		}
		fmt.Fprintf(out, "---- kubectl %s\n%s\n", strings.Join(args, " "), text)
	}
	for _, node := range b.Nodes {
		logs, err := filepath.Glob(filepath.Join(node.Path("/var/log/pods"), weirNamespace+"_*", "*", "*.log"))
		if err != nil {
			logs = nil
		}
		for _, path := range append(logs, node.Log("kubelet"), node.Log("containerd")) {
			fmt.Fprintf(out, "---- %s: the end of %s\n%s\n", node.Name, path, tail(path))
		}
	}
}

// tail returns the last lines of a log, without the records of connections.
func tail(path string) string {
	const lines = 40
	content, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	var kept []string
	for line := range strings.SplitSeq(strings.TrimSpace(string(content)), "\n") {
		if !strings.Contains(line, `"weir.direction"`) {
			kept = append(kept, line)
		}
	}
	return strings.Join(kept[max(0, len(kept)-lines):], "\n")
}

// describe says what is in a test's namespace.
func describe(ctx context.Context, namespace string) string {
	var all strings.Builder
	for _, what := range []string{"pods,services,endpointslices", "events"} {
		text, err := bed.Kubectl(ctx, "-n", namespace, "get", what, "-o", "wide")
		if err != nil {
			text = []byte(err.Error())
		}
		fmt.Fprintf(&all, "%s of %s:\n%s\n", what, namespace, text)
	}
	return all.String()
}
