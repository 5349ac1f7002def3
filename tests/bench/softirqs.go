package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// softirqs are the schedstats of the kernel's threads that handle packets when there are
// too many for whoever sends them (ksoftirqd, a thread for each processor). What they do
// in a proxy's place is a third of what it takes to move bytes by TCP, more of a proxy's
// that does not rest, and nobody's by the proxies' own figures.
type softirqs []*os.File

// findSoftirqs must be called where the machine's /proc is: a node has another.
func findSoftirqs() (softirqs, error) {
	comms, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return nil, err
	}
	var s softirqs
	for _, comm := range comms {
		name, err := os.ReadFile(comm)
		if err != nil || !strings.HasPrefix(string(name), "ksoftirqd/") {
			continue // it has ended, or is another
		}
		f, err := os.Open(filepath.Join(filepath.Dir(comm), "schedstat"))
		if err != nil {
			s.close()
			return nil, err
		}
		s = append(s, f)
	}
	return s, nil
}

func (s softirqs) close() {
	for _, f := range s {
		f.Close()
	}
}

// cpu is what they have used.
func (s softirqs) cpu() (time.Duration, error) {
	var sum time.Duration
	for _, f := range s {
		var content [64]byte
		n, err := f.ReadAt(content[:], 0)
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		ran, err := ranFor(content[:n])
		if err != nil {
			return 0, fmt.Errorf("%s: %w", f.Name(), err)
		}
		sum += ran
	}
	return sum, nil
}
