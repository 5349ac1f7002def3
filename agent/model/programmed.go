package model

// Programmed is what one agent knows of the routes of the cluster: how far its node's
// proxies have them. An agent serves it as JSON, and the controller adds up what all
// agents say.
type Programmed struct {
	// Routes are all that the agent knows, by their full name, with the generation in
	// which it does.
	Routes map[string]int64 `json:"routes"`
	// Uses are those that govern what a proxy of the node has asked for.
	Uses []RouteUse `json:"uses"`
}

// RouteUse is how far the proxies of a node have a route to a Service.
type RouteUse struct {
	Route      string `json:"route"`      // its full name
	Service    string `json:"service"`    // "namespace/name": the parent whose address proxies have asked for
	Generation int64  `json:"generation"` // of the route
	// Proxies that it governs, once they have any config for the Service; those of
	// them that acknowledged one made of this generation, and those that refused it.
	Proxies      int `json:"proxies"`
	Acknowledged int `json:"acknowledged"`
	Refused      int `json:"refused"`
}

// Governing is a route that is part of a destination.
type Governing struct {
	Route      string // its full name
	Generation int64
}
