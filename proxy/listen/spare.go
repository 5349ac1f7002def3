package listen

import (
	"net"
	"sync"

	"golang.org/x/sys/unix"
)

// spare is a descriptor that is kept to be let go of: with what takes its place a
// client can be refused when there is no other. The zero value has none yet.
type spare struct {
	mu    sync.Mutex
	fd    int // a copy of the listening socket; 0: none
	ended bool
}

// keep sees to it that there is one, and reports whether that can be. Of a listener that
// is being closed there is none, and none is wanting.
func (s *spare) keep(l *net.TCPListener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd > 0 || s.ended {
		return true
	}
	raw, err := l.SyscallConn()
	if err != nil {
		return false
	}
	_ = raw.Control(func(fd uintptr) {
		if dup, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 1); err == nil {
			s.fd = dup
		}
	})
	return s.fd > 0
}

// release lets go of it, and reports whether there was one.
func (s *spare) release() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd == 0 {
		return false
	}
	unix.Close(s.fd)
	s.fd = 0
	return true
}

// end has none kept any more.
func (s *spare) end() {
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.release()
}
