package launch

import (
	"fmt"
	"net"
	"os"
	"time"

	"github.com/weirmesh/weir/agent/proxypb"
)

// memoryTimeout is how long a proxy may take to hand a memory file over.
const memoryTimeout = 2 * time.Second

// Journal has the file of the proxy's journal (package journal), to be opened. The proxy may
// have ended since.
func (i *Instance) Journal() (*os.File, error) {
	file, err := fetchMemory(i.Socket, 'J', proxypb.LaunchReply_JOURNAL)
	if err == nil && file == nil {
		err = fmt.Errorf("no descriptor came with %s", proxypb.LaunchReply_JOURNAL)
	}
	return file, err
}

// fetchMemory asks a proxy, by one byte on its control socket, for a memory file; nil: it has
// none. What the file is has yet to be looked at.
func fetchMemory(socket string, ask byte, want proxypb.LaunchReply_Stage) (*os.File, error) {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(memoryTimeout)); err != nil {
		return nil, err
	}
	if _, err := conn.Write([]byte{ask}); err != nil {
		return nil, err
	}
	_, fds, err := receiveReply(conn, want)
	if err != nil {
		return nil, err
	}
	switch len(fds) {
	case 0:
		return nil, nil
	case 1:
		return os.NewFile(uintptr(fds[0]), want.String()), nil
	}
	closeAll(fds)
	return nil, fmt.Errorf("%d descriptors where one was due", len(fds))
}
