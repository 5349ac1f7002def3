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
	begun  bool   // the number is that of a record read before
}

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
	return &Reader{
		file: file, header: header,
		next: word(header, atRead).Load(), number: word(header, atReadNumber).Load(),
	}, nil
}

// Close lets go of the journal.
func (r *Reader) Close() {
	_ = unix.Munmap(r.header)
	r.file.Close()
}

// Waiting is how many bytes of records wait.
func (r *Reader) Waiting() uint64 {
	head := word(r.header, atHead).Load()
	return min(head-min(r.next, head), Capacity)
}

const (
	// MinBuffer is room for any record.
	MinBuffer = maxSize
	// piece is how many bytes are read at a time, where no record is larger: what they, and the
	// lines that are made of them, go through is in the processor's nearest caches.
	piece = 32 << 10
)

// Read reads some of the records that wait, by way of buf, which has MinBuffer bytes. They
// are each's until it returns, with their texts, which are in buf. It returns how many bytes
// of the journal those were, 0 for none. They are read then, also for the next agent. An error
// says that there is nothing more to be had from this journal.
func (r *Reader) Read(buf []byte, each func(*Record)) (uint64, error) {
	head := word(r.header, atHead).Load()
	tail := word(r.header, atTail).Load() // may be past that head by now, but no ring behind it
	if head%8 != 0 || tail%8 != 0 || head > tail && head-tail > Capacity {
		return 0, errDamaged
	}
	r.next = max(r.next, tail)
	if r.next >= head {
		return 0, nil
	}
	at := r.next % Capacity
	whole := min(head-r.next, Capacity-at, MinBuffer)
	b := buf[:min(whole, piece)]
	if err := r.readAt(b, at); err != nil {
		return 0, err
	}
	if size := uint64(binary.LittleEndian.Uint32(b)); size > uint64(len(b)) {
		b = buf[:min(whole, size)]
		if err := r.readAt(b, at); err != nil {
			return 0, err
		}
	}
	// What the proxy has written over meanwhile is before the tail by now.
	tail = word(r.header, atTail).Load()
	if tail%8 != 0 {
		return 0, errDamaged
	}
	if tail > r.next {
		b = b[min(tail-r.next, uint64(len(b))):]
		r.next = tail
	}
	began := r.next
	err := r.parse(b, head, each)
	return r.next - began, err
}

// readAt reads the ring.
func (r *Reader) readAt(b []byte, at uint64) error {
	if _, err := r.file.ReadAt(b, headerSize+int64(at)); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}

// parse hands on what is in b, which begins with the next record.
func (r *Reader) parse(b []byte, head uint64, each func(*Record)) error {
	text := unsafe.String(unsafe.SliceData(b), len(b)) // a copy a record costs more than the rest
	var record Record
	for len(b) >= fillerSize {
		size := uint64(binary.LittleEndian.Uint32(b))
		kind := binary.LittleEndian.Uint32(b[4:])
		left := Capacity - r.next%Capacity
		if size < fillerSize || size%8 != 0 || size > min(left, head-r.next) {
			return errDamaged
		}
		if kind == kindFiller && size == left {
			r.next += size
			break // at the ring's end
		}
		if kind != kindRecord || size > maxSize {
			return errDamaged
		}
		if size > uint64(len(b)) {
			break // the rest of it is next time's
		}
		if !decode(&record, b[:size], text[:size]) {
			return errDamaged
		}
		n := number(b)
		if r.begun && n < r.number {
			return errDamaged
		}
		if n > r.number {
			record.DroppedBefore = n - r.number
		}
		r.number, r.begun = n+1, true
		r.next += size
		b, text = b[size:], text[size:]
		each(&record)
	}
	word(r.header, atReadNumber).Store(r.number)
	word(r.header, atRead).Store(r.next)
	return nil
}
