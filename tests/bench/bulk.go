package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
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
func (d *dataplane) streams(ctx context.Context, l lane, c [2]int, length time.Duration, out results) error {
	if length >= time.Second { // to warm up
		if _, err := runH2load(ctx, l, c, length/4); err != nil {
			return err
		}
	}
	before, err := cpuOf(l)
	if err != nil {
		return err
	}
	requests, err := runH2load(ctx, l, c, length)
	if err != nil {
		return err
	}
	after, err := cpuOf(l)
	if err != nil {
		return err
	}
	out.add(nameStreams(l.name, c), float64(requests)/length.Seconds())
	out.add(nameCPU(l.name, atStreams(c)), float64((after-before).Microseconds())/float64(requests))
	return nil
}

func runH2load(ctx context.Context, l lane, c [2]int, length time.Duration) (int, error) {
	seconds := max(1, int(length.Round(time.Second).Seconds()))
	cmd := exec.CommandContext(ctx, h2load, fmt.Sprint("-c", c[0]), fmt.Sprint("-m", c[1]), "-D", strconv.Itoa(seconds), "http://"+l.streams.String()+"/")
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := pod.In(l.client, cmd.Start); err != nil {
		return 0, err
	}
	err := cmd.Wait()
	m := h2loadTotal.FindStringSubmatch(said.String())
	if err != nil || m == nil || m[3] != "0" || m[4] != "0" || m[2] == "0" {
		return 0, fmt.Errorf("h2load: %w: %s", err, strings.TrimSpace(said.String()))
	}
	return strconv.Atoi(m[2])
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

// bulk moves bytes one way for a while.
func (d *dataplane) bulk(ctx context.Context, l lane, way string, length time.Duration, out results) error {
	var c net.Conn
	target := l.bulkAt(way).String()
	if err := pod.In(l.client, func() error {
		var err error
		c, err = (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", target)
		return err
	}); err != nil {
		return err
	}
	defer c.Close()
	before, err := cpuOf(l)
	if err != nil {
		return err
	}
	if err := c.SetDeadline(time.Now().Add(length)); err != nil {
		return err
	}
	block, moved := make([]byte, 256<<10), 0
	for err == nil {
		n := 0
		if way == "down" {
			n, err = c.Read(block)
		} else {
			n, err = c.Write(block)
		}
		moved += n
	}
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() || moved == 0 {
		return fmt.Errorf("TCP %s: %d bytes: %w", way, moved, err)
	}
	after, err := cpuOf(l)
	if err != nil {
		return err
	}
	out.add(nameBulk(l.name, way), float64(moved)*8/1e9/max(after-before, tick).Seconds())
	return nil
}
