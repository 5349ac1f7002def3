package telemetry

import (
	"math"
	"slices"
	"time"

	"github.com/weirmesh/weir/agent/proxypb"
)

// fractions are the bounds of the native buckets between two powers of two, as
// fractions of math.Frexp.
var fractions = func() [1 << proxypb.Schema]float64 {
	var out [1 << proxypb.Schema]float64
	for i := range out {
		out[i] = math.Exp2(float64(i)/float64(len(out)) - 1)
	}
	return out
}()

// histogram counts durations in both grains of proxypb.Histogram.
type histogram struct {
	sum     float64
	classic []uint64 // nil: nothing was observed
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
	if h.classic == nil {
		h.classic = make([]uint64, len(proxypb.Buckets)+1)
	}
	i, _ := slices.BinarySearch(proxypb.Buckets, v)
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

// message is nil if nothing was observed. The histogram is not to be used any more.
func (h *histogram) message() *proxypb.Histogram {
	if h.classic == nil {
		return nil
	}
	out := &proxypb.Histogram{Sum: h.sum, Zero: h.zero, Classic: h.classic}
	for _, b := range h.native {
		out.NativeIndexes = append(out.NativeIndexes, b.index)
		out.NativeCounts = append(out.NativeCounts, b.count)
	}
	return out
}
