package journal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// seals are those of a journal's file: its size stays what it is, so that nobody who has it
	// mapped reads past its end.
	seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW

	// A ring that was read to its end begins at its beginning again from restartAt bytes on,
	// and gives the memory back from trimAt on when Trim is called: a proxy with few requests
	// has few pages of it.
	restartAt = 64 << 10
	trimAt    = 16 << 10
)

// Writer is the proxy's side. Make it with Create.
type Writer struct {
	file    int
	memory  []byte
	waiting chan struct{}

	mu         sync.Mutex
	head, tail uint64
	number     uint64 // of the next record
	touched    uint64 // bytes from the ring's beginning that there is memory for
	told       bool   // that the ring fills up, since it was half empty
}

// Create makes an empty journal. It needs memfd_create and ftruncate.
func Create() (*Writer, error) {
	// Before Linux 6.3 there is no flag for what is never executed, which with
	// vm.memfd_noexec=2 is demanded.
	fd, err := unix.MemfdCreate("weir-journal", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate("weir-journal", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
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
	all := textsOf(r)
	size := sizeOf(&all)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.memory == nil {
		return
	}
	read := word(w.memory, atRead).Load()
	if read == w.head && w.head%Capacity >= restartAt {
		w.restart()
		read = w.head
	}
	at := w.head % Capacity
	if left := Capacity - at; left < size {
		w.makeRoom(left, read)
		filler := w.ring()[at:]
		binary.LittleEndian.PutUint32(filler, uint32(left))
		binary.LittleEndian.PutUint32(filler[4:], kindFiller)
		w.head += left
		at = 0
	}
	w.makeRoom(size, read)
	encode(w.ring()[at:at+size], w.number, r, &all)
	w.number++
	w.head += size
	w.touched = max(w.touched, at+size)
	word(w.memory, atHead).Store(w.head)
	if full := w.head-min(read, w.head) > Capacity/2; full != w.told {
		w.told = full
		if full {
			w.wake()
		}
	}
}

func (w *Writer) ring() []byte { return w.memory[headerSize:] }

// makeRoom has the oldest records give way to so many bytes more.
func (w *Writer) makeRoom(more, read uint64) {
	if w.head+more-w.tail <= Capacity {
		return
	}
	if read > w.tail && read <= w.head {
		w.tail = read // those were read
	}
	for w.head+more-w.tail > Capacity {
		w.tail += uint64(binary.LittleEndian.Uint32(w.ring()[w.tail%Capacity:]))
	}
	// Before anything is written over them: what follows must not be seen before this.
	word(w.memory, atTail).Swap(w.tail)
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
