package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"github.com/weirmesh/weir/tests/cluster"
)

// clusterEnv names the state folder of a running cluster to use.
const clusterEnv = "WEIR_CLUSTER"

// bed is the test bed: one for all tests, made by TestMain.
var bed testBed

// testBed is the cluster, and the ways to ask it.
type testBed struct {
	*cluster.Cluster
	kube   kubernetes.Interface
	config *rest.Config

	ours bool      // the cluster was brought up here
	once sync.Once // of down
	err  error     // of down
	lock io.Closer // held while the cluster of this name is ours
	work string    // folder of images
}

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	flag.Parse()
	if os.Geteuid() != 0 {
		fmt.Println("SKIP: tests/e2e needs root, to run a Kubernetes of its own")
		return 0
	}
	if flag.Lookup("test.list").Value.String() != "" {
		return m.Run()
	}
	if testing.Short() {
		fmt.Println("SKIP: tests/e2e takes minutes (-short)")
		return 0
	}
	// Tests wait for the cluster most of the time, whatever this machine's cores.
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	// Streams of exec sessions that tests end are not news.
	klog.SetOutput(io.Discard)
	klog.LogToStderr(false)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := bed.up(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		if ctx.Err() == nil {
			bed.showLogs(os.Stderr)
		}
		if err := bed.down(); err != nil {
			fmt.Fprintln(os.Stderr, "e2e:", err)
		}
		return 1
	}
	finished := make(chan struct{})
	go bed.watch(ctx, timeLimit(), finished)
	code := m.Run()
	close(finished)
	if code != 0 {
		bed.showLogs(os.Stderr)
	}
	if err := bed.down(); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return max(code, 1)
	}
	return code
}

// timeLimit is when to give up so that there is time left to clean up: the
// testing package ends a process that takes too long where it stands.
func timeLimit() <-chan time.Time {
	limit, err := time.ParseDuration(flag.Lookup("test.timeout").Value.String())
	if err != nil || limit == 0 {
		return nil
	}
	return time.After(limit - min(limit/4, time.Minute))
}

// watch takes everything down, and ends the process, when it is interrupted or
// runs out of time before finished is closed.
func (b *testBed) watch(ctx context.Context, limit <-chan time.Time, finished <-chan struct{}) {
	cause := "interrupted"
	select {
	case <-finished:
		return
	case <-ctx.Done():
	case <-limit:
		cause = "out of time (-timeout)"
		b.showLogs(os.Stderr)
	}
	fmt.Fprintf(os.Stderr, "e2e: %s, cleaning up\n", cause)
	if err := b.down(); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
	}
	os.Exit(1)
}

// up brings the cluster up, or finds it, and installs Weir.
func (b *testBed) up(ctx context.Context) error {
	began := time.Now()
	step := func(line string) { log.Printf("%5.1fs %s", time.Since(began).Seconds(), line) }
	if err := b.openCluster(ctx, step); err != nil {
		return err
	}
	config, err := clientcmd.BuildConfigFromFlags("", b.Kubeconfig)
	if err != nil {
		return err
	}
	config.QPS, config.Burst = 200, 400
	b.config = config
	if b.kube, err = kubernetes.NewForConfig(config); err != nil {
		return err
	}
	if b.work, err = os.MkdirTemp("", "weir-e2e-"); err != nil {
		return err
	}
	step("building and loading images")
	if err := b.loadImages(ctx); err != nil {
		return err
	}
	step("installing the Gateway API and Weir")
	if err := b.installGateway(ctx); err != nil {
		return err
	}
	if err := b.install(ctx); err != nil {
		return err
	}
	step("Weir is installed")
	return nil
}

func (b *testBed) openCluster(ctx context.Context, step func(string)) error {
	var err error
	if dir := os.Getenv(clusterEnv); dir != "" {
		b.Cluster, err = cluster.Attach(dir)
		return err
	}
	b.Cluster, b.lock, err = cluster.Fresh(ctx, ".", cluster.Options{Name: "e2e", Progress: step})
	if errors.Is(err, cluster.ErrBusy) {
		return fmt.Errorf("%w; name a cluster of your own in %s", err, clusterEnv)
	}
	b.ours = err == nil
	return err
}

// down removes all that up made. It waits for another down that is under way.
func (b *testBed) down() error {
	b.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if b.work != "" {
			b.err = os.RemoveAll(b.work)
		}
		if b.Cluster == nil {
			return
		}
		if b.ours {
			b.err = errors.Join(b.err, b.Down(ctx))
		} else {
			b.err = errors.Join(b.err, b.removeNamespaces(ctx))
		}
	})
	return b.err
}

// node finds a node by name.
func (b *testBed) node(name string) *cluster.Node {
	for _, node := range b.Nodes {
		if node.Name == name {
			return node
		}
	}
	panic("no node " + name)
}

// repository is the root of Weir's source.
func repository() string {
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		panic(err)
	}
	return root
}
