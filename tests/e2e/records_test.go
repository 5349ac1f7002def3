package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/telemetry"
	"github.com/weirmesh/weir/tests/e2e/app/report"
)

// records reads what all proxies have recorded: the output of the agents, in the
// files where kubelets keep it.
func records() ([]telemetry.Record, error) {
	var all []telemetry.Record
	for _, node := range bed.Nodes {
		files, err := filepath.Glob(filepath.Join(node.Path("/var/log/pods"), weirNamespace+"_"+agentName+"-*", "agent", "*.log"))
		if err != nil {
			return nil, err
		}
		for _, file := range files {
			some, err := readRecords(file)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
			all = append(all, some...)
		}
	}
	return all, nil
}

// readRecords reads a file of the CRI's log format: time, stream, "F" for a full
// line, and the line. What the agent logs for people is on the other stream.
func readRecords(file string) ([]telemetry.Record, error) {
	in, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	var all []telemetry.Record
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		fields := strings.SplitN(lines.Text(), " ", 4)
		if len(fields) != 4 || fields[1] != "stdout" {
			continue
		}
		var r telemetry.Record
		if err := json.Unmarshal([]byte(fields[3]), &r); err != nil {
			return nil, fmt.Errorf("%s: %q: %w", file, fields[3], err)
		}
		all = append(all, r)
	}
	return all, lines.Err()
}

// waitRecord waits for a record and returns it.
func waitRecord(t *testing.T, what string, is func(telemetry.Record) bool) telemetry.Record {
	t.Helper()
	var found telemetry.Record
	eventually(t, soon, "a record of "+what, func() error {
		all, err := records()
		if err != nil {
			return err
		}
		for _, r := range all {
			if is(r) {
				found = r
				return nil
			}
		}
		return fmt.Errorf("none of %d is", len(all))
	})
	return found
}

// hop is one connection from an application to an application, as the two
// proxies on its way recorded it.
type hop struct{ out, in telemetry.Record }

// index finds records by the address their connection came from. Ports come
// around again, so a time belongs to every question.
type index map[string][]telemetry.Record

func newIndex(all []telemetry.Record) index {
	x := index{}
	for _, r := range all {
		x[r.Client] = append(x[r.Client], r)
	}
	return x
}

// at returns the records of connections from an address that began within a
// request's time.
func (x index) at(client string, r report.Result) []telemetry.Record {
	var out []telemetry.Record
	for _, record := range x[client] {
		const clocks = 50 * time.Millisecond // proxies note the time when they accept
		if !record.Timestamp.Before(r.Start.Add(-clocks)) && !record.Timestamp.After(r.Start.Add(r.Took+clocks)) {
			out = append(out, record)
		}
	}
	return out
}

// during returns the inbound record of what the proxy's connection carried for one of its
// requests: the first that began within the request's time. One that follows on the
// connection may begin before this one's record is closed. The nodes share a clock.
func (x index) during(out telemetry.Record) []telemetry.Record {
	ends := out.Timestamp.Add(time.Duration(out.TimeTotal * float64(time.Second)))
	var in []telemetry.Record
	for _, r := range x[out.UpstreamLocal] {
		// The caller's own connection to a Service may have the same port as the proxy's.
		if r.Direction != "inbound" || r.Timestamp.Before(out.Timestamp) || r.Timestamp.After(ends) {
			continue
		}
		if len(in) == 0 || r.Timestamp.Before(in[0].Timestamp) {
			in = []telemetry.Record{r}
		}
	}
	return in
}

// follow finds the way of one answered request through exactly two proxies: the
// caller's took the connection from the address that the caller had, the
// callee's took the one that the caller's made, and the callee's application saw
// the one that its proxy made: had a third taken that, it would have seen the
// third's.
func (x index) follow(r report.Result) (hop, error) {
	if r.Answer == nil {
		return hop{}, errNoAnswer
	}
	// The proxy's own connections to endpoints may have the same port as the caller's.
	outs := slices.DeleteFunc(x.at(r.Local, r), func(r telemetry.Record) bool { return r.Direction != "outbound" })
	if len(outs) != 1 {
		return hop{}, fmt.Errorf("the caller's connection from %s has %d outbound records, want one: %+v", r.Local, len(outs), outs)
	}
	out := outs[0]
	ins := x.during(out)
	if len(ins) != 1 {
		return hop{}, fmt.Errorf("the proxy's connection from %s has %d inbound records, want one", out.UpstreamLocal, len(ins))
	}
	in := ins[0]
	switch {
	case out.Upstream != in.Server:
		return hop{}, fmt.Errorf("the caller's proxy called %s, the callee's was called at %s", out.Upstream, in.Server)
	case in.UpstreamLocal != r.Answer.Client:
		return hop{}, fmt.Errorf("the callee's proxy called it from %s, it saw %s", in.UpstreamLocal, r.Answer.Client)
	}
	return hop{out, in}, nil
}

// followAll follows each answered request, waiting for records to come in.
func followAll(t *testing.T, results []report.Result) []hop {
	t.Helper()
	var hops []hop
	eventually(t, soon, "records of each request at two proxies", func() error {
		all, err := records()
		if err != nil {
			return err
		}
		x := newIndex(all)
		hops = nil
		for _, r := range results {
			h, err := x.follow(r)
			if err != nil {
				return err
			}
			hops = append(hops, h)
		}
		return nil
	})
	return hops
}
