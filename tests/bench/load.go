package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/tests/bench/report"
	"github.com/weirmesh/weir/tests/pod"
)

// results are the samples, by series: one for each round.
type results map[string][]float64

// Names of the series.
func nameCPU(l string, what string) string { return l + ": CPU a request, " + what }
func nameThroughput(l string, c int) string {
	return fmt.Sprintf("%s: requests a second, %d connections", l, c)
}
func nameLatency(l string, rate int, q string) string {
	return fmt.Sprintf("%s: latency %s at %d requests a second", l, q, rate)
}
func atConnections(c int) string { return fmt.Sprintf("%d connections", c) }
func atRate(r int) string        { return fmt.Sprintf("%d requests a second", r) }

func (r results) add(name string, value float64) { r[name] = append(r[name], value) }

// wrkTotal and wrkBad are lines of wrk's.
var (
	wrkTotal = regexp.MustCompile(`(\d+) requests in `)
	wrkBad   = regexp.MustCompile(`(?m)^\s*(Non-2xx or 3xx responses: \d+|Socket errors: .*)$`)
)

// throughput has wrk send as many requests as it can on c connections.
func (d *dataplane) throughput(ctx context.Context, lanes []lane, c int, length time.Duration, out results) error {
	start := func(l lane) (load, error) {
		// It ends when it is told to, and waits longer than until its next turn. It has 8 MB
		// of addresses for each second of a timeout.
		return wrkLoad{newProgram(ctx, l, wrk, "-t1", fmt.Sprint("-c", c), "-d1h", "--timeout", "30s", "http://"+l.target.String()+"/")}, nil
	}
	if err := warm(ctx, lanes, start); err != nil {
		return err
	}
	all, err := d.takeTurns(ctx, lanes, length, start)
	for _, did := range all {
		out.add(nameThroughput(did.lane.name, c), did.amount/did.took.Seconds())
		out.addCPU(did, atConnections(c))
	}
	return err
}

// addCPU adds what a request took of a lane's proxies.
func (r results) addCPU(did done, what string) {
	if did.lane.name != laneDirect {
		r.add(nameCPU(did.lane.name, what), float64(did.cpu.Nanoseconds())/1000/did.amount)
	}
}

// wrkLoad is requests by wrk.
type wrkLoad struct{ *program }

// finish interrupts wrk, which ends within 100 ms then, of which it counts the requests. It
// is its first thread that sleeps until then: of a process that stands still, any other
// may get the signal.
func (w wrkLoad) finish() (float64, error) {
	if err := unix.Tgkill(w.cmd.Process.Pid, w.cmd.Process.Pid, unix.SIGINT); err != nil {
		return 0, os.NewSyscallError("tgkill", err)
	}
	said, err := w.wait()
	if err != nil {
		return 0, err
	}
	m := wrkTotal.FindStringSubmatch(said)
	if m == nil || wrkBad.MatchString(said) {
		return 0, fmt.Errorf("wrk: %s", said)
	}
	return strconv.ParseFloat(m[1], 64)
}

// window is for how long quantiles of the latency are taken at a time. Once a second
// something of this machine's holds one of its processors for 4 to 8 ms, whoever has it,
// and with two that is every hundredth request: of some seconds at a time p99 would be
// how long that takes.
const window = 250 * time.Millisecond

// latencies measures lanes at a fixed rate.
func (d *dataplane) latencies(ctx context.Context, lanes []lane, rate int, length time.Duration, out results) error {
	var loads []*steady // lane by lane
	all, err := d.takeTurns(ctx, lanes, length, func(l lane) (load, error) {
		s, err := newSteady(l, rate)
		loads = append(loads, s)
		return s, err
	})
	for i, did := range all {
		out.addCPU(did, atRate(rate))
		took := loads[i].times
		for each := int(int64(rate) * int64(window) / int64(time.Second)); len(took) > 0; {
			n := each
			if len(took) < 2*each {
				n = len(took) // the last has what is left over
			}
			times := took[:n]
			took = took[n:]
			slices.Sort(times)
			out.add(nameLatency(did.lane.name, rate, "p50"), micros(times, 0.50))
			out.add(nameLatency(did.lane.name, rate, "p99"), micros(times, 0.99))
		}
	}
	return err
}

