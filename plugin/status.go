package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/weirmesh/weir/agent/attachpb"
)

// status is CNI STATUS (1.1.0). It fails only until the agent has been ready
// once since the node booted, which a marker on a tmpfs tells. Failing whenever
// the agent does not answer would make each of its restarts a NotReady node, and
// a long one evictions.
func status(args *skel.CmdArgs) error {
	c, err := parseConf(args.StdinData)
	if err != nil {
		return err
	}
	marker := filepath.Join(filepath.Dir(c.Socket), readyMarker)
	switch _, err := os.Stat(marker); {
	case errors.Is(err, fs.ErrNotExist):
		return attachpb.NotReady.Fail("agent on %s has not been ready since this boot", node())
	case err != nil:
		return attachpb.NotReady.Fail("whether the agent on %s was ready cannot be seen: %v", node(), err)
	}
	return nil
}
