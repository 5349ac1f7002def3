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
	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	clientscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/klog/v2"
	"sigs.k8s.io/yaml"
)

// objects decodes the files that base's kustomization lists; a field that the API
// does not know is an error. CRDs, which are generated, are left out: the API server's
// own packages look at them, in the tests of agent/cluster.
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
	crds, err := filepath.Glob("base/crds/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if files = append(files, crds...); len(files) != len(kustomization.Resources)+2 { // itself and options.yaml
		t.Errorf("base/ has %q, its kustomization lists %q", files, kustomization.Resources)
	}
	var out []runtime.Object
	for _, name := range kustomization.Resources {
		if strings.HasPrefix(name, "crds/") {
			continue
		}
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

// all returns the objects of a kind.
func all[T runtime.Object](t *testing.T) []T {
	t.Helper()
	var found []T
	for _, o := range objects(t) {
		if x, ok := o.(T); ok {
			found = append(found, x)
		}
	}
	return found
}

// one returns the only object of its kind.
func one[T runtime.Object](t *testing.T) T {
	t.Helper()
	found := all[T](t)
	if len(found) != 1 {
		t.Fatalf("%d objects of type %T, want 1", len(found), *new(T))
	}
	return found[0]
}

// TestRights fails when the rights of a service account grow, or shrink, without a
// reason in the documentation.
func TestRights(t *testing.T) {
	granted := granted(t)
	if diff := cmp.Diff(documented(t), granted); diff != "" {
		t.Errorf("rights (-README.md +base/*.yaml):\n%s", diff)
	}
	for _, account := range all[*corev1.ServiceAccount](t) {
		if account.Namespace != "weir-system" || granted[account.Name] == nil {
			t.Errorf("service account %s/%s has no rights", account.Namespace, account.Name)
		}
	}
	agent, controller := one[*appsv1.DaemonSet](t), one[*appsv1.Deployment](t)
	for name, got := range map[string]string{
		"weir-agent":      agent.Namespace + "/" + agent.Spec.Template.Spec.ServiceAccountName,
		"weir-controller": controller.Namespace + "/" + controller.Spec.Template.Spec.ServiceAccountName,
	} {
		if got != "weir-system/"+name {
			t.Errorf("%s runs as %s", name, got)
		}
	}
}

// granted are the verbs by service account and resource, as RBAC gives them. A
// resource of a Role is followed by its namespace.
func granted(t *testing.T) map[string]map[string]string {
	out := map[string]map[string]string{}
	give := func(binding string, ref rbacv1.RoleRef, kind string, subjects []rbacv1.Subject, scope string, rules []rbacv1.PolicyRule) {
		if len(subjects) != 1 || subjects[0].Kind != "ServiceAccount" || subjects[0].Namespace != "weir-system" || ref.Kind != kind {
			t.Errorf("%s binds %v to %v, want one service account of weir-system to a %s", binding, ref, subjects, kind)
			return
		}
		name := subjects[0].Name
		if out[name] == nil {
			out[name] = map[string]string{}
		}
		for _, rule := range rules {
			if len(rule.APIGroups) != 1 || len(rule.Resources) != 1 || len(rule.NonResourceURLs) > 0 {
				t.Errorf("a rule is to be about one resource: %v", rule)
				continue
			}
			resource := strings.TrimSuffix(rule.Resources[0]+"."+rule.APIGroups[0], ".")
			if len(rule.ResourceNames) > 0 {
				resource += " " + strings.Join(rule.ResourceNames, ", ")
			}
			out[name][resource+scope] = strings.Join(rule.Verbs, ", ")
		}
	}
	bound := map[string]bool{}
	for _, b := range all[*rbacv1.ClusterRoleBinding](t) {
		for _, role := range all[*rbacv1.ClusterRole](t) {
			if role.Name == b.RoleRef.Name {
				bound["ClusterRole "+role.Name] = true
				give(b.Name, b.RoleRef, "ClusterRole", b.Subjects, "", role.Rules)
			}
		}
	}
	for _, b := range all[*rbacv1.RoleBinding](t) {
		for _, role := range all[*rbacv1.Role](t) {
			if role.Name == b.RoleRef.Name && role.Namespace == b.Namespace {
				bound["Role "+role.Name] = true
				give(b.Name, b.RoleRef, "Role", b.Subjects, " in "+role.Namespace, role.Rules)
			}
		}
	}
	// What is bound to a role that is not ours, such as cluster-admin, is in no rule.
	roles := len(all[*rbacv1.ClusterRole](t)) + len(all[*rbacv1.Role](t))
	if bindings := len(all[*rbacv1.ClusterRoleBinding](t)) + len(all[*rbacv1.RoleBinding](t)); len(bound) != roles || bindings != roles {
		t.Errorf("%d roles and %d bindings, of which belong together: %v", roles, bindings, bound)
	}
	return out
}

// documented are the tables of README.md, by the service account that the line
// before each names.
func documented(t *testing.T) map[string]map[string]string {
	row := regexp.MustCompile(`^\| ([a-z0-9.:/, -]+) \| ([a-z, ]+) \| .+ \|$`)
	heading := regexp.MustCompile("^Service account `([a-z-]+)`")
	out, account := map[string]map[string]string{}, ""
	for line := range strings.Lines(string(read(t, "README.md"))) {
		line = strings.TrimRight(line, "\n")
		if m := heading.FindStringSubmatch(line); m != nil {
			account = m[1]
			out[account] = map[string]string{}
		} else if m := row.FindStringSubmatch(line); m != nil && account != "" {
			out[account][m[1]] = m[2]
		}
	}
	return out
}

// TestPolicies checks that each policy is in force, and about a service account that
// there is; expressions are compiled by a real API server, in tests/e2e.
func TestPolicies(t *testing.T) {
	bindings := all[*admissionv1.ValidatingAdmissionPolicyBinding](t)
	accounts := all[*corev1.ServiceAccount](t)
	var narrowed []string
	for _, p := range all[*admissionv1.ValidatingAdmissionPolicy](t) {
		inForce := slices.ContainsFunc(bindings, func(b *admissionv1.ValidatingAdmissionPolicyBinding) bool {
			return b.Spec.PolicyName == p.Name && b.Spec.MatchResources == nil &&
				slices.Equal(b.Spec.ValidationActions, []admissionv1.ValidationAction{admissionv1.Deny})
		})
		if !inForce || *p.Spec.FailurePolicy != admissionv1.Fail {
			t.Errorf("policy %s denies nothing, or not always", p.Name)
		}
		for _, a := range accounts {
			want := "request.userInfo.username == 'system:serviceaccount:" + a.Namespace + ":" + a.Name + "'"
			if c := p.Spec.MatchConditions; len(c) == 1 && c[0].Expression == want {
				for _, r := range p.Spec.MatchConstraints.ResourceRules {
					narrowed = append(narrowed, a.Name+": "+strings.Join(r.Resources, ", "))
				}
			}
		}
	}
	// What the accounts may write, but for objects of one name, and answers to requests
	// for certificates of one signer.
	want := []string{
		"weir-agent: events", "weir-agent: pods/status", "weir-agent: certificatesigningrequests",
		"weir-controller: nodes", "weir-controller: httproutes/status, grpcroutes/status, tcproutes/status", "weir-controller: trafficpolicies/status, authorizationpolicies/status, peerauthentications/status",
		"weir-controller: secrets, configmaps", "weir-controller: clustertrustbundles",
	}
	if diff := cmp.Diff(want, narrowed); diff != "" {
		t.Errorf("narrowed (-want +got):\n%s", diff)
	}
}

// TestTaint checks that what makes nodes ready tolerates the taint of those that
// are not, and that the controller looks at the pods and containers that there are.
func TestTaint(t *testing.T) {
	agents, controller := one[*appsv1.DaemonSet](t), one[*appsv1.Deployment](t).Spec.Template.Spec
	taint := &corev1.Taint{Key: "weirmesh.io/agent-not-ready", Effect: corev1.TaintEffectNoExecute}
	for name, pod := range map[string]corev1.PodSpec{"the agent": agents.Spec.Template.Spec, "the controller": controller} {
		if !slices.ContainsFunc(pod.Tolerations, func(x corev1.Toleration) bool { return x.ToleratesTaint(klog.Background(), taint, false) }) {
			t.Errorf("%s does not tolerate %s", name, taint.Key)
		}
	}
	key, value, _ := strings.Cut(arg(t, controller, "controller", "--agents"), "=")
	if agents.Spec.Template.Labels[key] != value {
		t.Errorf("the controller looks for pods with %s=%s, the agents have %v", key, value, agents.Spec.Template.Labels)
	}
	for _, name := range []string{"agent", "install"} {
		if container(t, agents.Spec.Template.Spec, name).ReadinessProbe == nil {
			t.Errorf("container %s is ready as soon as it runs", name)
		}
	}
	// Ready is said by another process than the one that chains: of the same chain.
	installer := container(t, agents.Spec.Template.Spec, "install")
	for _, word := range installer.ReadinessProbe.Exec.Command[2:] {
		if !slices.Contains(installer.Args, word) {
			t.Errorf("the installer's probe has %s, the installer does not", word)
		}
	}
	for _, flag := range []string{"--chain=", "--runtime-socket="} {
		if !slices.ContainsFunc(installer.ReadinessProbe.Exec.Command, func(w string) bool { return strings.HasPrefix(w, flag) }) {
			t.Errorf("the installer's probe lacks %s: a drop-in that no runtime reads counts as ready", flag)
		}
	}
	lease := arg(t, controller, "controller", "--lease")
	roles := all[*rbacv1.Role](t)
	of := slices.IndexFunc(roles, func(r *rbacv1.Role) bool { return r.Name == "weir-controller" })
	may := of >= 0 && slices.ContainsFunc(roles[of].Rules, func(r rbacv1.PolicyRule) bool {
		return slices.Equal(r.Resources, []string{"leases"}) && slices.Equal(r.ResourceNames, []string{lease})
	})
	if !may {
		t.Errorf("no right to hold Lease %s", lease)
	}
}

// program is a file of the image, as the Dockerfile copies it.
var program = regexp.MustCompile(`^/weir-[a-z]+$`)

// TestPaths checks that each path on a command line is a file of the image or
// lies in a volume, and that each volume is used.
func TestPaths(t *testing.T) {
	set := one[*appsv1.DaemonSet](t)
	removing := uninstall(t, set)
	for name, pod := range map[string]corev1.PodSpec{
		"base": set.Spec.Template.Spec, "uninstall": removing.Spec.Template.Spec,
		"controller": one[*appsv1.Deployment](t).Spec.Template.Spec,
	} {
		t.Run(name, func(t *testing.T) {
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
	if c.ReadinessProbe != nil && c.ReadinessProbe.Exec != nil {
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
	may := slices.ContainsFunc(agentRole(t).Rules, func(r rbacv1.PolicyRule) bool {
		return slices.Equal(r.Resources, []string{"daemonsets"}) && slices.Equal(r.ResourceNames, []string{set.Name}) && slices.Equal(r.Verbs, []string{"get"})
	})
	if !may {
		t.Errorf("no right to get DaemonSet %s, or more than that", set.Name)
	}
	if *pod.TerminationGracePeriodSeconds < 20 {
		t.Errorf("%d s of grace are too few for an uninstall", *pod.TerminationGracePeriodSeconds)
	}
}

func agentRole(t *testing.T) *rbacv1.ClusterRole {
	t.Helper()
	roles := all[*rbacv1.ClusterRole](t)
	i := slices.IndexFunc(roles, func(r *rbacv1.ClusterRole) bool { return r.Name == "weir-agent" })
	if i < 0 {
		t.Fatal("no ClusterRole weir-agent")
	}
	return roles[i]
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
