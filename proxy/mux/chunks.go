package mux

// chunks are bytes that were not read when they came, in buffers that are lent. The zero
// value is none.
type chunks struct {
	list []*[]byte
	from int // of the first, what is not read
	n    int
}

func (c *chunks) add(p []byte) {
	c.n += len(p)
	for len(p) > 0 {
		if last := len(c.list) - 1; last < 0 || len(*c.list[last]) == cap(*c.list[last]) {
			c.list = append(c.list, lend())
		}
		b := c.list[len(c.list)-1]
		m := min(len(p), cap(*b)-len(*b))
		*b = append(*b, p[:m]...)
		p = p[m:]
	}
}

// copy is of the first ones.
func (c *chunks) copy(p []byte) int {
	n, from := 0, c.from
	for _, b := range c.list {
		n += copy(p[n:], (*b)[from:])
		from = 0
	}
	return n
}

// skip says that so many are read.
func (c *chunks) skip(n int) {
	c.n -= n
	done := 0
	for ; done < len(c.list) && c.from+n >= len(*c.list[done]); done++ {
		n -= len(*c.list[done]) - c.from
		c.from = 0
		giveBack(c.list[done])
	}
	c.from += n
	left := copy(c.list, c.list[done:])
	clear(c.list[left:])
	if c.list = c.list[:left]; left == 0 {
		c.list = nil
	}
}

func (c *chunks) drop() { c.skip(c.n) }
