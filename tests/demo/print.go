package main

import (
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// printer writes for a terminal, or for a file without its colours.
type printer struct {
	out    io.Writer
	colour bool
}

func newPrinter(out io.Writer) *printer {
	file, ok := out.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" { // no-color.org
		return &printer{out: out}
	}
	_, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS)
	return &printer{out, err == nil}
}

const (
	bold  = "1"
	dim   = "2"
	red   = "31"
	green = "32"
)

func (p *printer) paint(colour, text string) string {
	if !p.colour {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

func (p *printer) line(format string, args ...any) { fmt.Fprintf(p.out, format+"\n", args...) }

// stage shows the pods.
func (p *printer) stage(s *stage) {
	p.line("%s", p.paint(bold, "Five pods, each through the chain bridge → host-local → weir-cni"))
	for _, name := range slices.Backward(podNames) {
		var addresses []string
		for _, a := range s.pods[name].Addresses {
			addresses = append(addresses, a.String())
		}
		b := s.took[name]
		p.line("    %-8s %-34s ADD took %s, of it weir-cni %s", name, strings.Join(addresses, " "), millis(b.chain), millis(b.weir))
	}
	p.line("")
}

// request shows what the user saw.
func (p *printer) request(r answered) {
	p.line("%s", p.paint(bold, "A user asks the ingress for http://"+userHost+"/"))
	if r.err != nil {
		p.line("    answer   %s, after %s", p.paint(red, r.err.Error()), millis(r.took))
	} else {
		p.line("    answer   %d %q, after %s", r.status, r.body, millis(r.took))
	}
	p.line("")
}

// steps shows a request's life.
func (p *printer) steps(steps []step) {
	for _, s := range steps {
		mark := p.paint(green, fmt.Sprint(s.number))
		if s.err != nil {
			mark = p.paint(red, fmt.Sprint(s.number))
		}
		p.line("%s  %s", mark, p.paint(bold, strings.ToUpper(s.title[:1])+s.title[1:]))
		for _, f := range s.facts {
			p.line("    %s %s", p.paint(dim, fmt.Sprintf("%-10s", f.label)), f.text)
		}
		if s.err != nil {
			p.line("    %s %s", p.paint(red, fmt.Sprintf("%-10s", "failed")), s.err)
		}
	}
	p.line("")
}

// balanced shows whom the calls to back went to.
func (p *printer) balanced(picks map[string]int) {
	p.line("%d further requests: front's proxy chose %s.", moreRequests, counted(picks))
	p.line("")
}

// counted lists how often each pod was chosen.
func counted(picks map[string]int) string {
	var counts []string
	for _, name := range slices.Sorted(maps.Keys(picks)) {
		counts = append(counts, fmt.Sprintf("%s %d times", name, picks[name]))
	}
	return strings.Join(counts, ", ")
}

// title begins a part.
func (p *printer) title(text string) { p.line("%s", p.paint(bold, text)) }

// fact is one line of a part.
func (p *printer) fact(label, format string, args ...any) {
	p.line("    %s %s", p.paint(dim, fmt.Sprintf("%-10s", label)), fmt.Sprintf(format, args...))
}

// summary is the last line.
func (p *printer) summary(r answered, steps []step) {
	p.line("%s %d of 7 steps seen in the records; the request took %s.", p.paint(green, "ok:"), len(steps), millis(r.took))
}

// log shows the agent's log.
func (p *printer) log(text string) {
	p.line("%s\n%s\n", p.paint(bold, "The agent's log"), text)
}

func millis(d time.Duration) string {
	return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000)
}
