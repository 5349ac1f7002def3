// Package suite pins the Gateway API's conformance suite, whose own test is run as
// it is. A module apart: what that needs (controller-runtime, testify and so on) is
// none of Weir's.
package suite

import _ "sigs.k8s.io/gateway-api/conformance" // the test's package
