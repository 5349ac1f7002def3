package capture

// State is what a backend finds in a namespace: its rules as it writes them, and
// what they counted. A namespace without rules has an empty Text.
type State struct {
	Text     string
	Counters map[string]Counter
	// KeepsClient: the rules let the proxy use the caller's address.
	KeepsClient bool
}

// Counter is the value of a named counter. Both address families are in it.
type Counter struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}
