// Package conflist edits a CNI network configuration: it puts weir-cni into the
// chain of a primary plugin and takes it out again.
//
// Bytes go in, bytes come out. A list (.conflist) is edited by splicing: only the
// bytes of our own entry appear, change or go, so the primary's fields, their
// order, its indentation and its cniVersion stay as they were, whatever they are,
// and Remove gives back the very bytes that Add was given. A single plugin's
// configuration (.conf, .json) becomes a list of two.
//
// It reads no files and knows no folders: place does. It does not check the other
// plugins' configuration beyond what libcni needs to run the chain.
package conflist
