package launch

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/renameio/v2"

	"github.com/weirmesh/weir/plugin/capture"
)

// Attachment is what is kept of one captured sandbox, in memory and as
// attachments/<container id>.json. It is written before anything is started and
// removed after everything has ended, so that nothing can be left behind that no
// file speaks of. What runs is not in it: the proxy's cgroup tells.
type Attachment struct {
	ContainerID  string
	IfNames      []string // interfaces attached; the proxy ends with the last
	Netns        string   // path as this agent sees it
	NetnsInode   uint64
	PodNamespace string
	PodName      string
	PodUID       string
	PodLabels    map[string]string // as they were then; nil: not known
	Addresses    []netip.Addr
	Spec         capture.Spec
	Limits       Limits // asked for by the pod
	OpaquePorts  []capture.PortRange
	ProxyUID     uint32
	Generation   uint32 // of the newest proxy; its socket carries it
	Committed    bool   // the rules are in place and the plugin knows
	Leaving      bool   `json:"-"` // it will be released in a moment: others are to know
	Released     bool   // nothing new is turned aside; the proxy ends with its last connection
	BootID       string // namespaces do not outlive a boot
}

// Capturing reports whether new connections of the pod are turned aside, and go on to be:
// it is not about to be released.
func (a Attachment) Capturing() bool { return a.Committed && !a.Released && !a.Leaving }

// store is the folder of attachments.
type store struct {
	dir    string
	bootID string
}

func openStore(dir string) (store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return store{}, err
	}
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return store{}, err
	}
	return store{dir: dir, bootID: strings.TrimSpace(string(id))}, nil
}

func (s store) path(id string) string { return filepath.Join(s.dir, id+".json") }

// save writes an attachment whole or not at all. It is not synced to disk: the
// folder is a tmpfs, and what a power cut loses is gone with the namespaces.
func (s store) save(a Attachment) error {
	a.BootID = s.bootID
	b, err := json.Marshal(a)
	if err != nil {
		return err
	}
	tmp, err := renameio.NewPendingFile(s.path(a.ContainerID), renameio.WithTempDir(s.dir), renameio.WithPermissions(0o600))
	if err != nil {
		return err
	}
	defer tmp.Cleanup()
	if _, err := tmp.Write(b); err != nil {
		return err
	}
	return tmp.CloseAtomicallyReplace()
}

func (s store) remove(id string) error {
	if err := os.Remove(s.path(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// load reads all attachments of this boot. A file of another boot is removed; a
// file that cannot be read is set aside as *.bad and reported in bad.
func (s store) load() ([]Attachment, []string, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, nil, err
	}
	var out []Attachment
	var bad []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") { // a writer that was killed
			if err := os.Remove(filepath.Join(s.dir, e.Name())); err != nil {
				return nil, nil, err
			}
			continue
		}
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		path := s.path(id)
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, nil, err
		}
		var a Attachment
		if err := json.Unmarshal(b, &a); err != nil || a.ContainerID != id || ValidID(id) != nil {
			bad = append(bad, path)
			if err := os.Rename(path, path+".bad"); err != nil {
				return nil, nil, fmt.Errorf("set aside a corrupt attachment: %w", err)
			}
			continue
		}
		if a.BootID != s.bootID {
			if err := s.remove(id); err != nil {
				return nil, nil, err
			}
			continue
		}
		out = append(out, a)
	}
	return out, bad, nil
}

// ValidID refuses a container ID that could name anything but a file of its own.
// (CNI specification 1.1.0: CNI_CONTAINERID starts with an alphanumeric
// character, then alphanumerics, underscore, dot, hyphen.)
func ValidID(id string) error {
	ok := id != "" && len(id) <= 128 && id[0] != '.' && id[0] != '-' && id[0] != '_'
	for _, c := range id {
		ok = ok && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '.' || c == '-')
	}
	if !ok {
		return fmt.Errorf("container ID %q is not of the form the CNI specification gives", id)
	}
	return nil
}
