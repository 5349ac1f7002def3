// Command app is what runs in the pods of the e2e tests: a small application
// that says who it is and whom it sees, and a client that says what it got. It
// knows nothing of Weir; its view of a connection is held against the records
// of the proxies.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"
)

const usage = `usage: app <command> [flags] [arguments]

  serve            answer HTTP, gRPC, and TCP echo
  get URL...       ask, and print one JSON line for each answer
  call ADDRESS     call by gRPC, and print one JSON line
  talk ADDRESS     keep one connection to an echo server and talk on it
  flood ADDRESS... start many connections at once, from ports that tell them from a proxy's
  sleep DURATION   do nothing
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "app:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return flag.ErrHelp
	}
	switch name, args := args[0], args[1:]; name {
	case "serve":
		return serve(ctx, args, stderr)
	case "get":
		return get(ctx, args, stdin, stdout, stderr)
	case "call":
		return call(ctx, args, stdout, stderr)
	case "talk":
		return talk(ctx, args, stdin, stdout, stderr)
	case "flood":
		return flood(args, stdout)
	case "sleep":
		return pause(ctx, args)
	default:
		fmt.Fprint(stderr, usage)
		return fmt.Errorf("no command %q", name)
	}
}

// pause returns after a while, or when it is told to end: both are fine.
func pause(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("sleep needs one duration, such as 1h")
	}
	d, err := time.ParseDuration(args[0])
	if err != nil {
		return err
	}
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
	return nil
}
