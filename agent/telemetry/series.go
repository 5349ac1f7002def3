package telemetry

import (
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/agent/proxypb"
)

const (
	// maxSeries bounds the sets of labels of one metric; what comes when there are as
	// many has Other for every label.
	maxSeries = 10_000
	// idle is how long a series is kept that nothing is added to.
	idle = 10 * time.Minute

	// maxIndex is that of the last native bucket that a proxy may use, 2^32 s; the
	// first is the negative of it, below a nanosecond.
	maxIndex = 32 << proxypb.Schema

	// Other is the value of labels that had too many values.
	Other = "_other"
	// Unknown is the value of labels which nobody can tell.
	Unknown = "unknown"
)

// family is one metric, of all proxies of the node.
type family struct {
	desc   *prometheus.Desc
	labels []string
	kind   prometheus.ValueType // of its values; histograms have none
	series map[string]*series
}

// series is what was counted for one set of labels: a number, or a histogram.
type series struct {
	labels  []string
	began   time.Time
	touched time.Time

	value float64

	sum     float64
	classic []uint64
	native  map[int]int64
	zero    uint64
}

func newFamily(kind prometheus.ValueType, name, help string, labels ...string) *family {
	return &family{desc: prometheus.NewDesc(name, help, labels, nil), labels: labels, kind: kind, series: map[string]*series{}}
}

// at is the series of those values, in the order of the labels.
func (f *family) at(now time.Time, values ...string) *series {
	key := strings.Join(values, "\x00")
	s := f.series[key]
	if s == nil && len(f.series) >= maxSeries {
		values = make([]string, len(f.labels))
		for i := range values {
			values[i] = Other
		}
		key = strings.Join(values, "\x00")
		s = f.series[key]
	}
	if s == nil {
		s = &series{labels: values, began: now}
		f.series[key] = s
	}
	s.touched = now
	return s
}

// add adds to a number. Nothing makes no series.
func (f *family) add(now time.Time, n uint64, values ...string) {
	if n > 0 {
		f.at(now, values...).value += float64(n)
	}
}

// merge adds a proxy's histogram; nil is none. One in buckets that are not these, of
// a proxy of another version, is left out.
func (f *family) merge(now time.Time, h *proxypb.Histogram, values ...string) {
	if len(h.GetClassic()) != len(proxypb.Buckets)+1 || len(h.GetNativeIndexes()) != len(h.GetNativeCounts()) ||
		slices.ContainsFunc(h.GetNativeIndexes(), func(i int32) bool { return i < -maxIndex || i > maxIndex }) {
		return
	}
	s := f.at(now, values...)
	if s.classic == nil {
		s.classic, s.native = make([]uint64, len(h.GetClassic())), map[int]int64{}
	}
	s.sum += h.GetSum()
	s.zero += h.GetZero()
	for i, n := range h.GetClassic() {
		s.classic[i] += n
	}
	for i, index := range h.GetNativeIndexes() {
		s.native[int(index)] += int64(h.GetNativeCounts()[i])
	}
}

// collect sends the series, and forgets those that are idle.
func (f *family) collect(now time.Time, ch chan<- prometheus.Metric) {
	for key, s := range f.series {
		switch {
		case now.Sub(s.touched) >= idle:
			delete(f.series, key)
		case s.classic != nil:
			ch <- s.histogram(f.desc)
		default:
			ch <- prometheus.MustNewConstMetric(f.desc, f.kind, s.value, s.labels...)
		}
	}
}

func (s *series) histogram(desc *prometheus.Desc) prometheus.Metric {
	count := s.zero
	native := make(map[int]int64, len(s.native))
	for i, n := range s.native {
		native[i] = n
		count += uint64(n)
	}
	m, err := prometheus.NewConstNativeHistogram(desc, count, s.sum, native, nil, s.zero, proxypb.Schema,
		prometheus.DefNativeHistogramZeroThreshold, s.began, s.labels...)
	if err != nil {
		return prometheus.NewInvalidMetric(desc, err)
	}
	out := bothGrains{Metric: m}
	cumulative := uint64(0)
	for i, bound := range proxypb.Buckets {
		cumulative += s.classic[i]
		out.classic = append(out.classic, &dto.Bucket{UpperBound: proto.Float64(bound), CumulativeCount: proto.Uint64(cumulative)})
	}
	return out
}

// bothGrains is a native histogram with classic buckets beside it. The library makes
// such ones only of single observations.
type bothGrains struct {
	prometheus.Metric
	classic []*dto.Bucket
}

// Write implements prometheus.Metric.
func (b bothGrains) Write(out *dto.Metric) error {
	if err := b.Metric.Write(out); err != nil {
		return err
	}
	out.GetHistogram().Bucket = b.classic
	return nil
}
