package journal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Reader is the agent's side. Make it with Open.
type Reader struct {
	file   *os.File
	header []byte // mapped; the ring is read, as a file

	next   uint64 // position of the next record
	number uint64 // of the next record
	begun  bool   // the number is that of what this reader read
	resume uint64 // records before this position were read by another reader
	before copied
}

// copied is previous in memory of its own.
type copied struct {
	previous
	bytes [texts][]byte
}

func (c *copied) set(i int, text []byte) {
	c.bytes[i] = append(c.bytes[i][:0], text...)
	c.texts[i] = unsafe.String(unsafe.SliceData(c.bytes[i]), len(text))
}

func (c *copied) clear() { c.previous = previous{} }

// Open reads a proxy's journal from where the agent before was, or from its oldest record.
// The file is the reader's from then on.
func Open(file *os.File) (*Reader, error) {
	r, err := open(file)
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("journal: %w", err)
	}
	return r, nil
}

func open(file *os.File) (*Reader, error) {
	got, err := unix.FcntlInt(file.Fd(), unix.F_GET_SEALS, 0)
	if err != nil {
		return nil, errors.New("it is not a memory file")
	}
	if got&seals != seals || got&unix.F_SEAL_WRITE != 0 {
		return nil, fmt.Errorf("it is a memory file with other seals (%#x)", got)
	}
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() != fileSize {
		return nil, fmt.Errorf("it is of %d bytes, not %d", info.Size(), fileSize)
	}
	header, err := unix.Mmap(int(file.Fd()), 0, headerSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("its header: %w", err)
	}
	if got := word(header, atMagic).Load(); got != magic {
		_ = unix.Munmap(header)
		return nil, fmt.Errorf("it is of another version (%#x)", got)
	}
	// What was read of a block is read once more: records are told by those before them.
	read := word(header, atRead).Load()
	return &Reader{file: file, header: header, next: read - read%block, resume: read, number: word(header, atReadNumber).Load()}, nil
}

// Close lets go of the journal.
func (r *Reader) Close() {
	_ = unix.Munmap(r.header)
	r.file.Close()
}

// Waiting is how many bytes of records wait.
func (r *Reader) Waiting() uint64 {
	head := word(r.header, atHead).Load()
	next := max(r.next, r.resume, word(r.header, atTail).Load())
	return min(head-min(next, head), Capacity)
}

const (
	// MinBuffer is room for any record.
	MinBuffer = blockHeader + binary.MaxVarintLen32 + maxSize
	// piece is how many bytes are read at a time, where no record is larger: what they, and the
	// lines that are made of them, go through is in the processor's nearest caches.
	piece = 32 << 10
)

// Read reads some of the records that wait, by way of buf, which has MinBuffer bytes. They
// are each's until it returns. Read returns how many bytes of the journal that were, 0 for
// none. They are read then, also for the next agent. An error says that there is nothing more
// to be had from this journal.
func (r *Reader) Read(buf []byte, each func(*Record)) (uint64, error) {
	head := word(r.header, atHead).Load()
	tail := word(r.header, atTail).Load() // may be past that head by now, but no ring behind it
	if tail%block != 0 || head > tail && head-tail > Capacity {
		return 0, errDamaged
	}
	r.next = max(r.next, tail)
	if r.next >= head {
		return 0, nil
	}
	began := r.next
	at := r.next % Capacity
	whole := min(head-r.next, block-at%block, MinBuffer)
	b := buf[:min(whole, piece)]
	if err := r.readAt(b, at); err != nil {
		return 0, err
	}
	if first := r.first(b); first > uint64(len(b)) {
		b = buf[:min(whole, first)]
		if err := r.readAt(b, at); err != nil {
			return 0, err
		}
	}
	// What the proxy has written over meanwhile is before the tail by now: the whole block.
	tail = word(r.header, atTail).Load()
	if tail > r.next {
		return 0, nil
	}
	if err := r.parse(b, head, each); err != nil {
		return 0, err
	}
	word(r.header, atReadNumber).Store(r.number)
	word(r.header, atRead).Store(max(r.next, r.resume))
	return r.next - began, nil
}

// first is how many bytes of b, at least, the next record ends with.
func (r *Reader) first(b []byte) uint64 {
	skip := 0
	if r.next%block == 0 {
		skip = min(blockHeader, len(b))
	}
	size, n := binary.Uvarint(b[skip:])
	return uint64(skip+max(n, 0)) + min(size, maxSize)
}

// readAt reads the ring.
func (r *Reader) readAt(b []byte, at uint64) error {
	if _, err := r.file.ReadAt(b, headerSize+int64(at)); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}

// parse hands on what is in b, which is of one block and begins with the next record.
func (r *Reader) parse(b []byte, head uint64, each func(*Record)) error {
	end := min(head, r.next-r.next%block+block)
	dropped := uint64(0)
	if r.next%block == 0 {
		if len(b) < blockHeader {
			return errDamaged
		}
		number := binary.LittleEndian.Uint64(b)
		if r.next >= r.resume {
			if number < r.number && r.begun {
				return errDamaged
			}
			dropped = number - min(number, r.number)
		}
		r.number, r.begun = number, true
		r.before.clear()
		b = b[blockHeader:]
		r.next += blockHeader
	}
	var record Record
	for len(b) > 0 {
		size, n := binary.Uvarint(b)
		switch {
		case n < 0 || size > maxSize:
			return errDamaged
		case n == 0 || size > uint64(len(b)-n):
			if r.next+uint64(len(b)) == end {
				return errDamaged // there is no more of it
			}
			return nil // the rest of it is next time's
		case size == 0:
			r.next += block - r.next%block
			return nil
		}
		if !decode(&record, b[n:n+int(size)], &r.before) {
			return errDamaged
		}
		b = b[n+int(size):]
		again := r.next < r.resume
		r.next += uint64(n) + size
		r.number++
		if !again {
			record.DroppedBefore, dropped = dropped, 0
			each(&record)
		}
	}
	return nil
}
