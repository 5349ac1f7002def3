package main

import "testing"

func TestWhatARequestLedToIsRead(t *testing.T) {
	for said, want := range map[string]string{
		"[0] StatusCode=302\n[0] ResponseHeader=Date:x\n[0] ResponseHeader=Location:http://echo/a?b=c\n": "302 http://echo/a?b=c",
		"[0] StatusCode=200\n[0] ResponseHeader=Server:x\n[0 body] StatusCode=200\n[0 body] URL=/one\n":  "200 /one",
		"[0] StatusCode=404\n": "404 ",
		"":                     " ",
	} {
		if got := ledTo(said); got != want {
			t.Errorf("%q led to %q, want %q", said, got, want)
		}
	}
}
