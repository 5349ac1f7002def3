package model

// Programmed is what one agent knows of the routes and policies of the cluster, and of the
// roots: how far its node's proxies have them. An agent serves it as JSON, and the
// controller adds up what all agents say.
type Programmed struct {
	// Known are all that the agent knows, by their full name, with the generation in
	// which it does.
	Known map[string]int64 `json:"known"`
	// Trusted is identity.Digest of the roots that all proxies of the node are known to
	// trust; empty: not all are.
	Trusted string `json:"trusted,omitempty"`
	// Uses are those that govern what a proxy of the node has asked for, or its callers.
	Uses []Use `json:"uses"`
}

// Use is how far the proxies of a node have a route for one of its parents, or a policy.
type Use struct {
	Object string `json:"object"` // its full name
	// Parent of a route, as ParentRef.String has it: proxies have asked for an address of
	// that. A policy has none: it is one thing to a proxy, by whatever Services it comes.
	Parent     string `json:"parent,omitempty"`
	Generation int64  `json:"generation"` // of the object
	// Proxies that it governs, once they have any config for that; those of them that
	// acknowledged one made of this generation, and those that refused it.
	Proxies      int `json:"proxies"`
	Acknowledged int `json:"acknowledged"`
	Refused      int `json:"refused"`
}

// Governing is a route that is part of what a proxy has, for one of its parents, or such
// a policy.
type Governing struct {
	Object     string // its full name
	Parent     string // of a route, as ParentRef.String has it
	Generation int64
}
