package nft

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// transact sends what change buffers in one transaction: all of it takes effect, or
// nothing.
//
// nftables.Conn has the kernel answer each message, and send every rule and set back
// beside: reading that takes longer than all the rest. So its messages are taken from it
// by the one way out it has, a dialer for tests, and one answer is asked for, the last
// message's. The kernel gives it after the commit, and errors without being asked
// (nfnetlink_rcv_batch in net/netfilter/nfnetlink.c).
func (b Backend) transact(change func(*nftables.Conn) error) error {
	var batch []netlink.Message
	buffer, err := nftables.New(nftables.WithTestDial(func(sent []netlink.Message) ([]netlink.Message, error) {
		batch = append(batch, sent...)
		return nil, nil
	}))
	if err != nil {
		return err
	}
	if err := change(buffer); err != nil {
		return err
	}
	if err := buffer.Flush(); err != nil {
		return err
	}
	for i := range batch {
		h := &batch[i].Header
		h.Flags &^= netlink.Acknowledge | netlink.Echo
		h.Sequence, h.PID = 0, 0 // SendMessages sets them
	}
	batch[len(batch)-2].Header.Flags |= netlink.Acknowledge // the last one is the batch's end

	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: b.NS})
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer conn.Close()
	if _, err := conn.SendMessages(batch); err != nil {
		return err
	}
	_, err = conn.Receive()
	return err
}
