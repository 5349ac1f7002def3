package route

// Fields are the header fields of one message, in order, as a codec keeps them. A
// name given here is in lower case, and is compared without regard to case.
type Fields interface {
	Len() int
	Is(i int, name string) bool    // whether that is the name of field i
	Set(i int, value string)       // in place of the value of field i
	Append(i int, value string)    // to the value of field i, after a comma
	Remove(i int)                  // field i; the order of the others stays
	Add(name string, value string) // a field after the last one
}

// Apply changes fields, by the Gateway API's HTTPHeaderFilter: Set leaves one field
// of its name, Add appends to the last field of its name ("a,b") or adds one. For
// Set-Cookie it always adds one, whose values cannot be joined (RFC 9110, 5.3). Fields
// that are the codec's stay as they are.
func (c *HeaderChange) Apply(f Fields) {
	for i := range c.Set {
		if !codecs(c.Set[i].Name) {
			set(f, &c.Set[i])
		}
	}
	for i := range c.Add {
		if !codecs(c.Add[i].Name) {
			add(f, &c.Add[i])
		}
	}
	for _, name := range c.Remove {
		if !codecs(name) {
			removeFrom(f, 0, name)
		}
	}
}

// codecs reports whether a field is for the codec alone: it says where the message
// ends, or how this one connection goes on. Changed, the next one would read another
// message than was checked (RFC 9112, section 11.2).
func codecs(name string) bool {
	switch name {
	case "content-length", "transfer-encoding", "connection", "keep-alive", "proxy-connection", "upgrade":
		return true
	}
	return false
}

func set(f Fields, h *Header) {
	first := 0
	for first < f.Len() && !f.Is(first, h.Name) {
		first++
	}
	if first == f.Len() {
		f.Add(h.Name, h.Value)
		return
	}
	f.Set(first, h.Value)
	removeFrom(f, first+1, h.Name)
}

func add(f Fields, h *Header) {
	for i := f.Len() - 1; i >= 0 && h.Name != "set-cookie"; i-- {
		if f.Is(i, h.Name) {
			f.Append(i, h.Value)
			return
		}
	}
	f.Add(h.Name, h.Value)
}

// removeFrom removes the fields of a name from field i on.
func removeFrom(f Fields, i int, name string) {
	for i < f.Len() {
		if f.Is(i, name) {
			f.Remove(i)
		} else {
			i++
		}
	}
}
