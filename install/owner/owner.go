// Package owner says whether what runs the installer on a node is being deleted
// from the cluster, so that it does not leave the node's pods waiting for an agent
// that never comes back.
//
// An installer that is told to end cannot know why: its DaemonSet is updated, the
// node shuts down, or all of Weir goes. It asks the API server for its DaemonSet
// and its namespace. Only an answer that one of them is gone, or has a deletion
// timestamp, counts; no answer is no.
//
// When a namespace is deleted the installer's own rights in it may go before its
// pod does, and then nothing can be asked. So Watch looks at the namespace from the
// beginning: a connection that is open stays so, and a deletion of a namespace
// cannot be taken back.
//
// It changes nothing, in the cluster or on the node. It speaks HTTP and JSON by
// hand: these are two questions, and Kubernetes' client is tens of megabytes.
package owner

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"
)

const (
	accountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

	maxAnswer = 1 << 20 // bytes
	askTime   = 2 * time.Second
	askAgain  = 200 * time.Millisecond

	watchTime = 10 * time.Minute // of one watch, by the server
	firstWait = time.Second
	maxWait   = 30 * time.Second
	// A server that is gone without a word is noticed by pings.
	pingAfter = 30 * time.Second
	pingTime  = 15 * time.Second
)

// ErrUnknown says that the API server gave no answer that decides.
var ErrUnknown = errors.New("the API server does not say whether Weir is being deleted")

// Owner is a DaemonSet and its namespace.
type Owner struct {
	namespace, daemonSet string

	server  string // URL
	account string // folder of the service account's token and CA

	leaving atomic.Bool // the namespace was seen with a deletion timestamp, or gone
}

// CheckName refuses what is not namespace/name.
func CheckName(ref string) error {
	if namespace, name, found := strings.Cut(ref, "/"); !found || namespace == "" || name == "" || strings.Contains(name, "/") {
		return fmt.Errorf("%q must be namespace/name", ref)
	}
	return nil
}

// InCluster finds the API server as any pod does. ref is the DaemonSet, as
// CheckName has it.
func InCluster(ref string) (*Owner, error) {
	namespace, daemonSet, _ := strings.Cut(ref, "/")
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New("not in a pod: KUBERNETES_SERVICE_HOST or _PORT is not set")
	}
	return &Owner{
		namespace: namespace, daemonSet: daemonSet,
		server: "https://" + net.JoinHostPort(host, port), account: accountDir,
	}, nil
}

// Deleted says whether the DaemonSet or its namespace is gone or being deleted. It
// asks until there is an answer or ctx is done; then the error is ErrUnknown with
// the last reason.
func (o *Owner) Deleted(ctx context.Context) (bool, error) {
	for {
		if o.leaving.Load() {
			return true, nil
		}
		deleted, err := o.ask(ctx)
		if err == nil || deleted {
			return deleted, nil
		}
		select {
		case <-ctx.Done():
			return false, fmt.Errorf("%w: %w", ErrUnknown, err)
		case <-time.After(askAgain):
		}
	}
}

// ask asks once for both. That one is deleted decides, whatever the other says.
func (o *Owner) ask(ctx context.Context) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	client, err := o.client()
	if err != nil {
		return false, err
	}
	defer client.CloseIdleConnections()
	var errs []error
	for _, object := range []struct{ path, name string }{
		{"/apis/apps/v1/namespaces/" + url.PathEscape(o.namespace) + "/daemonsets/" + url.PathEscape(o.daemonSet), o.daemonSet},
		{"/api/v1/namespaces/" + url.PathEscape(o.namespace), o.namespace},
	} {
		deleted, err := o.deleted(ctx, client, object.path, object.name)
		if deleted {
			return true, nil
		}
		errs = append(errs, err)
	}
	return false, errors.Join(errs...)
}

// answer is what is read of an object, or of the Status in its place.
type answer struct {
	Kind     string
	Metadata struct {
		Name              string
		DeletionTimestamp *time.Time
	}
	Reason, Message string
	Details         struct{ Name string }
}

func (o *Owner) deleted(ctx context.Context, client *http.Client, path, name string) (bool, error) {
	response, err := o.get(ctx, client, path)
	if err != nil {
		return false, err
	}
	defer response.Body.Close()
	var got answer
	if err := json.NewDecoder(io.LimitReader(response.Body, maxAnswer)).Decode(&got); err != nil {
		return false, fmt.Errorf("%s: HTTP %d: %w", path, response.StatusCode, err)
	}
	switch {
	case response.StatusCode == http.StatusOK && got.Metadata.Name == name:
		return got.Metadata.DeletionTimestamp != nil, nil
	case response.StatusCode == http.StatusNotFound && got.Kind == "Status" && got.Reason == "NotFound" && got.Details.Name == name:
		return true, nil // about this object, not about a path that a server does not know
	}
	return false, fmt.Errorf("%s: HTTP %d: %s", path, response.StatusCode, got.Message)
}

// Watch looks at the namespace until ctx is done or it is being deleted.
func (o *Owner) Watch(ctx context.Context) {
	for wait := firstWait; ctx.Err() == nil && !o.leaving.Load(); wait = min(2*wait, maxWait) {
		began := time.Now()
		_ = o.watch(ctx) // ended by the server or not to be had: again; Deleted reports
		if time.Since(began) > maxWait {
			wait = firstWait
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// watch follows the namespace on one connection. Without a resource version it
// begins with the namespace as it is.
func (o *Owner) watch(ctx context.Context) error {
	client, err := o.client()
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	query := url.Values{
		"watch":          {"1"},
		"fieldSelector":  {"metadata.name=" + o.namespace},
		"timeoutSeconds": {fmt.Sprint(int(watchTime.Seconds()))},
	}
	response, err := o.get(ctx, client, "/api/v1/namespaces?"+query.Encode())
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("watch: HTTP %d", response.StatusCode)
	}
	events := json.NewDecoder(response.Body)
	for {
		var event struct {
			Type   string
			Object answer
		}
		if err := events.Decode(&event); err != nil {
			return err
		}
		if event.Object.Metadata.Name != o.namespace {
			continue // an error's Status
		}
		if event.Type == "DELETED" || event.Object.Metadata.DeletionTimestamp != nil {
			o.leaving.Store(true)
			return nil
		}
	}
}

func (o *Owner) get(ctx context.Context, client *http.Client, path string) (*http.Response, error) {
	token, err := os.ReadFile(filepath.Join(o.account, "token")) // kubelet writes it anew
	if err != nil {
		return nil, err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, o.server+path, nil)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	// Of either object only the metadata matters.
	request.Header.Set("Accept", "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json")
	return client.Do(request)
}

// client trusts the cluster's CA as it is now, and no proxy of the environment.
func (o *Owner) client() (*http.Client, error) {
	ca, err := os.ReadFile(filepath.Join(o.account, "ca.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, errors.New("no certificate in the service account's ca.crt")
	}
	return &http.Client{Transport: &http.Transport{
		TLSClientConfig:     &tls.Config{RootCAs: roots},
		TLSHandshakeTimeout: askTime,
		ForceAttemptHTTP2:   true,
		HTTP2:               &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTime},
	}}, nil
}
