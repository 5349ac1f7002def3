// Package manifests holds nothing but a test of what lies in its folder.
package manifests

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	clientscheme "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/yaml"
)

// objects decodes the files that base's kustomization lists; a field that the API
// does not know is an error.
func objects(t *testing.T) []runtime.Object {
	t.Helper()
	var kustomization struct{ Resources []string }
	if err := yaml.Unmarshal(read(t, "base/kustomization.yaml"), &kustomization); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("base/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != len(kustomization.Resources)+2 { // itself and options.yaml
		t.Errorf("base/ has %q, its kustomization lists %q", files, kustomization.Resources)
	}
	var out []runtime.Object
	for _, name := range kustomization.Resources {
		for _, doc := range bytes.Split(read(t, "base/"+name), []byte("\n---\n")) {
			out = append(out, decode(t, name, doc))
		}
	}
	return out
}

func decode(t *testing.T, name string, doc []byte) runtime.Object {
	t.Helper()
	var kind struct{ APIVersion, Kind string }
	if err := yaml.Unmarshal(doc, &kind); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	object, err := clientscheme.Scheme.New(schema.FromAPIVersionAndKind(kind.APIVersion, kind.Kind))
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	if err := yaml.UnmarshalStrict(doc, object); err != nil {
		t.Fatalf("%s: %s: %v", name, kind.Kind, err)
	}
	return object
}

func read(t *testing.T, name string) []byte {
	t.Helper()
	content, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// one returns the only object of its kind.
func one[T runtime.Object](t *testing.T) T {
	t.Helper()
	var found []T
	for _, o := range objects(t) {
		if x, ok := o.(T); ok {
			found = append(found, x)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d objects of type %T, want 1", len(found), *new(T))
	}
	return found[0]
}

// TestRights fails when the agent's rights grow, or shrink, without a reason in
// the documentation.
func TestRights(t *testing.T) {
	granted := map[string]string{}
	for _, rule := range one[*rbacv1.ClusterRole](t).Rules {
		if len(rule.APIGroups) != 1 || len(rule.Resources) != 1 {
			t.Errorf("a rule is to be about one resource: %v", rule)
		}
		name := strings.TrimSuffix(rule.Resources[0]+"."+rule.APIGroups[0], ".")
		if len(rule.ResourceNames) > 0 {
			name += " " + strings.Join(rule.ResourceNames, ", ")
		}
		granted[name] = strings.Join(rule.Verbs, ", ")
	}
	documented := map[string]string{}
	row := regexp.MustCompile(`(?m)^\| ([a-z0-9., -]+) \| ([a-z, ]+) \| .+ \|$`)
	for _, m := range row.FindAllStringSubmatch(string(read(t, "README.md")), -1) {
		documented[m[1]] = m[2]
	}
	if diff := cmp.Diff(documented, granted); diff != "" {
		t.Errorf("rights (-README.md +rbac.yaml):\n%s", diff)
	}
	binding := one[*rbacv1.ClusterRoleBinding](t)
	account := one[*corev1.ServiceAccount](t)
	set := one[*appsv1.DaemonSet](t)
	if s := binding.Subjects; len(s) != 1 || s[0].Name != account.Name || s[0].Namespace != account.Namespace {
		t.Errorf("the binding is for %v", s)
	}
	if got := set.Spec.Template.Spec.ServiceAccountName; got != account.Name || set.Namespace != account.Namespace {
		t.Errorf("the DaemonSet runs as %s/%s", set.Namespace, got)
	}
}

// program is a file of the image, as the Dockerfile copies it.
var program = regexp.MustCompile(`^/weir-[a-z]+$`)

// TestPaths checks that each path on a command line is a file of the image or
// lies in a volume, and that each volume is used.
func TestPaths(t *testing.T) {
	set := one[*appsv1.DaemonSet](t)
	removing := uninstall(t, set)
	for name, set := range map[string]*appsv1.DaemonSet{"base": set, "uninstall": removing} {
		t.Run(name, func(t *testing.T) {
			pod := set.Spec.Template.Spec
			for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
				checkPaths(t, pod, c)
			}
		})
	}
}

func checkPaths(t *testing.T, pod corev1.PodSpec, c corev1.Container) {
	image := string(read(t, "../Dockerfile"))
	mounts := map[string]bool{} // path → whether a flag names it
	for _, m := range c.VolumeMounts {
		mounts[m.MountPath] = false
		if !slices.ContainsFunc(pod.Volumes, func(v corev1.Volume) bool { return v.Name == m.Name }) {
			t.Errorf("%s mounts %s, which is no volume", c.Name, m.Name)
		}
	}
	words := slices.Concat(c.Command, c.Args)
	if c.ReadinessProbe != nil {
		words = append(words, c.ReadinessProbe.Exec.Command...)
	}
	for _, word := range words {
		flag, path, ok := strings.Cut(word, "=")
		if !ok {
			flag, path = "", word
		}
		if !strings.HasPrefix(path, "/") {
			continue
		}
		_, mounted := mounts[path]
		switch {
		case flag == "--socket": // the host's
		case flag == "--options":
			dir, file := filepath.Split(path)
			if dir = filepath.Clean(dir); file != "options.yaml" || !slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool {
				return m.MountPath == dir && m.Name == "options"
			}) {
				t.Errorf("%s: %s is not of the ConfigMap", c.Name, word)
			}
			mounts[dir] = true
		case flag == "--runtime-socket":
			dir := filepath.Dir(path)
			if _, ok := mounts[dir]; !ok {
				t.Errorf("%s: %s is in no volume", c.Name, word)
			}
			mounts[dir] = true
		case program.MatchString(path) && strings.Contains(image, "out/bin"+path+" "):
		case mounted:
			mounts[path] = true
		default:
			t.Errorf("%s: %s is neither in the image nor in a volume", c.Name, word)
		}
	}
	for path, used := range mounts {
		if !used {
			t.Errorf("%s: no flag names the volume at %s", c.Name, path)
		}
	}
}

