package relay

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/listen"
)

// sizes are those of the idle pipes, as the kernel has them.
func (p *pipes) sizes(t *testing.T) map[int]int {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	out := map[int]int{}
	for _, x := range p.idle {
		size, err := unix.FcntlInt(uintptr(x.r), unix.F_GETPIPE_SZ, 0)
		if err != nil {
			t.Fatal(err)
		}
		out[size]++
	}
	return out
}

func TestAPipeIsLargeOnlyWhereThereIsMuchToMove(t *testing.T) {
	for _, c := range []struct {
		bytes int
		large bool
	}{{64 << 10, false}, {64 << 20, true}} {
		b := newBench(t, &fakeConfig{})
		exchange(t, b.conn(t, listen.Outbound, echoing(t)), c.bytes)
		b.handlers.Wait()
		if sizes := b.pipes.sizes(t); (sizes[largePipe] > 0) != c.large || sizes[largePipe]+sizes[pipeSize] == 0 {
			t.Errorf("after %d bytes the idle pipes' sizes are %v", c.bytes, sizes)
		}
	}
}

func TestFewLargePipesAreKept(t *testing.T) {
	var p pipes
	defer p.close()
	var lent []pipe
	for range maxIdlePipes + 2 {
		x, ok := p.get()
		if !ok {
			t.Fatal("no pipe")
		}
		x.resize(largePipe)
		lent = append(lent, x)
	}
	for range 2 { // what is counted stays right
		for _, x := range lent {
			p.put(x)
		}
		if got := p.sizes(t); got[largePipe] != maxIdleLarge || got[pipeSize] != maxIdlePipes-maxIdleLarge {
			t.Fatalf("sizes of the idle ones: %v", got)
		}
		lent = lent[:0]
		for range maxIdlePipes {
			x, _ := p.get()
			x.resize(largePipe)
			lent = append(lent, x)
		}
	}
	for _, x := range lent {
		x.close()
	}
}
