// Package report is how a benchmark says what it found: series of samples, and
// targets that they hold or do not. Every benchmark prints a report as Markdown,
// and with OUT=folder in the environment writes it as JSON with its raw samples.
package report

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Report is one run of one benchmark.
type Report struct {
	Name    string    `json:"name"` // names the JSON file: NAME.json
	Title   string    `json:"title"`
	Started time.Time `json:"started"`
	Machine Machine   `json:"machine"`
	Series  []Series  `json:"series"`
	Targets []Target  `json:"targets"` // empty in a run too short to judge
	Notes   []string  `json:"notes,omitempty"`
}

// Machine is where it ran.
type Machine struct {
	CPUs   int    `json:"cpus"`
	Kernel string `json:"kernel"`
	Go     string `json:"go"`
	Arch   string `json:"arch"`
}

// Series is what one thing was measured to take.
type Series struct {
	Name    string    `json:"name"`
	Unit    string    `json:"unit"`             // of Samples: "ms", "MB"
	Samples []float64 `json:"samples"`          // in the order in which they were taken
	CPU     []float64 `json:"cpu_ms,omitempty"` // user and system time for each sample, in ms
}

// Target is what was to be held.
type Target struct {
	What string  `json:"what"`
	Want string  `json:"want"`
	Got  float64 `json:"got"`
	Unit string  `json:"unit"`
	Held bool    `json:"held"`
}

// nothing is what is wanted of what is only told.
const nothing = "–"

// New starts a report.
func New(name, title string) (*Report, error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	return &Report{Name: name, Title: title, Started: time.Now().UTC(), Machine: Machine{
		CPUs: runtime.NumCPU(), Kernel: unix.ByteSliceToString(uts.Release[:]), Go: runtime.Version(), Arch: runtime.GOARCH,
	}}, nil
}

// AtMost adds a target: got is to be no more than want.
func (r *Report) AtMost(what string, got, want float64, unit string) {
	r.Targets = append(r.Targets, Target{What: what, Want: "≤ " + number(want), Got: got, Unit: unit, Held: got <= want})
}

// AtLeast adds a target: got is to be no less than want.
func (r *Report) AtLeast(what string, got, want float64, unit string) {
	r.Targets = append(r.Targets, Target{What: what, Want: "≥ " + number(want), Got: got, Unit: unit, Held: got >= want})
}

// Beside adds what is told beside the targets.
func (r *Report) Beside(what string, got float64, unit string) {
	r.Targets = append(r.Targets, Target{What: what, Want: nothing, Got: got, Unit: unit, Held: true})
}

// ErrNotHeld says that a report has a target that was not held.
var ErrNotHeld = errors.New("targets not held")

// Publish prints the report and, if out is not empty, writes it to that folder.
// It returns ErrNotHeld if a target was not held.
func (r *Report) Publish(w io.Writer, out string) error {
	if _, err := io.WriteString(w, r.Markdown()); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	if out != "" {
		if err := r.write(out); err != nil {
			return fmt.Errorf("report: %w", err)
		}
	}
	if slices.ContainsFunc(r.Targets, func(t Target) bool { return !t.Held }) {
		return ErrNotHeld
	}
	return nil
}

func (r *Report) write(dir string) error {
	content, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, r.Name+".json"), append(content, '\n'), 0o644)
}

// Markdown renders the report as tables.
func (r *Report) Markdown() string {
	var b bytes.Buffer
	fmt.Fprintf(&b, "### %s\n\n%d CPUs, Linux %s, %s, %s\n\n", r.Title, r.Machine.CPUs, r.Machine.Kernel, r.Machine.Go, r.Machine.Arch)
	rows := [][]string{{"what", "n", "p50", "p99", "CPU, mean"}}
	for _, s := range r.Series {
		cpu := "–"
		if len(s.CPU) > 0 {
			cpu = number(mean(s.CPU)) + " ms"
		}
		rows = append(rows, []string{s.Name, fmt.Sprint(len(s.Samples)),
			number(s.Quantile(0.50)) + " " + s.Unit, number(s.Quantile(0.99)) + " " + s.Unit, cpu})
	}
	table(&b, rows)
	if len(r.Targets) > 0 {
		rows := [][]string{{"target", "wanted", "measured", "held"}}
		for _, t := range r.Targets {
			want, held := t.Want+" "+t.Unit, map[bool]string{true: "yes", false: "**no**"}[t.Held]
			if t.Want == nothing {
				want, held = nothing, nothing
			}
			rows = append(rows, []string{t.What, want, number(t.Got) + " " + t.Unit, held})
		}
		table(&b, rows)
	}
	for _, n := range r.Notes {
		fmt.Fprintf(&b, "%s\n", n)
	}
	return b.String()
}

// table writes rows, the first of which is the head, aligned for those who read
// the source.
func table(b *bytes.Buffer, rows [][]string) {
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], len([]rune(cell)))
		}
	}
	for i, row := range rows {
		for j, cell := range row {
			fmt.Fprintf(b, "| %s%s ", cell, strings.Repeat(" ", widths[j]-len([]rune(cell))))
		}
		b.WriteString("|\n")
		if i == 0 {
			for j := range row {
				b.WriteString("|" + strings.Repeat("-", widths[j]+2))
			}
			b.WriteString("|\n")
		}
	}
	b.WriteString("\n")
}

// Quantile is the smallest sample that a share q of all samples do not exceed
// (nearest rank); NaN without samples.
func (s Series) Quantile(q float64) float64 {
	if len(s.Samples) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(s.Samples))
	rank := int(math.Ceil(q * float64(len(sorted))))
	return sorted[max(rank, 1)-1]
}

func mean(samples []float64) float64 {
	sum := 0.0
	for _, s := range samples {
		sum += s
	}
	return sum / float64(len(samples))
}

// number renders three significant digits, and all of those before the point.
func number(f float64) string {
	switch {
	case math.Abs(f) >= 100:
		return fmt.Sprintf("%.0f", f)
	case math.Abs(f) >= 10:
		return strings.TrimSuffix(fmt.Sprintf("%.1f", f), ".0")
	}
	return strings.TrimSuffix(strings.TrimRight(fmt.Sprintf("%.2f", f), "0"), ".")
}
