package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/plugin/capture/nft"
	"github.com/weirmesh/weir/tests/pod"
)

// applyRules puts rules into the calling thread's namespace, which holds none.
func applyRules(rules capture.Ruleset) (cost, error) {
	cpuBefore, err := pod.Clock(unix.CLOCK_THREAD_CPUTIME_ID)
	if err != nil {
		return cost{}, err
	}
	began := time.Now()
	changed, err := nft.Backend{}.Apply(rules)
	took := time.Since(began)
	if err != nil {
		return cost{}, err
	}
	if !changed {
		return cost{}, fmt.Errorf("nothing was applied: the namespace is not new")
	}
	cpu, err := pod.Clock(unix.CLOCK_THREAD_CPUTIME_ID)
	return cost{took, cpu - cpuBefore}, err
}

// pss is a process's proportional share of the memory it has resident, in MB
// (10⁶ bytes): shared pages count by the number of processes that share them.
func pss(pid int) (float64, error) { return memoryOf(pid, "smaps_rollup", "Pss:") }

// rss is all memory that a process has resident, in MB, with its program's text;
// peakRSS is the most it has ever been.
func rss(pid int) (float64, error)     { return memoryOf(pid, "status", "VmRSS:") }
func peakRSS(pid int) (float64, error) { return memoryOf(pid, "status", "VmHWM:") }

// memoryOf reads a line of a file in /proc/PID.
func memoryOf(pid int, file, name string) (float64, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
	if err != nil {
		return 0, fmt.Errorf("memory: %w", err)
	}
	for line := range strings.Lines(string(content)) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == name {
			kib, err := strconv.ParseFloat(fields[1], 64)
			if err != nil {
				return 0, fmt.Errorf("memory: %w", err)
			}
			return kib * 1024 / 1e6, nil
		}
	}
	return 0, fmt.Errorf("memory: no %s in %s of %d", name, file, pid)
}
