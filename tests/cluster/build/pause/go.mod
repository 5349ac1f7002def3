// The pause process, a module of its own so that its binary depends on nothing
// that changes with the product.
module github.com/weirmesh/weir/tests/cluster/build/pause

go 1.26.0
