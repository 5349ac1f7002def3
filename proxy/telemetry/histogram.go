package telemetry

import (
	"math"
	"slices"
	"time"

	"github.com/weirmesh/weir/agent/proxypb"
)

// bounds are the upper ones of the classic buckets, in seconds; the last bucket has
// none.
var bounds = [...]float64{0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 30, 60}

// fractions are the lower bounds of the native buckets of schema 3, of which there
// are eight for each power of two, as fractions of math.Frexp.
var fractions = func() [8]float64 {
	var out [8]float64
	for i := range out {
		out[i] = math.Exp2(float64(i)/8 - 1)
	}
	return out
}()

// histogram counts durations in both grains of proxypb.Histogram.
type histogram struct {
	sum     float64
	classic [len(bounds) + 1]uint64
	native  []bucket // in order of index
	zero    uint64
}

type bucket struct {
	index int32
	count uint64
}

func (h *histogram) observe(d time.Duration) {
	v := d.Seconds()
	h.sum += v
	i, _ := slices.BinarySearch(bounds[:], v)
	h.classic[i]++
	if v <= 0 {
		h.zero++
		return
	}
	index := nativeIndex(v)
	at, found := slices.BinarySearchFunc(h.native, index, func(b bucket, index int32) int { return int(b.index - index) })
	if !found {
		h.native = slices.Insert(h.native, at, bucket{index: index})
	}
	h.native[at].count++
}

// nativeIndex is the native bucket of a value above 0: the values up to 2^(index/8)
// that are over 2^((index-1)/8).
func nativeIndex(v float64) int32 {
	fraction, exponent := math.Frexp(v)
	i, _ := slices.BinarySearch(fractions[:], fraction)
	return int32(i + (exponent-1)*len(fractions))
}

// message is nil if nothing was observed.
func (h *histogram) message() *proxypb.Histogram {
	out := &proxypb.Histogram{Sum: h.sum, Zero: h.zero, Classic: slices.Clone(h.classic[:])}
	for _, b := range h.native {
		out.NativeIndexes = append(out.NativeIndexes, b.index)
		out.NativeCounts = append(out.NativeCounts, b.count)
	}
	if len(h.native) == 0 && h.zero == 0 {
		return nil
	}
	return out
}
