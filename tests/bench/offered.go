package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

const (
	// workers is how many requests the application does at a time, work how long it
	// takes for one: what bounds it is not the machine's processors, which it shares.
	workers = 10
	work    = 10 * time.Millisecond
	// inTime is how late an answer is of use to whoever asked.
	inTime = 100 * time.Millisecond
	// offering is how many connections share the rate that is too much.
	offering = 200
)

// worker is an application that does so much and no more.
func worker() http.HandlerFunc {
	at := make(chan struct{}, workers)
	return func(w http.ResponseWriter, r *http.Request) {
		at <- struct{}{}
		time.Sleep(work)
		<-at
		answer(w, r)
	}
}

// answered is what became of requests.
type answered struct {
	served, refused []time.Duration
	good            int            // of served, in time
	reasons         map[string]int // of refused
}

// overload finds out what an application can do at most, then asks too much of it.
func overload(ctx context.Context, l lane, length time.Duration, out results, reasons map[string]int) error {
	peak, err := offer(ctx, l, parallelRequests, 0, length)
	if err != nil {
		return err
	}
	most := float64(peak.good) / length.Seconds()
	if most == 0 {
		return errors.New("nothing is answered in time, of no more than the policy allows")
	}
	much, err := offer(ctx, l, offering, time.Duration(float64(time.Second)*offering/(overloadFactor*most)), length)
	if err != nil {
		return err
	}
	out.add(namePeak, most)
	out.add(nameOffered, float64(len(much.served)+len(much.refused))/length.Seconds())
	out.add(nameGoodput, float64(much.good)/length.Seconds())
	out.add(nameShare, 100*float64(much.good)/float64(peak.good))
	for _, d := range much.served {
		out.add(nameServed, millis(d))
	}
	for _, d := range much.refused {
		out.add(nameRefused, millis(d))
	}
	for reason, n := range much.reasons {
		reasons[reason] += n
	}
	return nil
}

// offer sends requests on n connections for that long: on each one an interval, whatever
// became of the one before, or, without an interval, one as soon as that is answered.
func offer(ctx context.Context, l lane, n int, interval, length time.Duration) (answered, error) {
	conns, err := dialMany(l, n)
	defer closeAll(conns)
	if err != nil {
		return answered{}, err
	}
	each := make([]answered, n)
	failures := make([]error, n)
	began := time.Now()
	var sending sync.WaitGroup
	for i, c := range conns {
		sending.Go(func() {
			first := began.Add(interval * time.Duration(i) / time.Duration(n))
			each[i], failures[i] = offerOn(ctx, c, l, first, interval, began.Add(length))
		})
	}
	sending.Wait()
	all := answered{reasons: map[string]int{}}
	for _, a := range each {
		all.served, all.refused, all.good = append(all.served, a.served...), append(all.refused, a.refused...), all.good+a.good
		for reason, n := range a.reasons {
			all.reasons[reason] += n
		}
	}
	return all, errors.Join(failures...)
}

// offerOn is offer on one connection. Times are since a request was to be sent.
func offerOn(ctx context.Context, c net.Conn, l lane, next time.Time, interval time.Duration, end time.Time) (answered, error) {
	out := answered{reasons: map[string]int{}}
	request := fmt.Appendf(nil, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", l.target)
	r := bufio.NewReader(c)
	for next.Before(end) && ctx.Err() == nil {
		if wait := time.Until(next); wait > 0 {
			time.Sleep(wait)
		}
		if time.Now().After(end) {
			break // what was to be sent and was not, is not served
		}
		if _, err := c.Write(request); err != nil {
			return out, err
		}
		response, err := http.ReadResponse(r, nil)
		if err != nil {
			return out, err
		}
		if _, err := io.Copy(io.Discard, response.Body); err != nil {
			return out, err
		}
		took := time.Since(next)
		if response.StatusCode == http.StatusOK {
			out.served = append(out.served, took)
			if took <= inTime {
				out.good++
			}
		} else {
			out.refused = append(out.refused, took)
			out.reasons[reasonOf(response)]++
		}
		if next = next.Add(interval); interval == 0 {
			next = time.Now()
		}
	}
	return out, ctx.Err()
}

// reasonOf is why a proxy says that it refused a request.
func reasonOf(response *http.Response) string {
	_, details, _ := strings.Cut(response.Header.Get("Proxy-Status"), `details="`)
	reason, _, found := strings.Cut(details, ":")
	if !found {
		return response.Status
	}
	return reason
}
