package client_test

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/weirmesh/weir/agent/api/client"
	"github.com/weirmesh/weir/agent/api/v1alpha1"
)

const policy = `{"apiVersion":"policy.weirmesh.io/v1alpha1","kind":"TrafficPolicy",` +
	`"metadata":{"namespace":"shop","name":"careful","resourceVersion":"7"},"spec":{"targetRef":{"name":"back"}}}`

// server answers with a text, or with an error, and notes what it was asked.
func server(t *testing.T, status int, answer string) (client.Interface, *[]string) {
	t.Helper()
	var asked []string
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		asked = append(asked, strings.TrimSpace(r.Method+" "+r.URL.String()+" "+r.Header.Get("Content-Type")+" "+string(body)))
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, answer)
	}))
	t.Cleanup(s.Close)
	c, err := client.New(&rest.Config{Host: s.URL})
	if err != nil {
		t.Fatal(err)
	}
	return c, &asked
}

func expect(t *testing.T, asked []string, want string) {
	t.Helper()
	if diff := cmp.Diff([]string{want}, asked); diff != "" {
		t.Errorf("asked (-want +got):\n%s", diff)
	}
}

func TestPoliciesAreListed(t *testing.T) {
	c, asked := server(t, 200, `{"apiVersion":"policy.weirmesh.io/v1alpha1","kind":"TrafficPolicyList","metadata":{"resourceVersion":"9"},"items":[`+policy+`]}`)
	list, err := c.TrafficPolicies("").List(t.Context(), metav1.ListOptions{Limit: 1})
	if err != nil {
		t.Fatal(err)
	}
	expect(t, *asked, "GET /apis/policy.weirmesh.io/v1alpha1/trafficpolicies?limit=1")
	if len(list.Items) != 1 || list.Items[0].Spec.TargetRef.Name != "back" || list.ResourceVersion != "9" {
		t.Errorf("got %+v", list)
	}
}

func TestPoliciesAreWatched(t *testing.T) {
	c, asked := server(t, 200, `{"type":"MODIFIED","object":`+policy+`}`+"\n")
	w, err := c.TrafficPolicies("shop").Watch(t.Context(), metav1.ListOptions{ResourceVersion: "9"})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	event := <-w.ResultChan()
	expect(t, *asked, "GET /apis/policy.weirmesh.io/v1alpha1/namespaces/shop/trafficpolicies?resourceVersion=9&watch=true")
	if p, ok := event.Object.(*v1alpha1.TrafficPolicy); !ok || event.Type != "MODIFIED" || p.Name != "careful" {
		t.Errorf("got %+v", event)
	}
}

func TestAPolicysStatusIsPatched(t *testing.T) {
	c, asked := server(t, 200, policy)
	p, err := c.TrafficPolicies("shop").Patch(t.Context(), "careful", types.MergePatchType, []byte(`{"status":{}}`), metav1.PatchOptions{FieldManager: "me"}, "status")
	if err != nil || p.ResourceVersion != "7" {
		t.Errorf("got %+v, %v", p, err)
	}
	expect(t, *asked, `PATCH /apis/policy.weirmesh.io/v1alpha1/namespaces/shop/trafficpolicies/careful/status?fieldManager=me application/merge-patch+json {"status":{}}`)
}

// TestAnEmptyListOfSourcesStaysOne: it is no one, where none would be anyone.
func TestAnEmptyListOfSourcesStaysOne(t *testing.T) {
	const rules = `"rules":[{"sources":[]},{}]`
	c, asked := server(t, 200, `{"apiVersion":"policy.weirmesh.io/v1alpha1","kind":"AuthorizationPolicyList","items":[{"metadata":{"name":"p"},"spec":{"action":"ALLOW",`+rules+`}}]}`)
	list, err := c.AuthorizationPolicies("shop").List(t.Context(), metav1.ListOptions{})
	if err != nil || len(list.Items) != 1 {
		t.Fatalf("%+v, %v", list, err)
	}
	expect(t, *asked, "GET /apis/policy.weirmesh.io/v1alpha1/namespaces/shop/authorizationpolicies")
	copied := list.Items[0].DeepCopy()
	if r := copied.Spec.Rules; len(r) != 2 || r[0].Sources == nil || r[1].Sources != nil {
		t.Errorf("read: %+v", r)
	}
	if text, err := json.Marshal(copied); err != nil || !strings.Contains(string(text), rules) {
		t.Errorf("written: %s, %v", text, err)
	}
}

func TestAKindThatIsNotServedIsNotFound(t *testing.T) {
	c, _ := server(t, 404, "404 page not found\n")
	if _, err := c.TrafficPolicies("").List(t.Context(), metav1.ListOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
}
