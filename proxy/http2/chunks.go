package http2

import "sync"

// chunkSize is what a stream holds at least, once it holds anything.
const chunkSize = 8 << 10

var chunkPool = sync.Pool{New: func() any { return new(chunk) }}

type chunk struct {
	next *chunk
	r, w int
	b    [chunkSize]byte
}

// chunks is a queue of bytes.
type chunks struct {
	first, last *chunk
	size        int
}

func (q *chunks) append(p []byte) {
	q.size += len(p)
	for len(p) > 0 {
		if q.last == nil || q.last.w == chunkSize {
			c := chunkPool.Get().(*chunk)
			c.next, c.r, c.w = nil, 0, 0
			if q.last == nil {
				q.first = c
			} else {
				q.last.next = c
			}
			q.last = c
		}
		n := copy(q.last.b[q.last.w:], p)
		q.last.w += n
		p = p[n:]
	}
}

// peek returns the bytes at the front, and whether they are all there is.
func (q *chunks) peek() ([]byte, bool) {
	return q.first.b[q.first.r:q.first.w], q.first.next == nil
}

// drop forgets n bytes of those that peek returned.
func (q *chunks) drop(n int) {
	q.size -= n
	q.first.r += n
	if q.first.r == q.first.w {
		c := q.first
		q.first = c.next
		if q.first == nil {
			q.last = nil
		}
		chunkPool.Put(c)
	}
}

// clear forgets everything.
func (q *chunks) clear() {
	for q.first != nil {
		q.drop(q.first.w - q.first.r)
	}
}
