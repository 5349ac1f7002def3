package mtls

import "crypto/tls"

// State is what was negotiated.
func (c *Conn) State() tls.ConnectionState { return c.tls.ConnectionState() }
