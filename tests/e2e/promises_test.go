package e2e

import "testing"

// promise is something Weir's users may rely on, and the test of it.
type promise struct {
	name string
	test func(*testing.T)
}

// undisturbed are promises that hold beside one another.
var undisturbed = []promise{
	{"a pod is captured by its namespace's label", capturedByNamespace},
	{"a pod is captured by its own label", capturedByPod},
	{"a pod opts out of a captured namespace", optedOut},
	{"a pod without a label is left alone", leftAlone},
	{"the spec of a captured pod is unchanged", specUnchanged},
	{"the restricted Pod Security Standard allows all of it", restricted},
	{"Deployments are captured", deployment},
	{"StatefulSets are captured, also when recreated under the same name", statefulSet},
	{"DaemonSets are captured", daemonSet},
	{"a Job completes", job},
	{"init containers have network, through the proxy", initContainers},
	{"front reaches back by its Service's name", frontToBack},
	{"the application sees its client's own address", clientSeen},
	{"a user reaches back through the real nginx and front", throughIngress},
	{"a label value that means nothing holds the pod back, by name", wrongLabel},
	{"an unknown annotation holds the pod back, by name", unknownAnnotation},
	{"a RuntimeClass that is not listed holds the pod back, by name", runtimeClasses},
	{"a label that can have no effect is an event, and nothing else", labelWithoutEffect},
	{"nothing is left of a deleted pod", nothingLeft},
	{"running pods are captured in place and released in place, and nothing is cut", capturedInPlace},
	{"rules that somebody broke are repaired", driftRepaired},
	{"an annotation that changes takes effect without a restart", annotationChanged},
	{"a TrafficPolicy that means nothing is refused, and another says what comes of it", policyStatus},
	{"an AuthorizationPolicy that means nothing is refused, and another says what comes of it", authorizationStatus},
	{"pods of the mesh call each other by mTLS, on both nodes", encrypted},
	{"who may call is the AuthorizationPolicy's to say", whoMayCall},
	{"callers show who they are where that is demanded, and kubelet need not", callersShow},
	{"a forged request for a certificate is denied, by name", forgedDenied},
	{"a route and a policy say how many proxies have acknowledged them", programmed},
	{"an agent writes about its own node only, the controller takes off one taint only", ownNodeOnly},
}

// disturbing are promises about faults that every pod of a node would feel: one
// after the other, in this order.
var disturbing = []promise{
	{"fifty pods at once are all captured", fiftyAtOnce},
	{"the first packets of pods are captured", firstPackets},
	{"a pod whose capture fails never runs", failsClosed},
	{"a killed proxy's callers wait and are served", proxyKilled},
	{"an agent that is killed is not missed", agentKilled},
	{"without an agent new pods wait and running ones go on", agentAway},
	{"without the API server agents and proxies start again and traffic goes on", apiAway},
	{"certificates are renewed and CAs take over, and no request fails", rotated},
	{"a controller that ends, or is killed, is followed by the other", controllerFollowed},
	{"clocks may differ by 10 minutes, and where a certificate has ended calls fail until there is another", certificatesEnd},
	{"a node that registers with the taint keeps it until its agent is ready", taintedUntilReady},
	{"after a reboot no captured pod runs uncaptured", rebooted},
	{"a restart of the DaemonSet leaves the chain as it is, all the time", restarted},
	{"the runtime loads the plugin as a drop-in and as an entry", chainForms},
	{"a primary that is a single plugin is followed by a list of its own", singlePrimary},
	{"the primary rewrites its list, and the plugin is chained again within a second", primaryRewrites},
	{"the runtime is restarted and reloads while pods start, and nothing changes", runtimeRestarted},
	{"uninstalled, pods start uncaptured; installed again, captured", uninstalled},
	{"the DaemonSet deleted, pods start uncaptured; installed again, captured", daemonSetDeleted},
	{"the namespace deleted, pods start uncaptured; installed again, captured", namespaceDeleted},
}

func TestWeir(t *testing.T) {
	t.Run("undisturbed", func(t *testing.T) {
		for _, p := range undisturbed {
			t.Run(p.name, func(t *testing.T) {
				t.Parallel()
				p.test(t)
			})
		}
	})
	for _, p := range disturbing {
		t.Run(p.name, p.test)
	}
}
