package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/plugin/capture/nft"
)

// shown is what show prints with --json. A namespace without rules has the
// backend "none".
type shown struct {
	Backend  string                     `json:"backend"`
	Rules    string                     `json:"rules"`
	Counters map[string]capture.Counter `json:"counters"`
	Client   *shownClient               `json:"client,omitempty"`
}

// shownClient is there where the rules let the proxy use the caller's address.
type shownClient struct {
	// Missing is what else that needs and the namespace lacks: where there is any
	// of it, inbound connections hang.
	Missing []string `json:"missing"`
}

// show prints the rules in a namespace, as they are in the kernel, and what they
// counted. It needs no nft binary.
func show(args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("weir-cni show", flag.ContinueOnError)
	flags.SetOutput(stderr)
	path := flags.String("netns", "", "`path` of the network namespace, like /run/netns/cni-… or /proc/PID/ns/net")
	asJSON := flags.Bool("json", false, "print JSON")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return nil
	case err != nil:
		return errors.New("weir: show: see the usage above")
	case *path == "" || flags.NArg() > 0:
		flags.Usage()
		return errors.New("weir: show: --netns PATH is needed, and nothing else")
	}
	ns, err := os.Open(*path)
	if err != nil {
		return fmt.Errorf("weir: show: %w", err)
	}
	defer ns.Close()
	out, err := readAny(ns)
	if err != nil {
		return fmt.Errorf("weir: show: %w", err)
	}
	if *asJSON {
		enc := json.NewEncoder(stdout)
		enc.SetEscapeHTML(false)
		return enc.Encode(out)
	}
	return out.print(stdout, *path)
}

// readAny reads the rules of whichever backend has any.
func readAny(ns *os.File) (shown, error) {
	var failed []error
	for _, b := range []backend{nft.Backend{}, newIPTables(os.TempDir(), filepath.Base(ns.Name()))} {
		var st capture.State
		var client *shownClient
		err := inNamespace(ns, func() error {
			var err error
			if st, err = b.Read(); err == nil && st.KeepsClient {
				client = &shownClient{}
				client.Missing, err = missingForClient()
			}
			return err
		})
		if err != nil {
			failed = append(failed, err)
		} else if st.Text != "" {
			return shown{b.Name(), st.Text, st.Counters, client}, nil
		}
	}
	// One backend that is missing is usual; both are not.
	if len(failed) == 2 {
		return shown{}, errors.Join(failed...)
	}
	return shown{Backend: "none", Counters: map[string]capture.Counter{}}, nil
}

func (s shown) print(w io.Writer, path string) error {
	if s.Backend == "none" {
		_, err := fmt.Fprintf(w, "no rules of Weir in %s: it is not captured\n", path)
		return err
	}
	if _, err := fmt.Fprintf(w, "%s\n%-14s %10s %12s\n", s.Rules, "counter", "packets", "bytes"); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(s.Counters)) {
		if _, err := fmt.Fprintf(w, "%-14s %10d %12d\n", name, s.Counters[name].Packets, s.Counters[name].Bytes); err != nil {
			return err
		}
	}
	if s.Client == nil {
		return nil
	}
	what := "\nthe application sees the caller's address"
	if len(s.Client.Missing) > 0 {
		what = "\ninbound connections hang: keeping the caller's address needs " + strings.Join(s.Client.Missing, ", ")
	}
	_, err := fmt.Fprintln(w, what)
	return err
}
