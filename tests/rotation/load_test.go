package rotation

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/weirmesh/weir/tests/pod"
)

const (
	// callEvery is how often a member calls the next in each of its ways.
	callEvery = 500 * time.Millisecond
	// callTimeout is longer than a proxy has anything wait for a certificate.
	callTimeout = 10 * time.Second
	// told is how many failures are told of; the others are counted.
	told = 10
)

// serve answers HTTP with who the application is told that calls, and other bytes with the
// same bytes.
func (m *member) serve() error {
	var web, echo net.Listener
	err := pod.In(m.Netns, func() error {
		var err error
		if web, err = net.Listen("tcp", fmt.Sprintf(":%d", webPort)); err != nil {
			return err
		}
		echo, err = net.Listen("tcp", fmt.Sprintf(":%d", echoPort))
		return err
	})
	if err != nil {
		return err
	}
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.Header.Get("X-Forwarded-Client-Cert"))
	})}
	go func() { _ = server.Serve(web) }()
	go echoAll(echo)
	return nil
}

func echoAll(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			_, _ = io.Copy(conn, conn)
			conn.Close()
		}()
	}
}

func (m *member) dial(ctx context.Context, to pod.Service) (net.Conn, error) {
	var conn net.Conn
	err := pod.In(m.Netns, func() error {
		var err error
		conn, err = (&net.Dialer{}).DialContext(ctx, "tcp4", netip.AddrPortFrom(to.ClusterIPs[0], to.Port).String())
		return err
	})
	if err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline()
	return conn, conn.SetDeadline(deadline)
}

// way is how a member calls another.
type way struct {
	name string
	call func(ctx context.Context, from, to *member) error
}

// newWays are those of one member. The first has a connection that stays.
func newWays() []way {
	var kept net.Conn
	var answers *bufio.Reader
	return []way{
		{"HTTP on a connection that stays", func(ctx context.Context, from, to *member) error {
			var err error
			if kept == nil {
				if kept, err = from.dial(ctx, to.web); err != nil {
					return err
				}
				answers = bufio.NewReader(kept)
			}
			deadline, _ := ctx.Deadline()
			if err = kept.SetDeadline(deadline); err == nil {
				err = ask(kept, answers, from)
			}
			if err != nil {
				kept.Close()
				kept = nil
			}
			return err
		}},
		{"HTTP on a new connection", func(ctx context.Context, from, to *member) error {
			conn, err := from.dial(ctx, to.web)
			if err != nil {
				return err
			}
			defer conn.Close()
			return ask(conn, bufio.NewReader(conn), from)
		}},
		{"bytes on a new connection, a handshake each", func(ctx context.Context, from, to *member) error {
			conn, err := from.dial(ctx, to.echo)
			if err != nil {
				return err
			}
			defer conn.Close()
			const word = "what is said comes back\n"
			if _, err := io.WriteString(conn, word); err != nil {
				return err
			}
			got := make([]byte, len(word))
			if _, err := io.ReadFull(conn, got); err != nil {
				return err
			}
			if string(got) != word {
				return fmt.Errorf("%q came back", got)
			}
			return nil
		}},
	}
}

// ask sends a request, and looks at who the application was told that asked.
func ask(conn net.Conn, answers *bufio.Reader, from *member) error {
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: next\r\n\r\n"); err != nil {
		return err
	}
	answer, err := http.ReadResponse(answers, nil)
	if err != nil {
		return err
	}
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		return err
	}
	if answer.StatusCode != http.StatusOK || string(body) != from.identity() {
		return fmt.Errorf("%s, %s, the caller is %q", answer.Status, answer.Header.Get("Proxy-Status"), body)
	}
	return nil
}

// load is what the ring's members do all the time. Use startLoad.
type load struct {
	end   context.CancelFunc
	calls sync.WaitGroup

	mu      sync.Mutex
	done    map[string]int // by way
	failed  int
	errs    []error // the first of them
	slowest time.Duration
}

// startLoad has each member call the next in all ways until end is called. It returns once
// each has succeeded, before which nothing counts.
func startLoad(ctx context.Context) (*load, error) {
	ctx, cancel := context.WithCancel(ctx)
	l := &load{end: cancel, done: map[string]int{}}
	var starting sync.WaitGroup
	errs := make(chan error, len(ring)*len(newWays()))
	for i, m := range ring {
		for _, w := range newWays() {
			to := ring[(i+1)%len(ring)]
			starting.Go(func() {
				err := begin(ctx, w, m, to)
				errs <- err
				if err == nil {
					l.calls.Go(func() { l.callAll(ctx, w, m, to) })
				}
			})
		}
	}
	starting.Wait()
	close(errs)
	var all error
	for err := range errs {
		all = errors.Join(all, err)
	}
	return l, all
}

// begin calls until that succeeds: the caller's proxy has yet to hear of the other pod.
func begin(ctx context.Context, w way, from, to *member) error {
	ctx, cancel := context.WithTimeout(ctx, 3*callTimeout)
	defer cancel()
	for {
		err := call(ctx, w, from, to)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s calls %s, %s: %w", from.Name, to.Name, w.name, err)
		case <-time.After(callEvery):
		}
	}
}

func call(ctx context.Context, w way, from, to *member) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return w.call(ctx, from, to)
}

func (l *load) callAll(ctx context.Context, w way, from, to *member) {
	next := time.NewTicker(callEvery)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-next.C:
		}
		began := time.Now()
		err := call(context.WithoutCancel(ctx), w, from, to) // the last is not cut
		took := time.Since(began)
		l.mu.Lock()
		l.done[w.name]++
		l.slowest = max(l.slowest, took)
		if err != nil {
			l.failed++
			if len(l.errs) < told {
				l.errs = append(l.errs, fmt.Errorf("%s: %s calls %s, %s, after %s: %w", began.Format(time.TimeOnly), from.Name, to.Name, w.name, took, err))
			}
		}
		l.mu.Unlock()
	}
}

// stop ends the load and says what there was of it, and what failed.
func (l *load) stop() (string, error) {
	l.end()
	l.calls.Wait()
	sum := 0
	var by []string
	for _, w := range newWays() {
		by = append(by, fmt.Sprintf("%d %s", l.done[w.name], w.name))
		sum += l.done[w.name]
	}
	said := fmt.Sprintf("%d requests (%s), %d failed, the slowest took %s", sum, strings.Join(by, ", "), l.failed, l.slowest.Round(time.Millisecond))
	return said, errors.Join(l.errs...)
}
