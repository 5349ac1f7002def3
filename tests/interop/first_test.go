package interop

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/tests/pod"
)

// unnoticed is longer than a connection through both proxies takes, on a machine
// that is busy, and shorter than what the proxies wait for the rest of a request
// line on a port that nobody declares: 100 ms.
const unnoticed = 60 * time.Millisecond

// expectNoWaiting connects some times and waits for the other side's first bytes.
// say, if any, is said first. The fastest counts: a wait that is waited each time
// shows in it, and a busy machine does not.
func expectNoWaiting(t *testing.T, port uint16, say string) {
	t.Helper()
	fastest := time.Hour
	for range 10 {
		began := time.Now()
		conn, err := dial(t.Context(), on(port).String())
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(patience))
		if _, err = io.WriteString(conn, say); err == nil {
			_, err = io.ReadFull(conn, make([]byte, 4))
		}
		conn.Close()
		if err != nil {
			t.Fatal(err)
		}
		fastest = min(fastest, time.Since(began))
	}
	if fastest > unnoticed {
		t.Errorf("the first bytes took %v at best, want less than %v", fastest, unnoticed)
	}
}

func TestRedis(t *testing.T) {
	throughBoth(t)
	t.Parallel()
	const port = 6379
	serve(t, called, "redis-server", "--bind", called.Address(false).String(), "127.0.0.1", "--port", fmt.Sprint(port),
		"--save", "", "--protected-mode", "no", "--dir", folder(t))
	listens(t, called, on(port))
	host := []string{"-h", called.Address(false).String(), "-p", fmt.Sprint(port)}
	cli := func(stdin io.Reader, args ...string) string {
		return mustCall(t, stdin, "redis-cli", append(host, args...)...)
	}

	expectNoWaiting(t, port, "PING\r\n")
	value := make([]byte, 8<<20)
	_, _ = rand.NewChaCha8([32]byte{9}).Read(value)
	if out := cli(bytes.NewReader(value), "-x", "SET", "large"); out != "OK\n" {
		t.Errorf("SET: %q", out)
	}
	if out := cli(nil, "--raw", "GET", "large"); out != string(value)+"\n" {
		t.Errorf("GET: %d bytes, want the %d that were set", len(out)-1, len(value))
	}
	var commands strings.Builder
	for i := range 20000 {
		fmt.Fprintf(&commands, "SET key%d %d\r\n", i, i)
	}
	if out := cli(strings.NewReader(commands.String()), "--pipe"); !strings.Contains(out, "errors: 0, replies: 20000") {
		t.Errorf("--pipe: %s", out)
	}
	out := mustCall(t, nil, "redis-benchmark", append(host, "--csv", "-n", "5000", "-c", "20", "-P", "4", "-t", "ping,set,get,lrange_100")...)
	if strings.Contains(strings.ToLower(out), "err") || strings.Count(out, "\n") < 5 {
		t.Errorf("redis-benchmark: %s", out)
	}
}

func TestMariaDB(t *testing.T) {
	throughBoth(t)
	t.Parallel()
	const port = 3306
	dir := folder(t)
	data := filepath.Join(dir, "data")
	cmd := program(t.Context(), t, "mariadb-install-db", "--no-defaults", "--user=nobody", "--datadir="+data, "--auth-root-authentication-method=normal", "--skip-test-db")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	sql := write(t, "CREATE USER weir IDENTIFIED BY 'weir';\nGRANT ALL ON *.* TO weir;\nCREATE DATABASE shop;\n", dir, "init.sql")
	serve(t, called, "mariadbd", "--no-defaults", "--datadir="+data, "--socket="+dir+"/socket", "--pid-file="+dir+"/pid",
		"--bind-address=0.0.0.0", fmt.Sprint("--port=", port), "--init-file="+sql, "--max-allowed-packet=64M", "--innodb-flush-log-at-trx-commit=0", "--skip-name-resolve")
	listens(t, called, on(port))
	client := []string{"--no-defaults", "-h", called.Address(false).String(), "-uweir", "-pweir", "--max-allowed-packet=64M", "-N", "-B", "shop"}

	expectNoWaiting(t, port, "")
	if out := mustCall(t, nil, "mariadb", append(client, "-e", "SELECT REPEAT('0123456789abcdef', 524288)")...); out != strings.Repeat("0123456789abcdef", 524288)+"\n" {
		t.Errorf("8 MB down: got %d bytes", len(out))
	}
	text := strings.Repeat("fedcba9876543210", 524288)
	statements := "CREATE TABLE t (v LONGTEXT); INSERT INTO t VALUES ('" + text + "'); SELECT LENGTH(v), v = REPEAT('fedcba9876543210', 524288) FROM t;"
	if out := mustCall(t, strings.NewReader(statements), "mariadb", client...); out != "8388608\t1\n" {
		t.Errorf("8 MB up: %q", out)
	}
}

