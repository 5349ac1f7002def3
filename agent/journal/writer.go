package journal

import (
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/agent/memfd"
)

const (
	// seals are those of a journal's file: its size stays what it is, so that nobody who has it
	// mapped reads past its end.
	seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW

	// A ring that was read to its end begins at its beginning again from restartAt bytes on,
	// and gives the memory back from trimAt on when Trim is called: a proxy with few requests
	// has few pages of it.
	restartAt = 32 << 10
	trimAt    = 8 << 10
)

// Writer is the proxy's side. Make it with Create.
type Writer struct {
	file    int
	memory  []byte
	waiting chan struct{}

	mu         sync.Mutex
	head, tail uint64
	number     uint64 // of the next record
	before     previous
	scratch    []byte // a record before it is in its place
	touched    uint64 // bytes from the ring's beginning that there is memory for
	told       bool   // that the ring fills up, since it was half empty
}

// Create makes an empty journal. It needs memfd_create and ftruncate.
func Create() (*Writer, error) {
	fd, err := memfd.Create("weir-journal", memfd.Data)
	if err != nil {
		return nil, fmt.Errorf("journal: memory file: %w", err)
	}
	err = unix.Ftruncate(fd, fileSize)
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals)
	}
	var memory []byte
	if err == nil {
		memory, err = unix.Mmap(fd, 0, fileSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("journal: memory file: %w", err)
	}
	w := &Writer{file: fd, memory: memory, waiting: make(chan struct{}, 1)}
	word(memory, atMagic).Store(magic)
	return w, nil
}

// word is one of the header's.
func word(header []byte, at int) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&header[at]))
}

// File is the journal's descriptor, for an agent.
func (w *Writer) File() int { return w.file }

// Close lets go of the memory: what is Put later is lost. An agent that has the file reads on.
func (w *Writer) Close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	_ = unix.Munmap(w.memory)
	unix.Close(w.file)
	w.memory, w.file = nil, -1
}

// Put writes a record.
func (w *Writer) Put(r *Record) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.memory == nil {
		return
	}
	read := word(w.memory, atRead).Load()
	if read == w.head && w.head%Capacity >= restartAt {
		w.restart()
	}
	if w.head%block == 0 {
		w.begin()
	}
	w.scratch = encode(w.scratch[:0], r, &w.before)
	if !w.fits(len(w.scratch)) {
		w.fill()
		w.begin()
		w.scratch = encode(w.scratch[:0], r, &w.before)
	}
	w.append(w.scratch)
	if cap(w.scratch) > 4<<10 {
		w.scratch = nil // such are rare
	}
	w.number++
	w.touched = max(w.touched, (w.head-1)%Capacity+1)
	word(w.memory, atHead).Store(w.head)
	if full := w.head-min(max(read, w.tail), w.head) > Capacity/2; full != w.told {
		w.told = full
		if full {
			w.wake()
		}
	}
}

func (w *Writer) ring() []byte { return w.memory[headerSize:] }

// begin begins a block at the head, in the place of one that gives way.
func (w *Writer) begin() {
	if end := w.head + block; end > Capacity && w.tail < end-Capacity {
		w.tail = end - Capacity
		// Before anything is written over it: what follows must not be seen before this.
		word(w.memory, atTail).Swap(w.tail)
	}
	binary.LittleEndian.PutUint64(w.ring()[w.head%Capacity:], w.number)
	w.head += blockHeader
	w.before = previous{}
}

// fits reports whether the block has room for a record of so many bytes.
func (w *Writer) fits(size int) bool {
	return uint64(size+binary.MaxVarintLen32) <= block-w.head%block
}

// append writes a record that fits.
func (w *Writer) append(record []byte) {
	at := w.ring()[w.head%Capacity:]
	n := binary.PutUvarint(at, uint64(len(record)))
	n += copy(at[n:], record)
	w.head += uint64(n)
}

// fill ends the block.
func (w *Writer) fill() {
	if left := block - w.head%block; left < block {
		w.ring()[w.head%Capacity] = 0
		w.head += left
	}
}

// restart goes on at the ring's beginning. All was read.
func (w *Writer) restart() {
	w.head += Capacity - w.head%Capacity
	w.tail = w.head
	word(w.memory, atTail).Swap(w.tail)
	word(w.memory, atHead).Store(w.head)
}

// Unread reports whether there are records that no agent has read.
func (w *Writer) Unread() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.unread()
}

func (w *Writer) unread() bool {
	return w.memory != nil && max(word(w.memory, atRead).Load(), w.tail) < w.head
}

// Waiting has a value when an agent is to read soon: half of the ring is unread, or Flush
// waits. One reader.
func (w *Writer) Waiting() <-chan struct{} { return w.waiting }

func (w *Writer) wake() {
	select {
	case w.waiting <- struct{}{}:
	default:
	}
}

// Flush waits until all records are read, at most for limit.
func (w *Writer) Flush(limit time.Duration) {
	if !w.Unread() {
		return
	}
	w.wake()
	for deadline := time.Now().Add(limit); w.Unread() && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond)
	}
}

// Trim gives the ring's memory back, if all was read and it is worth it. It is for now and
// then.
func (w *Writer) Trim() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.touched < trimAt || w.unread() {
		return
	}
	if err := unix.Madvise(w.ring(), unix.MADV_REMOVE); err != nil {
		return // it is kept
	}
	w.restart()
	w.touched = 0
}
