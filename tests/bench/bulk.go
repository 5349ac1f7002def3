package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"time"

	"github.com/weirmesh/weir/tests/pod"
)

// streams are at how many connections, with how many streams each, HTTP/2 is measured.
var streams = [][2]int{{4, 32}, {16, 1}}

func atStreams(c [2]int) string {
	return fmt.Sprintf("HTTP/2, %d connections with %d streams", c[0], c[1])
}
func nameStreams(l string, c [2]int) string { return l + ": requests a second, " + atStreams(c) }

// h2loadTotal is the line of h2load's with the outcome.
var h2loadTotal = regexp.MustCompile(`(?s)requests: (\d+) total, .* (\d+) succeeded, (\d+) failed, (\d+) errored`)

// streams has h2load send as many requests as it can.
func (d *dataplane) streams(ctx context.Context, lanes []lane, c [2]int, length time.Duration, out results) error {
	// It ends when it has been there for a number of seconds: later than all turns.
	seconds := 2 + int((time.Duration(turnsIn(length)*len(lanes)) * (turn + 2*lull)).Seconds())
	all, err := d.takeTurns(ctx, lanes, length, func(l lane) (load, error) {
		return &h2loadLoad{
			program: newProgram(ctx, l, h2load, fmt.Sprint("-c", c[0]), fmt.Sprint("-m", c[1]), "-D", strconv.Itoa(seconds), "http://"+l.streams.String()+"/"),
			seconds: seconds,
		}, nil
	})
	for _, did := range all {
		out.add(nameStreams(did.lane.name, c), did.amount/did.took.Seconds())
		out.addCPU(did, atStreams(c))
	}
	return err
}

// h2loadLoad is requests by h2load.
type h2loadLoad struct {
	*program
	seconds int
	ends    time.Time
}

func (h *h2loadLoad) work(ctx context.Context, length time.Duration) error {
	if h.ends.IsZero() {
		h.ends = time.Now().Add(time.Duration(h.seconds) * time.Second)
	}
	err := h.program.work(ctx, length)
	if time.Now().After(h.ends) {
		return errors.New("h2load has ended before all had their turns: this machine is too busy; try a shorter -length")
	}
	return err
}

func (h *h2loadLoad) await(ctx context.Context) error { return wait(ctx, time.Until(h.ends)+lull) }

func (h *h2loadLoad) finish() (float64, error) {
	said, err := h.wait()
	if err != nil {
		return 0, err
	}
	m := h2loadTotal.FindStringSubmatch(said)
	if m == nil || m[3] != "0" || m[4] != "0" {
		return 0, fmt.Errorf("h2load: %s", said)
	}
	return strconv.ParseFloat(m[2], 64)
}

// ways are the directions in which bytes are moved: to the client, or from it.
var ways = []string{"down", "up"}

func nameBulk(l, way string) string { return fmt.Sprintf("%s: TCP %s, Gbit per CPU second", l, way) }

// bulkCommand starts the source and the sink of bytes.
const bulkCommand = "bulk"

// bulk serves until ctx is done.
func bulk(ctx context.Context) error {
	block := make([]byte, 256<<10)
	failures := make(chan error, 2)
	for port, serve := range map[int]func(net.Conn){
		sourcePort: func(c net.Conn) {
			for {
				if _, err := c.Write(block); err != nil {
					return
				}
			}
		},
		sinkPort: func(c net.Conn) { _, _ = io.Copy(io.Discard, c) },
	} {
		l, err := net.Listen("tcp", fmt.Sprint(":", port))
		if err != nil {
			return err
		}
		context.AfterFunc(ctx, func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					failures <- err
					return
				}
				go func() {
					defer c.Close()
					serve(c)
				}()
			}
		}()
	}
	return <-failures
}

// bulkAt is where bytes are moved that way.
func (l lane) bulkAt(way string) netip.AddrPort {
	if way == "up" {
		return l.sink
	}
	return l.source
}

// bulk moves bytes one way.
func (d *dataplane) bulk(ctx context.Context, lanes []lane, way string, length time.Duration, out results) error {
	all, err := d.takeTurns(ctx, lanes, length, func(l lane) (load, error) {
		b := &bulkLoad{up: way == "up", block: make([]byte, 256<<10)}
		return b, pod.In(l.client, func() error {
			var err error
			b.conn, err = (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", l.bulkAt(way).String())
			return err
		})
	})
	for _, did := range all {
		out.add(nameBulk(did.lane.name, way), did.amount*8/1e9/did.cpu.Seconds())
	}
	return err
}

// bulkLoad is bytes on one connection.
type bulkLoad struct {
	conn  net.Conn
	up    bool // from the client
	block []byte
	moved int
}

func (b *bulkLoad) work(_ context.Context, length time.Duration) error {
	err := b.conn.SetDeadline(time.Now().Add(length))
	for err == nil {
		n := 0
		if b.up {
			n, err = b.conn.Write(b.block)
		} else {
			n, err = b.conn.Read(b.block)
		}
		b.moved += n
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return fmt.Errorf("after %d bytes: %w", b.moved, err)
}

func (b *bulkLoad) await(context.Context) error { return nil }

func (b *bulkLoad) finish() (float64, error) { return float64(b.moved), nil }

func (b *bulkLoad) close() { b.conn.Close() }
