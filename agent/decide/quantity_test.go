package decide

import "testing"

// The values are what k8s.io/apimachinery's resource.ParseQuantity gives.
func TestQuantities(t *testing.T) {
	for in, want := range map[string]int64{
		"134217728":       134217728,
		"+64Mi":           64 << 20,
		"64Mi":            64 << 20,
		"65536Ki":         64 << 20,
		"0.5Gi":           512 << 20,
		".5Gi":            512 << 20,
		"1.Gi":            1 << 30,
		"100M":            100e6,
		"100000k":         100e6,
		"0.1G":            100e6,
		"1e8":             100e6,
		"1E8":             100e6,
		"10e+7":           100e6,
		"1e10":            10e9,
		"1000000000e-1":   100e6,
		"0.000000001E":    1e9,
		"100000000001m":   100000001, // rounded up
		"33554432.1":      33554433,
		"50000000000000u": 50e6,
		"0.0000625Ti":     68719477,
		"16Gi":            16 << 30,
		"32Mi":            32 << 20,

		"":                    0,
		"Mi":                  0,
		".":                   0,
		"64 Mi":               0,
		"64mi":                0,
		"64MI":                0,
		"64MiB":               0,
		"64K":                 0,
		"64Mi ":               0,
		"1e":                  0,
		"1e1.5":               0,
		"1ee8":                0,
		"1e8Mi":               0,
		"0x64Mi":              0,
		"1_000_000_00":        0,
		"1/3Gi":               0,
		"--64Mi":              0,
		"-64Mi":               0,
		"1..5Gi":              0,
		"1.5.0Gi":             0,
		"６４Mi":                0,
		"1e999999999":         0,
		"1e-999999999":        0,
		"31.999Mi":            0,
		"16.0000000001Gi":     0,
		"1E":                  0,
		"Inf":                 0,
		"NaN":                 0,
		"1e99999999999999999": 0,
	} {
		got, err := parseBytes(in, MinMemoryLimit, MaxMemoryLimit)
		if got != want || (err != nil) != (want == 0) {
			t.Errorf("%q: %d, %v; want %d", in, got, err, want)
		}
	}
}
