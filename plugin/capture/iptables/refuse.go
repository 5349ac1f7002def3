package iptables

import "fmt"

// Refusal is something that rules of package nft can say and iptables cannot.
type Refusal struct {
	Option string // of capture.Spec, as the pod's owner writes it
	What   string // what of it is refused
	Why    string
}

var plusInterface = Refusal{
	Option: "exclude-interfaces",
	What:   `a name that ends in "+"`,
	Why:    "iptables takes it for the beginning of names",
}

// Refusals are all there are: whatever else a Spec says, iptables does as nftables
// does.
func Refusals() []Refusal { return []Refusal{plusInterface} }

// RefusedError says that the rules ask for what iptables cannot do. Nothing was
// changed.
type RefusedError struct {
	Option Refusal
	Value  string
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("%s: %q: %s cannot be had with the iptables backend: %s",
		e.Option.Option, e.Value, e.Option.What, e.Option.Why)
}
