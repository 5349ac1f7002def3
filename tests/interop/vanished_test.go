package interop

import (
	"fmt"
	"net/http"
	"testing"
	"time"
)

const vanishingPort = 10300

var toVanishing = declare("vanishing", vanishingPort, "http")

// TestAProxyThatVanishesIsMissed: nothing says so, as when a node loses its power. What
// waits for it is answered, though no request has a time limit, and what comes later does
// not wait for the same connection.
func TestAProxyThatVanishesIsMissed(t *testing.T) {
	onNode(t)
	t.Parallel()
	app := holdRequests(t, vanishingPort)
	waiting, client := ask(t, caller, toVanishing), ask(t, caller, toVanishing)
	client.expect(t, "/", 200, "")
	waiting.send(t, "/hold")
	app.await(t, 1)

	nft(t, called, fmt.Sprintf("table inet vanished { chain in { type filter hook prerouting priority raw; tcp dport %d drop; }; }", vanishingPort))
	restore := once(t, func() { nft(t, called, "delete table inet vanished") })
	client.send(t, "/")
	for name, c := range map[string]*asking{"who waited for an answer": waiting, "who asked then": client} {
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		response, err := http.ReadResponse(c.r, nil)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		response.Body.Close()
		if response.StatusCode < 500 {
			t.Errorf("%s: %s", name, response.Status)
		}
	}
	ask(t, caller, toVanishing).expect(t, "/", 503, "weir; error=connection_timeout; details=\"connect_timeout: ")
	restore()
	ask(t, caller, toVanishing).expect(t, "/", 200, "")
}
