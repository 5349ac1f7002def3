package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"

	"github.com/weirmesh/weir/tests/cluster"
)

// The images of the tests. No registry has them.
const (
	appImage   = "weir.test/app:e2e"
	nginxImage = "weir.test/nginx:e2e"
)

const nginxProgram = "/usr/sbin/nginx"

// loadImages builds all images and loads them on every node.
func (b *testBed) loadImages(ctx context.Context) error {
	weir, err := buildWeir(ctx)
	if err != nil {
		return fmt.Errorf("Weir's image: %w", err)
	}
	app, err := buildApp(ctx, b.work)
	if err != nil {
		return fmt.Errorf("image of the test application: %w", err)
	}
	nginx, err := buildNginx(ctx, b.work)
	if err != nil {
		return fmt.Errorf("image of nginx: %w", err)
	}
	for _, archive := range []string{weir, app, nginx} {
		if err := b.LoadImage(ctx, archive); err != nil {
			return err
		}
	}
	return nil
}

// buildWeir has the Makefile build Weir's image, as its users do.
func buildWeir(ctx context.Context) (string, error) {
	root := repository()
	_, err := output(exec.CommandContext(ctx, "make", "--no-print-directory", "-C", root, "image"))
	return filepath.Join(root, "out", "weir-image.tar"), err
}

func buildApp(ctx context.Context, dir string) (string, error) {
	program := filepath.Join(dir, "app")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, "./app")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if _, err := output(build); err != nil {
		return "", err
	}
	archive := program + ".tar"
	return archive, cluster.BuildImage(archive, cluster.Image{
		Ref:        appImage,
		Files:      map[string]string{"/app": program},
		Entrypoint: []string{"/app"},
		Cmd:        []string{"serve"},
		User:       "65532:65532",
	})
}

// sharedLibrary is a line of ldd's: a name and where it is, or a path alone.
var sharedLibrary = regexp.MustCompile(`(?m)^\s*(?:\S+ => )?(/\S+) \(0x`)

// buildNginx packs the host's nginx with the libraries it is linked to.
func buildNginx(ctx context.Context, dir string) (string, error) {
	if _, err := os.Stat(nginxProgram); err != nil {
		return "", errors.New("run `apt-get install --no-install-recommends nginx-light`: " + err.Error())
	}
	linked, err := output(exec.CommandContext(ctx, "ldd", nginxProgram))
	if err != nil {
		return "", err
	}
	files := map[string]string{nginxProgram: nginxProgram}
	for _, match := range sharedLibrary.FindAllStringSubmatch(linked, -1) {
		files[match[1]] = match[1]
	}
	config, err := os.ReadFile("nginx/nginx.conf")
	if err != nil {
		return "", err
	}
	archive := filepath.Join(dir, "nginx.tar")
	return archive, cluster.BuildImage(archive, cluster.Image{
		Ref:   nginxImage,
		Files: files,
		Data: map[string][]byte{
			"/etc/nginx/nginx.conf": config,
			"/etc/nsswitch.conf":    []byte("hosts: files dns\n"),
		},
		Entrypoint: []string{nginxProgram},
		Cmd:        []string{"-e", "stderr", "-c", "/etc/nginx/nginx.conf", "-g", "daemon off;"},
		User:       "65532:65532",
	})
}

// output runs a command and returns its output; the error carries what it said.
func output(cmd *exec.Cmd) (string, error) {
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return "", fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, exit.Stderr)
		}
		return "", fmt.Errorf("%s: %w", filepath.Base(cmd.Path), err)
	}
	return string(out), nil
}
