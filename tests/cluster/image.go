package cluster

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	"runtime"
	"sort"
	"strings"
	"time"
)

// Image is a container image of one layer, on an empty base: a few static
// programs and what they read. The same content gives the same digest.
type Image struct {
	// Ref is its full name with a tag, such as "weir.test/agent:dev".
	Ref string
	// Files maps absolute paths in the image to files on disk, whose permission
	// bits are kept; all belong to root.
	Files map[string]string
	// Data maps absolute paths in the image to their content (mode 0644).
	Data map[string][]byte
	// Dirs maps folders that must exist to their mode; those of files are made
	// with 0755, and /tmp is always there.
	Dirs map[string]os.FileMode

	Entrypoint []string
	Cmd        []string
	Env        []string // NAME=value
	User       string   // "1000", "1000:1000"; empty: root
	WorkingDir string   // empty: /
}

type (
	descriptor struct {
		MediaType   string            `json:"mediaType"`
		Digest      string            `json:"digest"`
		Size        int64             `json:"size"`
		Annotations map[string]string `json:"annotations,omitempty"`
	}
	blob struct {
		descriptor
		content []byte
	}
)

// BuildImage writes img to path as an archive in OCI layout, which `ctr images
// import`, Cluster.LoadImage, buildah and podman read.
func BuildImage(path string, img Image) error {
	layer, err := img.layer()
	if err != nil {
		return fmt.Errorf("image %s: %w", img.Ref, err)
	}
	layerBlob := newBlob("application/vnd.oci.image.layer.v1.tar", layer)
	config, err := jsonBlob("application/vnd.oci.image.config.v1+json", map[string]any{
		"created": time.Unix(0, 0).UTC(), "architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{
			"Entrypoint": img.Entrypoint, "Cmd": img.Cmd, "User": img.User, "WorkingDir": img.WorkingDir,
			"Env": append([]string{"PATH=/usr/local/bin:/usr/bin:/bin:/"}, img.Env...),
		},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{layerBlob.Digest}},
	})
	if err != nil {
		return err
	}
	manifest, err := jsonBlob("application/vnd.oci.image.manifest.v1+json", map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": config.descriptor, "layers": []descriptor{layerBlob.descriptor},
	})
	if err != nil {
		return err
	}
	entry := manifest.descriptor
	entry.Annotations = map[string]string{
		"io.containerd.image.name":          img.Ref,
		"org.opencontainers.image.ref.name": img.Ref,
	}
	index, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []descriptor{entry},
	})
	if err != nil {
		return err
	}

	var archive bytes.Buffer
	out := tar.NewWriter(&archive)
	err = writeEntry(out, "oci-layout", 0o644, []byte(`{"imageLayoutVersion":"1.0.0"}`))
	for _, b := range []blob{layerBlob, config, manifest} {
		if err == nil {
			err = writeEntry(out, "blobs/sha256/"+strings.TrimPrefix(b.Digest, "sha256:"), 0o644, b.content)
		}
	}
	if err == nil {
		err = writeEntry(out, "index.json", 0o644, index)
	}
	if closeErr := out.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return fmt.Errorf("image %s: %w", img.Ref, err)
	}
	return writeFile(path, archive.Bytes(), 0o644)
}

func newBlob(mediaType string, content []byte) blob {
	sum := sha256.Sum256(content)
	return blob{descriptor{MediaType: mediaType, Digest: "sha256:" + hex.EncodeToString(sum[:]), Size: int64(len(content))}, content}
}

func jsonBlob(mediaType string, value any) (blob, error) {
	content, err := json.Marshal(value)
	if err != nil {
		return blob{}, err
	}
	return newBlob(mediaType, content), nil
}

// layer is the image's file system as an uncompressed tar, parents first.
func (img Image) layer() ([]byte, error) {
	dirs := map[string]os.FileMode{"/tmp": 0o1777}
	for dir, mode := range img.Dirs {
		dirs[path.Clean(dir)] = mode
	}
	names := make([]string, 0, len(img.Files)+len(img.Data))
	for name := range img.Files {
		names = append(names, name)
	}
	for name := range img.Data {
		names = append(names, name)
	}
	parents := append([]string(nil), names...)
	for dir := range dirs {
		parents = append(parents, dir)
	}
	for _, name := range parents {
		if !path.IsAbs(name) {
			return nil, fmt.Errorf("path %q is not absolute", name)
		}
		for dir := path.Dir(path.Clean(name)); dir != "/"; dir = path.Dir(dir) {
			if _, ok := dirs[dir]; !ok {
				dirs[dir] = 0o755
			}
		}
	}

	var layer bytes.Buffer
	out := tar.NewWriter(&layer)
	for _, dir := range sortedKeys(dirs) {
		header := &tar.Header{Typeflag: tar.TypeDir, Name: dir[1:] + "/", Mode: int64(dirs[dir])}
		if err := out.WriteHeader(header); err != nil {
			return nil, err
		}
	}
	sort.Strings(names)
	for _, name := range names {
		content, mode := img.Data[name], os.FileMode(0o644)
		if file, ok := img.Files[name]; ok {
			info, err := os.Stat(file)
			if err != nil {
				return nil, err
			}
			mode = info.Mode().Perm()
			content, err = os.ReadFile(file)
			if err != nil {
				return nil, err
			}
		}
		if err := writeEntry(out, path.Clean(name)[1:], mode, content); err != nil {
			return nil, err
		}
	}
	if err := out.Close(); err != nil {
		return nil, err
	}
	return layer.Bytes(), nil
}

func sortedKeys(dirs map[string]os.FileMode) []string {
	keys := make([]string, 0, len(dirs))
	for key := range dirs {
		keys = append(keys, key)
	}
	sort.Strings(keys)
	return keys
}

func writeEntry(out *tar.Writer, name string, mode os.FileMode, content []byte) error {
	header := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: int64(mode), Size: int64(len(content))}
	if err := out.WriteHeader(header); err != nil {
		return err
	}
	_, err := io.Copy(out, bytes.NewReader(content))
	return err
}
