// Package place puts Weir's CNI plugin on a node and into the node's CNI chain,
// keeps both there, and takes them out again.
//
// A Keeper is the whole of an installation: it copies the plugin, waits for the
// agent's boot marker, and then looks at the folder of CNI configurations
// whenever something happens there, and now and then. Each time Chain.Heal finds
// the primary's configuration, has package conflist edit its bytes, and writes
// them if they differ. There is no other state: what to do next follows from what
// lies in the folder, so it may be killed at any point.
//
// Every file appears whole, by rename, from a temporary file in the same folder
// whose name no runtime reads.
//
// It edits no JSON itself, starts no agent and no proxy, and touches no pod.
package place
