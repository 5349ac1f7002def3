package conflist

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Form is what a configuration is.
type Form int

// The two forms of the CNI specification. Runtimes tell them by the file's name:
// .conflist is a Chain, .conf and .json are a Single.
const (
	Chain  Form = iota + 1 // a list of plugins
	Single                 // one plugin's configuration, deprecated since 1.0.0
)

// What Add and Remove refuse.
var (
	// ErrForm is a configuration that is valid JSON and is not CNI's.
	ErrForm = errors.New("not a CNI network configuration")
	// ErrVersion is a cniVersion that weir-cni does not speak: chained, it would
	// fail every pod.
	ErrVersion = errors.New("cniVersion not supported by weir-cni")
	// ErrDropIns is a list whose plugins are all in files of their own (since
	// libcni 1.3): an entry has no place in it.
	ErrDropIns = errors.New("its plugins are drop-in files")
	// ErrAlone is a chain without a primary plugin: nobody but us is in it.
	ErrAlone = errors.New("no other plugin in the chain")
)

// versions are those weir-cni speaks. Earlier ones know no chains.
var versions = []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}

// noVersion is what a configuration without cniVersion means.
const noVersion = "0.1.0"

const space = " \t\r\n" // of JSON, RFC 8259 section 2

// member is a member of an object; start and end delimit its value.
type member struct {
	key        string
	start, end int
}

// element is a plugin of a chain, by its place in the source.
type element struct {
	kind       string // its "type"
	start, end int
}

// document is a parsed configuration. src stays as it was read.
type document struct {
	src     []byte
	form    Form
	name    string
	version string    // for errors; empty: none is given
	plugins []element // of a Chain; none: they are drop-ins
	inlined bool      // loadOnlyInlinedPlugins: drop-ins are not read
}

// Info is what a configuration is.
type Info struct {
	Form Form
	Name string // of the network
	// Plugins are those in the configuration itself.
	Plugins int
	// DropIns: a libcni that knows drop-ins reads those of this network, too.
	DropIns bool
	// Delegates: one of its plugins runs others' configurations (Multus).
	Delegates bool
}

// Inspect says what a configuration is, or why it is none.
func Inspect(conf []byte) (Info, error) {
	doc, err := parse(conf)
	if err != nil {
		return Info{}, err
	}
	return Info{
		Form: doc.form, Name: doc.name, Plugins: len(doc.elements()),
		DropIns:   doc.form == Chain && !doc.inlined && networkName.MatchString(doc.name),
		Delegates: doc.delegates(),
	}, nil
}

