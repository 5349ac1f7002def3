package launch

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/agent/proxypb"
)

// A proxy keeps its key and certificate in a memory file. The agent has a copy of the
// descriptor, does not read what is in it, and hands it to the pod's next proxy. An agent
// that has started again gets it from the proxy as it adopts it, as it gets the listeners.

const (
	// identitySeals are those of a memory file that nobody can change any more.
	identitySeals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	// maxIdentity is the longest memory file that is kept, in bytes.
	maxIdentity = 256 << 10
)

// IdentityKept has the memory file of the proxy's identity fetched from it, in the place
// of the one before. Who hears from the proxy calls it when there is another.
func (i *Instance) IdentityKept() error {
	if i.manager == nil {
		return nil
	}
	return i.manager.keepIdentity(i)
}

// errNoIdentity is a proxy that has no memory file.
var errNoIdentity = errors.New("the proxy has no certificate")

// adoptIdentity has the memory file of a proxy that runs; nil: there is none to be had, and
// the pod's next proxy has to ask for a certificate.
func (m *Manager) adoptIdentity(st Attachment) *os.File {
	file, err := fetchIdentity(m.socketPath(st.ContainerID, st.Generation))
	if err != nil && !errors.Is(err, errNoIdentity) {
		m.opts.Log.Warn("proxy adopted without its certificate", "pod", st.PodNamespace+"/"+st.PodName, "error", err)
	}
	return file
}

func (m *Manager) keepIdentity(i *Instance) error {
	file, err := fetchIdentity(i.Socket)
	if err != nil {
		return fmt.Errorf("identity of %s: %w", i.Socket, err)
	}
	a := m.find(i.Attachment.ContainerID)
	if a == nil {
		file.Close()
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.state.Generation != i.Attachment.Generation {
		file.Close() // another proxy runs by now
		return nil
	}
	a.dropIdentity()
	a.identity = file
	return nil
}

// dropIdentity lets go of the memory file. The caller holds a.mu, or is alone.
func (a *attachment) dropIdentity() {
	if a.identity != nil {
		a.identity.Close()
	}
	a.identity = nil
}

// fetchIdentity asks a proxy, by its control socket, for its memory file.
func fetchIdentity(socket string) (*os.File, error) {
	file, err := fetchMemory(socket, 'I', proxypb.LaunchReply_IDENTITY)
	if err != nil {
		return nil, err
	}
	if file == nil {
		return nil, errNoIdentity
	}
	if err := checkIdentity(file); err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// checkIdentity makes sure that what a proxy wants kept is a memory file, which keeps
// nothing else alive, is not large, and stays as it is.
func checkIdentity(file *os.File) error {
	seals, err := unix.FcntlInt(file.Fd(), unix.F_GET_SEALS, 0)
	if err != nil {
		return errors.New("it is not a memory file")
	}
	if seals&identitySeals != identitySeals {
		return fmt.Errorf("it is a memory file that is not sealed (%#x)", seals)
	}
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if info.Size() > maxIdentity {
		return fmt.Errorf("it is a memory file of %d bytes, %d are the most", info.Size(), maxIdentity)
	}
	return nil
}
