package launch_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestEveryProxyOfAnAttachmentKeepsWhatTheFirstKept: the rules stay, so each that
// takes another's place must do as they are made for.
func TestEveryProxyOfAnAttachmentKeepsWhatTheFirstKept(t *testing.T) {
	for keep, want := range map[bool]string{true: "CapEff:\t0000000000002000\nCapBnd:\t0000000000002000\n", false: "CapEff:\t0000000000000000\nCapBnd:\t0000000000000000\n"} {
		t.Run(fmt.Sprint(keep), func(t *testing.T) {
			n := newNode(t)
			ns, req := n.sandbox("c1")
			req.Spec.KeepClient = keep
			n.start(req)
			if err := n.manager.Commit("c1"); err != nil {
				t.Fatal(err)
			}
			has := func(what string) int {
				pid := n.pid("c1")
				status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
				if err != nil || !strings.Contains(string(status), want) {
					t.Errorf("%s lacks %q: %v\n%s", what, want, err, status)
				}
				return pid
			}
			first := has("the first")
			if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			if err := served(ns); err != nil {
				t.Fatal(err)
			}
			second := has("the second")
			n.manager.Close()
			if err := syscall.Kill(second, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			n.gone(second)
			n.open()
			if err := served(ns); err != nil {
				t.Fatal(err)
			}
			has("the third, of another agent")
		})
	}
}

// TestNode: with the real plugin callers' addresses can be kept here; with one
// that cannot, or whose routes are missing, the node does without.
func TestNode(t *testing.T) {
	n := newNode(t)
	plugin := n.opts.Plugin
	// The script is the plugin with a fault in what it does for a Spec that asks.
	faulty := func(fault string) string {
		script := fmt.Sprintf(`#!/bin/sh
if [ "$1" = show ]; then exec %[1]s "$@"; fi
spec=$(cat)
case $spec in *'"KeepClient":true'*) %[2]s ;; esac
echo "$spec" | %[1]s "$@"
`, plugin, fault)
		path := filepath.Join(t.TempDir(), "weir-cni")
		if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	withoutRoute := fmt.Sprintf(`echo "$spec" | %s "$@"; nsenter --net="$(echo "$spec" | sed 's/.*"Netns":"\([^"]*\)".*/\1/')" ip rule del pref 100; exit 0`, plugin)
	for name, c := range map[string]struct {
		plugin     string
		keep, want bool
		logged     string
	}{
		"as it is":          {plugin, true, true, ""},
		"turned off":        {plugin, false, false, ""},
		"refused":           {faulty("echo no nf_tables >&2; exit 1"), true, false, "no nf_tables"},
		"it does not work":  {faulty(withoutRoute), true, false, "connect from 203.0.113.9"},
		"faulty, not asked": {faulty("exit 1"), false, false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			n.opts.Plugin = c.plugin
			n.opts.Log = slog.New(slog.NewTextHandler(&log, nil))
			n.manager.Close()
			n.open()
			began := time.Now()
			got, err := n.manager.TestNode(t.Context(), c.keep)
			if err != nil || got != c.want {
				t.Errorf("%v, %v; want %v", got, err, c.want)
			}
			if !strings.Contains(log.String(), c.logged) || (c.logged == "") != (log.Len() == 0) {
				t.Errorf("logged %q, want %q", log.String(), c.logged)
			}
			t.Logf("took %s", time.Since(began))
		})
	}
}