const postgresPort = 5432

var toPostgres = declare("postgres", postgresPort, "tcp")

func TestPostgreSQL(t *testing.T) {
	throughBoth(t)
	t.Parallel()
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil || len(found) == 0 {
		t.Fatalf("there is no PostgreSQL, %v: make packages installs it", err)
	}
	bin, dir := found[len(found)-1], folder(t)
	data := filepath.Join(dir, "data")
	initdb := program(t.Context(), t, filepath.Join(bin, "initdb"), "-D", data, "-U", "weir", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync")
	initdb.SysProcAttr, initdb.Dir = as(nobody), dir
	if out, err := initdb.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	write(t, "host all all all trust\n", data, "pg_hba.conf")
	serve(t, called, filepath.Join(bin, "postgres"), "-D", data, "-p", fmt.Sprint(postgresPort), "-c", "listen_addresses=*", "-k", dir, "-F")
	listens(t, called, on(postgresPort))

	// A startup message (PostgreSQL's protocol, 3.0), which is answered at once.
	expectNoWaiting(t, postgresPort, "\x00\x00\x00\x25\x00\x03\x00\x00user\x00weir\x00database\x00postgres\x00\x00")
	random, rows := rand.NewChaCha8([32]byte{11}), strings.Builder{}
	for range 1000 {
		row := make([]byte, 6<<10)
		_, _ = random.Read(row)
		rows.WriteString(base64.StdEncoding.EncodeToString(row) + "\n")
	}
	host := func(to netip.AddrPort) []string {
		return []string{"-h", to.Addr().String(), "-p", fmt.Sprint(to.Port()), "-U", "weir"}
	}
	for i, to := range []netip.AddrPort{on(postgresPort), on6(postgresPort), toPostgres, over6(toPostgres)} {
		logged := len(accessLog.String())
		psql := append(host(to), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", "postgres")
		table := fmt.Sprint("t", i)
		mustCall(t, strings.NewReader(rows.String()), "psql", append(psql, "-c", "CREATE TABLE "+table+" (n serial, v text)", "-c", `\copy `+table+` (v) FROM pstdin`)...)
		if out := mustCall(t, nil, "psql", append(psql, "-c", `\copy (SELECT v FROM `+table+` ORDER BY n) TO pstdout`)...); out != rows.String() {
			t.Errorf("by %s: got %d bytes, want the %d that were sent", to, len(out), rows.Len())
		}
		recordsOf(t, logged, caller, to)
	}
	pgbench := append(host(toPostgres), "-n")
	mustCall(t, nil, "pgbench", append(pgbench, "-i", "-q", "postgres")...)
	for _, protocol := range []string{"simple", "prepared"} {
		out := mustCall(t, nil, "pgbench", append(pgbench, "-c", "8", "-j", "2", "-t", "50", "-M", protocol, "postgres")...)
		if !strings.Contains(out, "actually processed: 400/400\n") || !strings.Contains(out, "failed transactions: 0 ") {
			t.Errorf("pgbench, %s: %s", protocol, out)
		}
	}
}

func TestOpenSSH(t *testing.T) {
	throughBoth(t)
	t.Parallel()
	const port = 2222
	dir := folder(t)
	// sshd confines the process that talks to a stranger in this folder.
	if err := os.MkdirAll(filepath.Join(pod.NodeDir, "sshd"), 0o755); err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(dir, "key")
	mustCall(t, nil, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
	conf := write(t, fmt.Sprintf("Port %d\nHostKey %s\nAuthorizedKeysFile %s.pub\nStrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin yes\n", port, key, key), dir, "sshd_config")
	serveAs(t, called, 0, "/usr/sbin/sshd", "-D", "-e", "-f", conf)
	listens(t, called, on(port))

	expectNoWaiting(t, port, "")
	body := make([]byte, 20<<20)
	_, _ = rand.NewChaCha8([32]byte{10}).Read(body)
	out := mustCall(t, bytes.NewReader(body), "ssh", "-F", "none", "-p", fmt.Sprint(port), "-i", key, "-o", "BatchMode=yes",
		"-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "root@"+called.Address(false).String(), "cat")
	if out != string(body) {
		t.Errorf("got %d bytes, want the %d that were sent", len(out), len(body))
	}
}