// micros is a quantile of sorted times, in µs.
func micros(sorted []time.Duration, q float64) float64 {
	return float64(sorted[int(q*float64(len(sorted)-1))].Microseconds())
}

// dialMany makes connections on a lane. They are the caller's, whatever the error.
func dialMany(l lane, n int) ([]net.Conn, error) {
	var conns []net.Conn
	err := pod.In(l.client, func() error {
		for range n {
			c, err := net.Dial("tcp", l.target.String())
			if err != nil {
				return err
			}
			conns = append(conns, c)
		}
		return nil
	})
	return conns, err
}

// readAnswer reads an answer of 1 KB, with as little work as possible.
func readAnswer(r *bufio.Reader) error {
	length, first := 0, true
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return err
		}
		switch {
		case first && !bytes.HasPrefix(line, []byte("HTTP/1.1 200 ")):
			return fmt.Errorf("answer %q", line)
		case len(line) == 2:
			_, err := io.CopyN(io.Discard, r, int64(length))
			return err
		case len(line) > 16 && bytes.EqualFold(line[:16], []byte("content-length: ")):
			if length, err = strconv.Atoi(string(bytes.TrimSpace(line[16:]))); err != nil {
				return err
			}
		}
		first = false
	}
}

// series are the results in order.
func (r results) series() []report.Series {
	var out []report.Series
	add := func(name, unit string) {
		if samples := r[name]; samples != nil {
			out = append(out, report.Series{Name: name, Unit: unit, Samples: samples})
		}
	}
	lanes := []string{laneWeir, laneOne, laneNginx, laneHAProxy, laneNginxTurned, laneHAProxyTurned, laneFloor, laneWeirTLS, laneNginxTLS, laneHAProxyTLS, laneNginxTLSTurned, laneHAProxyTLSTurned, laneReverse, laneDirect}
	for _, c := range connections {
		for _, l := range lanes {
			add(nameThroughput(l, c), "/s")
		}
		for _, l := range lanes {
			add(nameCPU(l, atConnections(c)), "µs")
		}
	}
	for _, c := range streams {
		for _, l := range lanes {
			add(nameStreams(l, c), "/s")
			add(nameCPU(l, atStreams(c)), "µs")
		}
	}
	for _, w := range ways {
		for _, l := range lanes {
			add(nameBulk(l, w), "Gbit/s")
		}
	}
	for _, rate := range rates {
		for _, l := range lanes {
			add(nameLatency(l, rate, "p50"), "µs")
			add(nameLatency(l, rate, "p99"), "µs")
		}
		for _, l := range lanes {
			add(nameCPU(l, atRate(rate)), "µs")
		}
	}
	return out
}

// median is a series' middle sample.
func (r results) median(name string) float64 {
	s := report.Series{Samples: r[name]}
	return s.Quantile(0.5)
}

// noise is how much latency cannot be told from none, in µs.
const noise = 10