// networkName is what libcni takes for one; it is a folder's name, too.
var networkName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.\-]*$`)

// decodeBool takes what libcni does: strings, too.
func decodeBool(value []byte, to *bool) error {
	if err := json.Unmarshal(value, to); err == nil {
		return nil
	}
	var text string
	if err := decodeString(value, &text); err != nil {
		return err
	}
	switch strings.ToLower(text) {
	case "true", "false":
		*to = strings.EqualFold(text, "true")
		return nil
	}
	return fmt.Errorf("%w: neither true nor false", ErrForm)
}

func parse(src []byte) (document, error) {
	members, err := membersOf(src)
	if err != nil {
		return document{}, err
	}
	doc := document{src: src}
	for _, m := range members {
		value := src[m.start:m.end]
		switch m.key {
		case "name":
			err = decodeString(value, &doc.name)
		case "cniVersion":
			err = decodeString(value, &doc.version)
		case "type":
			var kind string
			err = decodeString(value, &kind)
			if doc.form == 0 && kind != "" {
				doc.form = Single
			}
		case "loadOnlyInlinedPlugins":
			err = decodeBool(value, &doc.inlined)
		case "plugins":
			if doc.form == Chain {
				return document{}, fmt.Errorf("%w: plugins is there twice", ErrForm)
			}
			doc.form = Chain
			doc.plugins, err = elementsOf(src, m)
		}
		if err != nil {
			return document{}, fmt.Errorf("%s: %w", m.key, err)
		}
	}
	switch {
	case doc.form == 0 && doc.name != "" && !doc.inlined:
		doc.form = Chain // of drop-ins
	case doc.form == 0:
		return document{}, fmt.Errorf("%w: it has neither plugins nor a type", ErrForm)
	case doc.form == Chain && len(doc.plugins) == 0:
		return document{}, fmt.Errorf("%w: plugins is empty", ErrForm)
	case doc.name == "":
		return document{}, fmt.Errorf("%w: it has no name", ErrForm)
	}
	return doc, nil
}

// CheckVersion tells whether weir-cni can be in this chain, in whatever form.
func CheckVersion(conf []byte) error {
	doc, err := parse(conf)
	if err != nil {
		return err
	}
	return doc.checkVersion()
}

// checkVersion tells whether a runtime can run weir-cni in this chain. Of
// several versions (cniVersions, since 1.1.0) a runtime takes the highest it
// knows.
func (d document) checkVersion() error {
	var conf struct {
		CNIVersions []string `json:"cniVersions"`
	}
	if err := json.Unmarshal(d.src, &conf); err != nil {
		return fmt.Errorf("cniVersions: %w", err)
	}
	offered := conf.CNIVersions
	switch {
	case d.version != "":
		offered = append(offered, d.version)
	case len(offered) == 0:
		offered = []string{noVersion}
	}
	for _, v := range offered {
		if slices.Contains(versions, v) {
			return nil
		}
	}
	return fmt.Errorf("%w: it speaks %q, the configuration says %q", ErrVersion, versions, offered)
}

// ours are the places of our entries in the chain.
func (d document) ours() []int {
	var out []int
	for i, p := range d.plugins {
		if p.kind == PluginType {
			out = append(out, i)
		}
	}
	return out
}

// membersOf returns the members of the object that src is, in their order.
func membersOf(src []byte) ([]member, error) {
	// Checked as a whole first: a token decoder reads only as far as it is asked.
	var whole map[string]json.RawMessage
	if err := json.Unmarshal(src, &whole); err != nil {
		return nil, fmt.Errorf("not a JSON object: %w", err)
	}
	if whole == nil {
		return nil, fmt.Errorf("%w: it is null", ErrForm)
	}
	dec := json.NewDecoder(bytes.NewReader(src))
	if _, err := dec.Token(); err != nil { // {
		return nil, err
	}
	var out []member
	for dec.More() {
		token, err := dec.Token()
		if err != nil {
			return nil, err
		}
		key, ok := token.(string)
		if !ok {
			return nil, fmt.Errorf("%w: key %v is no string", ErrForm, token)
		}
		start, end, err := nextValue(dec)
		if err != nil {
			return nil, err
		}
		out = append(out, member{key, start, end})
	}
	return out, nil
}

// arrayOf returns the values of the array that m's value is.
func arrayOf(src []byte, m member) ([]element, error) {
	if src[m.start] != '[' {
		return nil, fmt.Errorf("%w: not an array", ErrForm)
	}
	dec := json.NewDecoder(bytes.NewReader(src[m.start:m.end]))
	if _, err := dec.Token(); err != nil { // [
		return nil, err
	}
	var out []element
	for dec.More() {
		start, end, err := nextValue(dec)
		if err != nil {
			return nil, err
		}
		out = append(out, element{start: m.start + start, end: m.start + end})
	}
	return out, nil
}

// elementsOf returns the plugins of the array that m's value is.
func elementsOf(src []byte, m member) ([]element, error) {
	out, err := arrayOf(src, m)
	if err != nil {
		return nil, err
	}
	for i := range out {
		e := &out[i]
		members, err := membersOf(src[e.start:e.end])
		if err != nil {
			return nil, fmt.Errorf("plugin %d: %w", i, err)
		}
		for _, f := range members {
			if f.key != "type" {
				continue
			}
			if err := decodeString(src[e.start+f.start:e.start+f.end], &e.kind); err != nil {
				return nil, fmt.Errorf("plugin %d: type: %w", i, err)
			}
		}
		if e.kind == "" {
			return nil, fmt.Errorf("%w: plugin %d has no type", ErrForm, i)
		}
	}
	return out, nil
}

// nextValue reads the value that dec stands before and says where it is in dec's
// input.
func nextValue(dec *json.Decoder) (int, int, error) {
	var raw json.RawMessage
	if err := dec.Decode(&raw); err != nil {
		return 0, 0, err
	}
	end := int(dec.InputOffset())
	return end - len(raw), end, nil
}

func decodeString(value []byte, to *string) error {
	if value[0] != '"' {
		return fmt.Errorf("%w: not a string", ErrForm)
	}
	return json.Unmarshal(value, to)
}
