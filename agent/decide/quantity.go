package decide

import (
	"fmt"
	"math/big"
	"strconv"
	"strings"
)

// suffixes of Kubernetes' quantities, as factors. A suffix of e or E and a number
// is a power of ten.
var suffixes = map[string]*big.Rat{
	"":  power(10, 0),
	"n": power(10, -9), "u": power(10, -6), "m": power(10, -3),
	"k": power(10, 3), "M": power(10, 6), "G": power(10, 9), "T": power(10, 12), "P": power(10, 15), "E": power(10, 18),
	"Ki": power(2, 10), "Mi": power(2, 20), "Gi": power(2, 30), "Ti": power(2, 40), "Pi": power(2, 50), "Ei": power(2, 60),
}

// Bounds of what is read: no quantity that means something is longer, and a
// power of ten with many digits would be a number with that many.
const (
	maxQuantity = 64 // bytes
	maxExponent = 100
)

func power(base, exponent int64) *big.Rat {
	n := new(big.Int).Exp(big.NewInt(base), big.NewInt(max(exponent, -exponent)), nil)
	if exponent < 0 {
		return new(big.Rat).SetFrac(big.NewInt(1), n)
	}
	return new(big.Rat).SetInt(n)
}

// parseQuantity reads a quantity as Kubernetes writes them ("64Mi", "0.5G", "1e8",
// "134217728"): a decimal number and a suffix. The number may have a sign.
func parseQuantity(s string) (*big.Rat, error) {
	wrong := fmt.Errorf("not a quantity like 64Mi or 134217728")
	if len(s) > maxQuantity {
		return nil, wrong
	}
	number, suffix := s, ""
	if i := strings.IndexFunc(s, func(r rune) bool { return !strings.ContainsRune("+-.0123456789", r) }); i >= 0 {
		number, suffix = s[:i], s[i:]
	}
	digits := strings.TrimLeft(number, "+-")
	if len(number)-len(digits) > 1 || strings.ContainsAny(digits, "+-") || strings.Count(digits, ".") > 1 || strings.Trim(digits, ".") == "" {
		return nil, wrong
	}
	value, ok := new(big.Rat).SetString(number)
	if !ok {
		return nil, wrong
	}
	if factor, ok := suffixes[suffix]; ok {
		return value.Mul(value, factor), nil
	}
	exponent, err := strconv.Atoi(strings.TrimLeft(suffix, "eE"))
	if err != nil || len(suffix) < 2 || !strings.ContainsRune("eE", rune(suffix[0])) || strings.ContainsRune("eE", rune(suffix[1])) ||
		exponent < -maxExponent || exponent > maxExponent {
		return nil, wrong
	}
	return value.Mul(value, power(10, int64(exponent))), nil
}

// parseBytes reads a quantity of bytes; it rounds up, as Kubernetes does, and keeps to the bounds.
func parseBytes(s string, least, most int64) (int64, error) {
	value, err := parseQuantity(s)
	if err != nil {
		return 0, err
	}
	if value.Cmp(new(big.Rat).SetInt64(least)) < 0 || value.Cmp(new(big.Rat).SetInt64(most)) > 0 {
		return 0, fmt.Errorf("not between %s and %s", inMi(least), inMi(most))
	}
	up := new(big.Int).Add(value.Num(), new(big.Int).Sub(value.Denom(), big.NewInt(1)))
	return up.Div(up, value.Denom()).Int64(), nil
}

func inMi(bytes int64) string {
	if bytes%(1<<30) == 0 {
		return fmt.Sprintf("%dGi", bytes>>30)
	}
	return fmt.Sprintf("%dMi", bytes>>20)
}
