package route

import (
	"fmt"
	"regexp"
)

// maxRegexp bounds an expression, in bytes.
const maxRegexp = 1024

// Regexp is an RE2 expression that matches the whole of a text.
type Regexp struct {
	source string
	whole  *regexp.Regexp
}

// CompileWhole compiles an expression of at most 1,024 bytes.
func CompileWhole(expression string) (*Regexp, error) {
	if len(expression) > maxRegexp {
		return nil, fmt.Errorf("regular expression of %d bytes: at most %d are allowed", len(expression), maxRegexp)
	}
	// By itself first: `a)|(b` is none.
	if _, err := regexp.Compile(expression); err != nil {
		return nil, fmt.Errorf("regular expression %q: %w", expression, err)
	}
	whole, err := regexp.Compile(`^(?:` + expression + `)$`)
	if err != nil {
		return nil, fmt.Errorf("regular expression %q: %w", expression, err)
	}
	return &Regexp{source: expression, whole: whole}, nil
}

// String is the expression.
func (r *Regexp) String() string { return r.source }

// Match reports whether the expression matches the whole of text.
func (r *Regexp) Match(text []byte) bool { return r.whole.Match(text) }
