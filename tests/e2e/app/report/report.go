// Package report is what the test application prints: what a server saw of a
// request, and what a client got for it. Tests hold both against the records of
// the proxies in between.
package report

import (
	"net/http"
	"time"
)

// Answer is what the server says of one request.
type Answer struct {
	Pod     string      `json:"pod"`    // hostname, which is the pod's name
	Client  string      `json:"client"` // address the connection came from, as the application sees it
	Local   string      `json:"local"`  // address it came to
	Host    string      `json:"host"`
	Path    string      `json:"path"`
	Headers http.Header `json:"headers"`
	Next    *Result     `json:"next,omitempty"` // of the request this one caused
	Sink    Sink        `json:"sink"`
}

// Sink is what came to a server's sink, in connections.
type Sink struct {
	Uncaptured int `json:"uncaptured"` // from the ports of package probe
	Others     int `json:"others"`
}

// Result is one request as its client saw it. Every request has a connection of
// its own, so Local names it.
type Result struct {
	URL    string        `json:"url"`
	Start  time.Time     `json:"start"`
	Took   time.Duration `json:"took"`            // nanoseconds
	Local  string        `json:"local,omitempty"` // address the connection came from
	Remote string        `json:"remote,omitempty"`
	Status int           `json:"status,omitempty"`
	Header http.Header   `json:"header,omitempty"`
	Answer *Answer       `json:"answer,omitempty"` // nil: the server was not the test application
	Error  string        `json:"error,omitempty"`
}

// Call is one call of gRPC as its client saw it.
type Call struct {
	Code    int    `json:"code"` // of gRPC; 0: it was answered
	Message string `json:"message,omitempty"`
}
