// Command weir-cni is a chained CNI plugin (specification 0.3.0 to 1.1.0) that
// turns a pod's TCP connections aside to the pod's own proxy.
//
// On ADD it asks the node's agent, which decides, starts the proxy and says what
// to capture; it puts the rules into the pod's network namespace and passes the
// previous plugin's result on. It decides nothing itself, knows no labels, talks
// to no API server and keeps no state. It is started for every pod of the node,
// so it must start in milliseconds: nothing is done before it is needed.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/weirmesh/weir/agent/attachpb"
)

func main() { os.Exit(run(os.Args[1:], os.Getenv, os.Stdout, os.Stderr)) }

const usage = `weir-cni %s: the CNI plugin of Weir, a service mesh

A container runtime runs it, chained behind the primary CNI plugin, with
CNI_COMMAND and its configuration on standard input. For people there is:

  weir-cni show --netns PATH [--json]   the capture rules in a network namespace, and what they counted

and for the agent:

  weir-cni repair                       compare, apply, release or delete rules, by the tasks on standard input

CNI versions: %s
`

// run is main without the process. Standard input, and standard output for
// results, are the process's own: package skel has it so.
func run(args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	if getenv("CNI_COMMAND") == "" {
		return runForPeople(args, stdout, stderr)
	}
	if err := skel.PluginMainFuncsWithError(commands(), versions(), ""); err != nil {
		e := explain(err)
		if err := e.Print(); err != nil {
			fmt.Fprintln(stderr, "weir: write the error to standard output:", err)
		}
		return 1
	}
	return 0
}

func runForPeople(args []string, stdout, stderr io.Writer) int {
	switch {
	case len(args) == 0:
		fmt.Fprintf(stderr, usage, pluginVersion(), strings.Join(versions().SupportedVersions(), ", "))
		return 0
	case args[0] == "show":
		return said(show(args[1:], stdout, stderr), stderr)
	case args[0] == "repair":
		return said(repair(args[1:], os.Stdin, stdout, stderr), stderr)
	}
	fmt.Fprintf(stderr, usage, pluginVersion(), strings.Join(versions().SupportedVersions(), ", "))
	fmt.Fprintf(stderr, "\nweir-cni: no command %q\n", args[0])
	return 2
}

// said prints an error and returns the exit code that goes with it.
func said(err error, stderr io.Writer) int {
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 1
	}
	return 0
}

func commands() skel.CNIFuncs {
	return skel.CNIFuncs{Add: coded(add), Del: coded(del), Check: coded(check), GC: coded(gc), Status: coded(status)}
}

// coded gives a command's errors their numbers; package skel would make 999 of
// all.
func coded(command func(*skel.CmdArgs) error) func(*skel.CmdArgs) error {
	return func(args *skel.CmdArgs) error {
		if err := command(args); err != nil {
			return explain(err)
		}
		return nil
	}
}

func versions() version.PluginInfo {
	return version.PluginSupports("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
}

func pluginVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// explain turns any error into the specification's form. Ours carry a code;
// those of package skel, found before any command of ours runs, are put into the
// same words.
func explain(err error) *types.Error {
	if f, ok := errors.AsType[*attachpb.Failure](err); ok {
		return types.NewError(f.Code.CNI, oneLine(f.Error()), "")
	}
	e, ok := errors.AsType[*types.Error](err)
	if !ok {
		return types.NewError(types.ErrInternal, oneLine("weir: "+err.Error()), "")
	}
	if strings.HasPrefix(e.Msg, "weir: ") {
		return e
	}
	if code, ok := skelCode(e.Code); ok {
		return types.NewError(e.Code, oneLine(code.Fail("%s", e.Error()).Error()), "")
	}
	return types.NewError(e.Code, oneLine("weir: "+e.Error()), "")
}

// skelCode finds our code for a number that package skel answers with.
func skelCode(cni uint) (attachpb.Code, bool) {
	switch cni {
	case types.ErrInvalidEnvironmentVariables:
		return attachpb.BadArgs, true
	case types.ErrDecodingFailure:
		return attachpb.BadInput, true
	case types.ErrInvalidNetworkConfig, types.ErrIncompatibleCNIVersion:
		return attachpb.BadConfig, true
	case types.ErrInvalidNetNS:
		return attachpb.WrongNamespace, true
	}
	return attachpb.Code{}, false
}

// oneLine is for kubelet, which shows the message in an event.
func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