// judge adds what is to be held, by Weir's pair beside those of peers that the same rules
// turn aside to: what that costs is in all of them. Beside it stands what peers do that are
// dialled, as no mesh's proxies are. By mTLS, which goes without saying, Weir is to hold
// both, and beside peers in plaintext.
func (r results) judge(out *report.Report) {
	for _, c := range connections {
		cpu := func(l string) float64 { return r.median(nameCPU(l, atConnections(c))) }
		served := func(l string) float64 { return r.median(nameThroughput(l, c)) }
		at := atConnections(c)
		out.AtMost("CPU a request, "+at+", relative to nginx", cpu(laneWeir)/cpu(laneNginxTurned), 1, "×")
		out.AtMost("CPU a request, "+at+", relative to HAProxy", cpu(laneWeir)/cpu(laneHAProxyTurned), 1.05, "×")
		out.AtMost("CPU a request, "+at+", relative to GOMAXPROCS=1", cpu(laneWeir)/cpu(laneOne), 1.1, "×")
		out.AtLeast("throughput, "+at+", relative to the better of both", served(laneWeir)/max(served(laneNginxTurned), served(laneHAProxyTurned)), 1, "×")
		out.Beside("CPU a request, "+at+", relative to nginx that is dialled", cpu(laneWeir)/cpu(laneNginx), "×")
		out.Beside("CPU a request, "+at+", relative to HAProxy that is dialled", cpu(laneWeir)/cpu(laneHAProxy), "×")
		best := max(served(laneNginx), served(laneHAProxy))
		out.Beside("throughput, "+at+", relative to the better of both that is dialled", served(laneWeir)/best, "×")
		out.AtMost("CPU a request with mTLS, "+at+", relative to nginx in plaintext that is dialled", cpu(laneWeirTLS)/cpu(laneNginx), 1, "×")
		out.AtMost("CPU a request with mTLS, "+at+", relative to HAProxy in plaintext that is dialled", cpu(laneWeirTLS)/cpu(laneHAProxy), 1.05, "×")
		out.AtLeast("throughput with mTLS, "+at+", relative to the better of both in plaintext that is dialled", served(laneWeirTLS)/best, 1, "×")
		out.AtMost("CPU a request with mTLS, "+at+", relative to the better of both with TLS",
			cpu(laneWeirTLS)/min(cpu(laneNginxTLSTurned), cpu(laneHAProxyTLSTurned)), 0.85, "×")
		out.AtMost("CPU a request with mTLS, "+at+", relative to the better of both with TLS that is dialled",
			cpu(laneWeirTLS)/min(cpu(laneNginxTLS), cpu(laneHAProxyTLS)), 0.85, "×")
	}
	for _, c := range streams {
		cpu := func(l string) float64 { return r.median(nameCPU(l, atStreams(c))) }
		out.AtMost("CPU a request, "+atStreams(c)+", relative to HAProxy", cpu(laneWeir)/cpu(laneHAProxyTurned), 1.1, "×")
		out.Beside("CPU a request, "+atStreams(c)+", relative to HAProxy that is dialled", cpu(laneWeir)/cpu(laneHAProxy), "×")
	}
	for _, w := range ways {
		bulk := func(l string) float64 { return r.median(nameBulk(l, w)) }
		out.AtLeast("TCP "+w+", Gbit per CPU second, relative to HAProxy with splicing", bulk(laneWeir)/bulk(laneHAProxyTurned), 0.85, "×")
		out.Beside("TCP "+w+", Gbit per CPU second, relative to HAProxy with splicing that is dialled", bulk(laneWeir)/bulk(laneHAProxy), "×")
		out.AtLeast("TCP "+w+" with mTLS, Gbit per CPU second, relative to HAProxy that is dialled", bulk(laneWeirTLS)/bulk(laneHAProxyTLS), 1.15, "×")
	}
	for _, rate := range rates {
		// What a pair adds: without what there is without any.
		added := func(l, q string) float64 {
			return max(r.median(nameLatency(l, rate, q))-r.median(nameLatency(laneDirect, rate, q)), noise)
		}
		cpu := func(l string) float64 { return r.median(nameCPU(l, atRate(rate))) }
		at := fmt.Sprintf("%d a second", rate)
		for _, q := range []struct {
			name string
			want float64
		}{{"p50", 1}, {"p99", 1.3}} {
			best := func(nginx, haproxy string) float64 { return min(added(nginx, q.name), added(haproxy, q.name)) }
			out.AtMost("added latency "+q.name+" at "+at+", relative to the better of both", added(laneWeir, q.name)/best(laneNginxTurned, laneHAProxyTurned), q.want, "×")
			out.Beside("added latency "+q.name+" at "+at+", relative to the better of both that is dialled", added(laneWeir, q.name)/best(laneNginx, laneHAProxy), "×")
		}
		out.AtMost("CPU a request at "+at+", relative to nginx", cpu(laneWeir)/cpu(laneNginxTurned), 1.3, "×")
		out.Beside("CPU a request at "+at+", relative to nginx that is dialled", cpu(laneWeir)/cpu(laneNginx), "×")
	}
}
