package interop

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/weirmesh/weir/agent/telemetry"
	"github.com/weirmesh/weir/tests/pod"
)

// recordsOf waits for what both proxies recorded, in the access log from that byte
// on, of a connection that a pod made to an address, or of a request on it. Of
// several it finds one.
func recordsOf(t *testing.T, from int, client *pod.Pod, to netip.AddrPort) (telemetry.Record, telemetry.Record) {
	t.Helper()
	var out, in telemetry.Record
	eventually(t, patience, fmt.Sprintf("records of the way to %s", to), func() error {
		all, err := parseRecords(accessLog.String()[from:])
		if err != nil {
			return err
		}
		for _, out = range all {
			if out.Direction != "outbound" || out.Pod != client.ID() || out.Server != to.String() {
				continue
			}
			for _, in = range all {
				if in.Direction == "inbound" && in.Pod == called.ID() && in.Server == out.Upstream && hostOf(in.Client) == client.Address(to.Addr().Is6()) {
					return nil
				}
			}
		}
		return errors.New("there are none of both proxies")
	})
	return out, in
}

// hostOf is the address in one with a port.
func hostOf(addrPort string) netip.Addr {
	a, _ := netip.ParseAddrPort(addrPort)
	return a.Addr()
}

// parseRecords reads the whole lines of an access log.
func parseRecords(log string) ([]telemetry.Record, error) {
	var all []telemetry.Record
	for line := range strings.Lines(log[:strings.LastIndexByte(log, '\n')+1]) {
		var r telemetry.Record
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			return nil, fmt.Errorf("%q: %w", line, err)
		}
		all = append(all, r)
	}
	return all, nil
}
