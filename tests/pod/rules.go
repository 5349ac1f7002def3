package pod

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/plugin/capture"
)

// Rules is what weir-cni shows of a pod's namespace.
type Rules struct {
	Backend  string
	Rules    string // as text, a rule a line
	Counters map[string]capture.Counter
}

// Counting is the rule that steps a counter, or "" if there is none.
func (r Rules) Counting(counter string) string {
	for line := range strings.Lines(r.Rules) {
		if strings.Contains(line, "counter name "+strconv.Quote(counter)+" ") {
			return strings.TrimSpace(line)
		}
	}
	return ""
}

// ShowRules asks weir-cni for the rules in the pod's namespace.
func (p *Pod) ShowRules(ctx context.Context, b Binaries) (Rules, error) {
	cmd := exec.CommandContext(ctx, b.Plugin, "show", "--netns", p.Netns, "--json")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return Rules{}, fmt.Errorf("rules of %s: %w: %s", p.ID(), err, stderr.String())
	}
	var r Rules
	if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
		return Rules{}, fmt.Errorf("rules of %s: %w", p.ID(), err)
	}
	return r, nil
}
