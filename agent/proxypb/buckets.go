package proxypb

// Buckets are the upper bounds of the classic buckets of Weir's histograms, in
// seconds: OpenTelemetry's and Envoy's, and finer ones below. The last one of
// Histogram.classic, for what is above, has none.
var Buckets = []float64{0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 30, 60}

// Schema is the schema of Histogram's native buckets: their bounds are the powers of
// the eighth root of 2.
const Schema = 3