// TestSocket checks that the socket that weir-cni is told of, on the host, is the
// one that the agent makes, in its container.
func TestSocket(t *testing.T) {
	pod := one[*appsv1.DaemonSet](t).Spec.Template.Spec
	run := hostPath(t, pod, "agent", arg(t, pod, "agent", "--run-dir"))
	if got := hostPath(t, pod, "install", arg(t, pod, "install", "--run-dir")); got != run {
		t.Errorf("the installer looks for the marker in the host's %s, the agent writes it to %s", got, run)
	}
	if got, want := arg(t, pod, "install", "--socket"), run+"/attach.sock"; got != want {
		t.Errorf("the plugin dials %s, the agent listens at %s", got, want)
	}
}

// TestOwner checks that installer and agent ask for the DaemonSet that they are part
// of, and may, and have the time to.
func TestOwner(t *testing.T) {
	set := one[*appsv1.DaemonSet](t)
	pod := set.Spec.Template.Spec
	for _, name := range []string{"install", "agent"} {
		if got, want := arg(t, pod, name, "--daemonset"), "$(NAMESPACE)/"+set.Name; got != want {
			t.Errorf("%s asks for %s, it is part of %s", name, got, want)
		}
		env := container(t, pod, name).Env
		if !slices.ContainsFunc(env, func(v corev1.EnvVar) bool {
			return v.Name == "NAMESPACE" && v.ValueFrom.FieldRef.FieldPath == "metadata.namespace"
		}) {
			t.Errorf("the environment of %s is %v", name, env)
		}
	}
	may := slices.ContainsFunc(one[*rbacv1.ClusterRole](t).Rules, func(r rbacv1.PolicyRule) bool {
		return slices.Equal(r.Resources, []string{"daemonsets"}) && slices.Equal(r.ResourceNames, []string{set.Name}) && slices.Equal(r.Verbs, []string{"get"})
	})
	if !may {
		t.Errorf("no right to get DaemonSet %s, or more than that", set.Name)
	}
	if *pod.TerminationGracePeriodSeconds < 20 {
		t.Errorf("%d s of grace are too few for an uninstall", *pod.TerminationGracePeriodSeconds)
	}
}

func container(t *testing.T, pod corev1.PodSpec, name string) corev1.Container {
	t.Helper()
	i := slices.IndexFunc(pod.Containers, func(c corev1.Container) bool { return c.Name == name })
	if i < 0 {
		t.Fatalf("no container %s", name)
	}
	return pod.Containers[i]
}

func arg(t *testing.T, pod corev1.PodSpec, name, flag string) string {
	t.Helper()
	for _, a := range container(t, pod, name).Args {
		if value, ok := strings.CutPrefix(a, flag+"="); ok {
			return value
		}
	}
	t.Fatalf("%s has no %s", name, flag)
	return ""
}

func hostPath(t *testing.T, pod corev1.PodSpec, name, path string) string {
	t.Helper()
	for _, m := range container(t, pod, name).VolumeMounts {
		if m.MountPath != path {
			continue
		}
		for _, v := range pod.Volumes {
			if v.Name == m.Name && v.HostPath != nil {
				return v.HostPath.Path
			}
		}
	}
	t.Fatalf("%s: nothing of the host's at %s", name, path)
	return ""
}

// uninstall returns the DaemonSet as manifests/uninstall has it.
func uninstall(t *testing.T, set *appsv1.DaemonSet) *appsv1.DaemonSet {
	t.Helper()
	original, err := json.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	patch, err := yaml.YAMLToJSONStrict(read(t, "uninstall/daemonset.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	merged, err := strategicpatch.StrategicMergePatch(original, patch, appsv1.DaemonSet{})
	if err != nil {
		t.Fatal(err)
	}
	var out appsv1.DaemonSet
	if err := yaml.UnmarshalStrict(merged, &out); err != nil {
		t.Fatal(err)
	}
	return &out
}

// TestUninstall checks that the pods which take the plugin out have no installer
// that puts it back, and the same agent, which lets captured pods go.
func TestUninstall(t *testing.T) {
	set := one[*appsv1.DaemonSet](t)
	removing := uninstall(t, set)
	var got []string
	for _, c := range removing.Spec.Template.Spec.InitContainers {
		got = append(got, fmt.Sprintf("init %s %v", c.Name, c.Command))
	}
	for _, c := range removing.Spec.Template.Spec.Containers {
		got = append(got, fmt.Sprintf("%s %v", c.Name, c.Command))
	}
	want := []string{"init uninstall [/weir-install uninstall]", "agent [/weir-agent --release]"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("containers (-want +got):\n%s", diff)
	}
	agent := container(t, set.Spec.Template.Spec, "agent")
	agent.Command = []string{"/weir-agent", "--release"}
	if diff := cmp.Diff(agent, container(t, removing.Spec.Template.Spec, "agent")); diff != "" {
		t.Errorf("the agent differs:\n%s", diff)
	}
	installer := container(t, set.Spec.Template.Spec, "install")
	step := removing.Spec.Template.Spec.InitContainers[0]
	if diff := cmp.Diff(installer.SecurityContext, step.SecurityContext); diff != "" {
		t.Errorf("what may install may uninstall (-install +uninstall):\n%s", diff)
	}
}
