package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
)

// apiClient speaks to the API server as its administrator. It is what Up needs
// and no more; tests bring a client of their own and Cluster.Kubeconfig.
type apiClient struct {
	server string
	http   *http.Client
}

// newAPIClient reads the pair of that name from the authority's folder.
func newAPIClient(a *authority, server, pair string) (*apiClient, error) {
	cert, err := tls.LoadX509KeyPair(a.path(pair)+".crt", a.path(pair)+".key")
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(a.path("ca.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, errors.New("ca.crt holds no certificate")
	}
	return &apiClient{server: server, http: &http.Client{
		Timeout: 10 * time.Second,
		Transport: &http.Transport{
			// No Proxy: the address is the cluster's own.
			TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: roots},
		},
	}}, nil
}

// get decodes the JSON at path into result, unless that is nil.
func (c *apiClient) get(ctx context.Context, path string, result any) error {
	return c.do(ctx, http.MethodGet, path, nil, result)
}

// create posts an object to a collection; one that is there already is fine.
func (c *apiClient) create(ctx context.Context, path string, object any) error {
	body, err := json.Marshal(object)
	if err != nil {
		return err
	}
	err = c.do(ctx, http.MethodPost, path, body, nil)
	var status statusError
	if errors.As(err, &status) && status.code == http.StatusConflict {
		return nil
	}
	return err
}

func (c *apiClient) do(ctx context.Context, method, path string, body []byte, result any) error {
	request, err := http.NewRequestWithContext(ctx, method, c.server+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := c.http.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	if response.StatusCode >= 300 {
		return fmt.Errorf("%s %s: %w", method, path, statusError{response.StatusCode, string(content)})
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(content, result)
}

// statusError is an answer of the API server that is not a success.
type statusError struct {
	code int
	body string
}

func (e statusError) Error() string {
	var status struct{ Message string }
	if json.Unmarshal([]byte(e.body), &status) == nil && status.Message != "" {
		return fmt.Sprintf("%d: %s", e.code, status.Message)
	}
	return fmt.Sprintf("%d: %s", e.code, lastLines(e.body, 3))
}
