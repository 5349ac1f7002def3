package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"time"
)

// talk keeps one connection to an echo server, says a line every -interval and
// waits for it to come back, -n times or until its standard input ends. It says so once
// the first has. Any failure ends it, with an error: without one, all lines have come back.
func talk(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("app talk", flag.ContinueOnError)
	flags.SetOutput(stderr)
	interval := flags.Duration("interval", 50*time.Millisecond, "pause between lines")
	n := flags.Int("n", 0, "lines to say; 0: until standard input ends")
	word := flags.String("word", "line", "what each line begins with")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 {
		return errors.New("talk needs one address")
	}
	conn, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", flags.Arg(0))
	if err != nil {
		return err
	}
	defer conn.Close()

	if *n == 0 {
		ctx = untilEOF(ctx, stdin)
	}
	lines := bufio.NewReader(conn)
	for i := 1; ; i++ {
		if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
			return err
		}
		said := fmt.Sprintf("%s %d\n", *word, i)
		if _, err := io.WriteString(conn, said); err != nil {
			return fmt.Errorf("line %d: %w", i, err)
		}
		heard, err := lines.ReadString('\n')
		if err != nil {
			return fmt.Errorf("line %d: %w", i, err)
		}
		if heard != said {
			return fmt.Errorf("line %d: heard %q", i, heard)
		}
		if i == 1 {
			fmt.Fprintln(stdout, "connected", conn.LocalAddr(), conn.RemoteAddr())
		}
		if i == *n || sleep(ctx, *interval) != nil {
			fmt.Fprintln(stdout, "lines", i)
			return nil
		}
	}
}
