package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"time"

	"github.com/weirmesh/weir/tests/e2e/app/report"
)

// client asks over one IP family ("tcp4", "tcp6") or any ("tcp").
type client struct {
	network string
	timeout time.Duration
	host    string // of the request; empty: the URL's
}

// get asks each URL in turn, -n times or until its standard input ends, and
// prints a line for each. It fails when a request failed.
func get(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("app get", flag.ContinueOnError)
	flags.SetOutput(stderr)
	c := client{}
	flags.StringVar(&c.network, "network", "tcp", "tcp, tcp4 or tcp6")
	flags.StringVar(&c.host, "host", "", "`host` of the request, if not the URL's")
	flags.DurationVar(&c.timeout, "timeout", 5*time.Second, "of one request")
	n := flags.Int("n", 1, "requests for each URL; 0: until standard input ends")
	interval := flags.Duration("interval", 0, "pause between requests")
	retry := flags.Duration("retry", 0, "how long to ask again after a failure; only the last attempt is printed")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() == 0 {
		return errors.New("get needs a URL")
	}
	if *n == 0 {
		ctx = untilEOF(ctx, stdin)
	}
	out := json.NewEncoder(stdout)
	failures := 0
	for i := 0; *n == 0 || i < *n; i++ {
		for _, url := range flags.Args() {
			result := c.insist(ctx, url, *retry)
			if ctx.Err() != nil {
				// What was under way when it was told to end is not a result.
				return failed(failures)
			}
			if result.Error != "" {
				failures++
			}
			if err := out.Encode(result); err != nil {
				return err
			}
		}
		if sleep(ctx, *interval) != nil {
			return failed(failures)
		}
	}
	return failed(failures)
}

func failed(n int) error {
	if n == 0 {
		return nil
	}
	return fmt.Errorf("%d requests failed", n)
}

// untilEOF returns a context that ends when in does: whoever holds the other
// end says when it is enough.
func untilEOF(ctx context.Context, in io.Reader) context.Context {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		_, _ = io.Copy(io.Discard, in)
		cancel()
	}()
	return ctx
}

func (c client) insist(ctx context.Context, url string, retry time.Duration) report.Result {
	for began := time.Now(); ; {
		result := c.ask(ctx, url)
		if result.Error == "" || time.Since(began) > retry || sleep(ctx, 100*time.Millisecond) != nil {
			return result
		}
	}
}

// ask sends one request on a connection of its own.
func (c client) ask(ctx context.Context, url string) report.Result {
	result := report.Result{URL: url, Start: time.Now()}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	err := c.exchange(ctx, url, &result)
	if err != nil {
		result.Error = err.Error()
	}
	result.Took = time.Since(result.Start)
	return result
}

func (c client) exchange(ctx context.Context, url string, result *report.Result) error {
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, c.network, address)
		},
	}
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		result.Local, result.Remote = info.Conn.LocalAddr().String(), info.Conn.RemoteAddr().String()
	}})
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	request.Host = c.host
	response, err := transport.RoundTrip(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	result.Status, result.Header = response.StatusCode, response.Header
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	var answer report.Answer
	if json.Unmarshal(body, &answer) == nil {
		result.Answer = &answer
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("status %s: %.200s", response.Status, body)
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
