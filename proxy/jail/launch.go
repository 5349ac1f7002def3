package jail

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/agent/proxypb"
)

// Bounds of what the launch socket may bring.
const (
	maxPacket    = 64 << 10
	maxListeners = 16
)

// maxDescriptors come with a packet, at most: listeners and an identity. One more is
// looked for.
const maxDescriptors = maxListeners + 1

// Listener is a listening socket and what the agent calls it.
type Listener struct {
	*proxypb.Listener
	FD int
}

// receiveLaunch reads the one packet that the agent sends. fd must block.
func receiveLaunch(fd int) (*proxypb.Launch, []int, error) {
	buf, oob := make([]byte, maxPacket), make([]byte, unix.CmsgSpace(4*(maxDescriptors+1)))
	n, oobn, flags, err := recvmsg(fd, buf, oob)
	if err != nil {
		return nil, nil, fmt.Errorf("launch socket: %w", err)
	}
	fds, err := parseRights(oob[:oobn])
	if err == nil {
		switch {
		case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
			err = errors.New("launch socket: packet truncated")
		case n == 0:
			err = errors.New("launch socket: the agent hung up")
		}
	}
	var msg *proxypb.Launch
	if err == nil {
		msg, err = parseLaunch(buf[:n], len(fds))
	}
	if err != nil {
		closeAll(fds)
		return nil, nil, err
	}
	return msg, fds, nil
}

// recvmsg returns the lengths of data and control message, and the flags.
func recvmsg(fd int, buf, oob []byte) (int, int, int, error) {
	for {
		n, oobn, flags, _, err := unix.Recvmsg(fd, buf, oob, unix.MSG_CMSG_CLOEXEC)
		if !errors.Is(err, unix.EINTR) {
			return n, oobn, flags, err
		}
	}
}

// parseRights takes the descriptors out of a control message.
func parseRights(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("launch socket: %w", err)
	}
	var fds []int
	for i := range messages {
		// Anything but SCM_RIGHTS is nothing to us.
		if got, err := unix.ParseUnixRights(&messages[i]); err == nil {
			fds = append(fds, got...)
		}
	}
	return fds, nil
}

// parseLaunch reads and checks a Launch that came with so many descriptors.
func parseLaunch(b []byte, descriptors int) (*proxypb.Launch, error) {
	msg := &proxypb.Launch{}
	if err := proto.Unmarshal(b, msg); err != nil {
		return nil, fmt.Errorf("launch packet: %w", err)
	}
	switch {
	case msg.GetContainerId() == "" || msg.GetGeneration() == 0:
		return nil, errors.New("launch packet: container_id and generation are needed")
	case msg.GetUid() == 0 || msg.GetGid() == 0:
		return nil, errors.New("launch packet: a proxy does not run as root, uid and gid are needed")
	case len(msg.GetListeners()) == 0 || len(msg.GetListeners()) > maxListeners:
		return nil, fmt.Errorf("launch packet: %d listeners, 1 to %d are possible", len(msg.GetListeners()), maxListeners)
	}
	for _, s := range append([]string{msg.GetContainerId(), msg.GetPodNamespace(), msg.GetPodName()}, msg.GetCgroupFiles()...) {
		if strings.ContainsAny(s, "\x00\n") {
			return nil, fmt.Errorf("launch packet: %q has a NUL or a line break", s)
		}
	}
	inherited := 0
	for i, l := range msg.GetListeners() {
		if _, err := listenAddress(l); err != nil {
			return nil, fmt.Errorf("launch packet: %w", err)
		}
		same := func(o *proxypb.Listener) bool {
			return o.GetNetwork() == l.GetNetwork() && (o.GetName() == l.GetName() || o.GetAddress() == l.GetAddress())
		}
		if slices.ContainsFunc(msg.GetListeners()[:i], same) {
			return nil, fmt.Errorf("launch packet: listener %s/%s %s is there twice", l.GetName(), l.GetNetwork(), l.GetAddress())
		}
		if l.GetInherited() {
			inherited++
		}
	}
	wanted := inherited
	if msg.GetIdentity() {
		wanted++
	}
	if wanted != descriptors {
		return nil, fmt.Errorf("launch packet: %d descriptors for %d inherited listeners, identity %v", descriptors, inherited, msg.GetIdentity())
	}
	return msg, nil
}

// listenAddress checks a listener and returns its address.
func listenAddress(l *proxypb.Listener) (netip.AddrPort, error) {
	addr, err := netip.ParseAddrPort(l.GetAddress())
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("listener %q: %w", l.GetName(), err)
	}
	is6 := addr.Addr().Is6() && !addr.Addr().Is4In6() && addr.Addr().Zone() == ""
	switch {
	case l.GetName() != "outbound" && l.GetName() != "inbound":
		return netip.AddrPort{}, fmt.Errorf("listener %q: the names are outbound and inbound", l.GetName())
	case l.GetNetwork() == "tcp4" && addr.Addr().Is4() || l.GetNetwork() == "tcp6" && is6:
		return addr, nil
	}
	return netip.AddrPort{}, fmt.Errorf("listener %q: %q is no network of address %s", l.GetName(), l.GetNetwork(), addr)
}

// SendListening writes LaunchReply LISTENING with the listeners' descriptors to a
// unix socket. On a stream socket it is the whole of what is ever sent: the
// caller closes it, and that ends the message.
func SendListening(fd int, listeners []Listener) error {
	reply := &proxypb.LaunchReply{Stage: proxypb.LaunchReply_LISTENING}
	fds := make([]int, len(listeners))
	for i, l := range listeners {
		reply.Listeners = append(reply.Listeners, l.Listener)
		fds[i] = l.FD
	}
	return sendReply(fd, reply, fds)
}

// SendMemory writes a LaunchReply, IDENTITY or JOURNAL, with the descriptor of a memory
// file to a unix socket, as SendListening does listeners'; without it where file is -1.
func SendMemory(fd int, what proxypb.LaunchReply_Stage, file int) error {
	var fds []int
	if file >= 0 {
		fds = []int{file}
	}
	return sendReply(fd, &proxypb.LaunchReply{Stage: what}, fds)
}

// SendServing tells the agent that connections are taken.
func SendServing(fd int) error {
	return sendReply(fd, &proxypb.LaunchReply{Stage: proxypb.LaunchReply_SERVING}, nil)
}

// SendError tells the agent why this launch ends here. That it may not be
// listening any more changes nothing for the caller, who exits.
func SendError(fd int, cause error) {
	line := strings.ReplaceAll(strings.ToValidUTF8(cause.Error(), "?"), "\n", "; ")
	_ = sendReply(fd, &proxypb.LaunchReply{Error: line}, nil)
}

func sendReply(fd int, reply *proxypb.LaunchReply, fds []int) error {
	b, err := proto.Marshal(reply)
	if err != nil {
		return fmt.Errorf("launch reply: %w", err)
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	for {
		n, err := unix.SendmsgN(fd, b, rights, nil, unix.MSG_NOSIGNAL)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return fmt.Errorf("launch reply: %w", err)
		case n != len(b):
			return fmt.Errorf("launch reply: %d of %d bytes sent", n, len(b))
		default:
			return nil
		}
	}
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}
