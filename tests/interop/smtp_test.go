package interop

import (
	"encoding/base64"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const smtpPort = 2525

var toSMTP = declare("smtp", smtpPort, "tcp")

// postfixMain is main.cf of a server that takes mail for one domain and puts it into
// files. It looks up no names: there is nobody to ask. The owners are those that each
// Debian has, one for each purpose, as Postfix insists.
const postfixMain = `compatibility_level = 3.6
queue_directory = %[1]s/queue
data_directory = %[1]s/data
daemon_directory = %[2]s/sbin
shlib_directory = %[2]s
import_environment = MAIL_CONFIG MAIL_LOGTAG LD_LIBRARY_PATH=%[2]s
maillog_file = %[1]s/log
maillog_file_prefixes = %[1]s
mail_owner = nobody
setgid_group = mail
default_privs = daemon
myhostname = mail.shop.example
mydestination =
local_recipient_maps =
alias_maps =
smtpd_peername_lookup = no
virtual_mailbox_domains = shop.example
virtual_mailbox_base = %[1]s/mail
virtual_mailbox_maps = static:box/
virtual_uid_maps = static:%[3]d
virtual_gid_maps = static:%[3]d
virtual_mailbox_limit = 0
message_size_limit = 0
`

// postfixMaster is master.cf: what of Postfix such a server needs.
const postfixMaster = `%d inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
virtual unix - n n - - virtual
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
anvil unix - - n - 1 anvil
postlog unix-dgram n - n - 1 postlogd
`

// servePostfix starts Postfix in called, which ends with the test. It returns the
// folder of what was delivered, and the command line that begins one of Postfix's
// own programs, less its name.
func servePostfix(t *testing.T) (string, []string) {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	unpacked := filepath.Join(cache, "weir/debian/postfix/usr")
	libraries := filepath.Join(unpacked, "lib/postfix")
	if _, err := os.Stat(libraries); err != nil {
		t.Fatalf("%v: make packages unpacks it", err)
	}
	dir := folder(t)
	for _, name := range []string{"active", "bounce", "corrupt", "defer", "deferred", "flush", "hold", "incoming", "maildrop", "pid", "private", "public", "saved", "trace"} {
		folderIn(t, dir, "queue", name)
	}
	folderIn(t, dir, "data")
	folderIn(t, dir, "conf")
	folderIn(t, dir, "mail", "box")
	write(t, fmt.Sprintf(postfixMain, dir, libraries, nobody), dir, "conf", "main.cf")
	write(t, fmt.Sprintf(postfixMaster, smtpPort), dir, "conf", "master.cf")
	run := []string{"LD_LIBRARY_PATH=" + libraries, unpacked}
	serveAs(t, called, 0, "env", run[0], filepath.Join(libraries, "sbin/master"), "-c", filepath.Join(dir, "conf"), "-d")
	t.Cleanup(func() {
		if log, err := os.ReadFile(filepath.Join(dir, "log")); t.Failed() {
			t.Logf("Postfix's log: %v\n%s", err, end(string(log)))
		}
	})
	listens(t, called, on(smtpPort))
	return folderIn(t, dir, "mail", "box", "new"), run
}

// TestSMTP: the server speaks first, and mail arrives as it was sent, by both
// families.
func TestSMTP(t *testing.T) {
	throughBoth(t)
	t.Parallel()
	delivered, run := servePostfix(t)

	expectNoWaiting(t, smtpPort, "")
	random := rand.NewChaCha8([32]byte{12})
	var mail strings.Builder
	mail.WriteString("Subject: goods\r\n\r\n")
	for i := range 8000 {
		line := make([]byte, 700)
		_, _ = random.Read(line)
		// A dot that begins a line is doubled on its way (RFC 5321, section 4.5.2).
		mail.WriteString(strings.Repeat(".", i%3) + base64.StdEncoding.EncodeToString(line) + "\r\n")
	}
	for _, to := range []netip.AddrPort{on(smtpPort), on6(smtpPort), toSMTP, over6(toSMTP)} {
		logged := len(accessLog.String())
		mustCall(t, strings.NewReader(mail.String()), "curl", "-sS", "smtp://"+to.String()+"/caller.shop.example",
			"--mail-from", "caller@shop.example", "--mail-rcpt", "box@shop.example", "-T", "-")
		got := take(t, delivered, 1)[0]
		_, want, _ := strings.Cut(strings.ReplaceAll(mail.String(), "\r\n", "\n"), "\n\n")
		if _, got, _ := strings.Cut(got, "\n\n"); got != want {
			t.Errorf("by %s: got %d bytes, want the %d that were sent", to, len(got), len(want))
		}
		recordsOf(t, logged, caller, to)
	}
	const messages = 200
	mustCall(t, nil, "env", run[0], filepath.Join(run[1], "sbin/smtp-source"), "-s", "10", "-m", fmt.Sprint(messages), "-l", "20000",
		"-f", "caller@shop.example", "-t", "box@shop.example", toSMTP.String())
	for _, got := range take(t, delivered, messages) {
		if len(got) < 20000 {
			t.Errorf("one of many: got %d bytes, want 20000 and some", len(got))
		}
	}
}

// take waits until there are that many files in a folder, and returns what is in
// them, and removes them.
func take(t *testing.T, dir string, want int) []string {
	t.Helper()
	var entries []os.DirEntry
	eventually(t, patience, "what is to be in "+dir, func() error {
		var err error
		if entries, err = os.ReadDir(dir); err == nil && len(entries) != want {
			err = fmt.Errorf("there are %d files, want %d", len(entries), want)
		}
		return err
	})
	var contents []string
	for _, e := range entries {
		file := filepath.Join(dir, e.Name())
		content, err := os.ReadFile(file)
		if err := errors.Join(err, os.Remove(file)); err != nil {
			t.Fatal(err)
		}
		contents = append(contents, string(content))
	}
	return contents
}
