package launch

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/agent/proxypb"
)

// memoryFile has so many bytes.
func memoryFile(t *testing.T, length int, seals int) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "test")
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(make([]byte, length)); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		t.Fatal(err)
	}
	return f
}

// TestOnlyASealedMemoryFileIsKeptForAProxy: whatever a proxy hands over else, the agent
// would keep alive.
func TestOnlyASealedMemoryFileIsKeptForAProxy(t *testing.T) {
	plain, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	good := memoryFile(t, 1000, identitySeals)
	for _, c := range []struct {
		name  string
		files []*os.File
		stage proxypb.LaunchReply_Stage
		want  string // part of the error, "" for none
	}{
		{"a sealed one", []*os.File{good}, proxypb.LaunchReply_IDENTITY, ""},
		{"none", nil, proxypb.LaunchReply_IDENTITY, "no certificate"},
		{"two", []*os.File{good, good}, proxypb.LaunchReply_IDENTITY, "2 descriptors where one was due"},
		{"a file", []*os.File{plain}, proxypb.LaunchReply_IDENTITY, "not a memory file"},
		{"one that is not sealed", []*os.File{memoryFile(t, 1000, unix.F_SEAL_WRITE)}, proxypb.LaunchReply_IDENTITY, "not sealed"},
		{"a large one", []*os.File{memoryFile(t, maxIdentity+1, identitySeals)}, proxypb.LaunchReply_IDENTITY, "bytes"},
		{"something else", []*os.File{good}, proxypb.LaunchReply_LISTENING, "LISTENING where IDENTITY was due"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "c.sock")
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			answered := make(chan error, 1)
			go func() { answered <- answerOnce(l, c.stage, c.files) }()
			file, err := fetchIdentity(path)
			if err := <-answered; err != nil {
				t.Fatal(err)
			}
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("got %v, want %s", err, c.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			file.Close()
		})
	}
}

// answerOnce is a proxy's control socket for one connection.
func answerOnce(l *net.UnixListener, stage proxypb.LaunchReply_Stage, files []*os.File) error {
	conn, err := l.AcceptUnix()
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		return err
	}
	b, err := proto.Marshal(&proxypb.LaunchReply{Stage: stage})
	if err != nil {
		return err
	}
	var fds []int
	for _, f := range files {
		fds = append(fds, int(f.Fd()))
	}
	_, _, err = conn.WriteMsgUnix(b, unix.UnixRights(fds...), nil)
	return err
}
